"""An executed notebook as one offline page: code, what it printed, tables and figures."""

from __future__ import annotations

import base64
import binascii
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from markupsafe import Markup
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from analysis.report.html.markdown import to_html
from analysis.report.html.svg import inline_svg
from analysis.report.html.text import clean, html
from mambabyte.errors import UserError

_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_KEPT = frozenset(("table", "thead", "tbody", "tfoot", "tr", "th", "td", "caption", "p", "br", "b",
                   "i", "em", "strong", "code", "pre"))
_DROPPED_WHOLE = frozenset(("style", "script", "head", "title", "template", "noscript", "iframe"))
_SCOPES = ("row", "col")


def notebook_html(path: Path) -> Markup:
    """The cells of a notebook; UserError where the file is none."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        parts = [_cell(cell, f"c{i}") for i, cell in enumerate(cells)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a readable notebook ({type(error).__name__})") from None
    return Markup("\n".join(parts))


def code_styles() -> str:
    """Style rules of highlighted code, for light screens and for dark ones."""
    def rules(style: str) -> str:
        lines = HtmlFormatter(style=style).get_style_defs(".code").splitlines()
        kept = [line for line in lines if line.startswith(".code ") and "background" not in line]
        return "\n".join(kept)
    return (f"{rules('xcode')}\n@media screen and (prefers-color-scheme: dark) {{\n"
            f"{rules('github-dark')}\n}}")


def _cell(cell: dict[str, Any], prefix: str) -> str:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return f'<section class="words">{to_html(source, prefix=prefix)}</section>'
    if cell["cell_type"] != "code":
        return ""
    tags = cell.get("metadata", {}).get("tags", [])
    note = '<p class="note">parameters of this run</p>' if "injected-parameters" in tags else ""
    code = highlight(clean(source), PythonLexer(), HtmlFormatter(nowrap=True))
    outputs = "".join(_output(o, f"{prefix}-{i}")
                      for i, o in enumerate(_merged(cell.get("outputs", []))))
    return (f'<section class="cell">{note}<pre class="code" tabindex="0"><code>{code}</code></pre>'
            f"{outputs}</section>")


def _merged(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Outputs with the pieces that one stream arrived in put together, stdout before stderr."""
    streams = {name: "".join("".join(o["text"]) for o in outputs
                             if o["output_type"] == "stream" and o.get("name", "stdout") == name)
               for name in ("stdout", "stderr")}
    whole = [{"output_type": "stream", "name": n, "text": t} for n, t in streams.items() if t]
    return whole + [o for o in outputs if o["output_type"] != "stream"]


def _output(output: dict[str, Any], prefix: str) -> str:
    kind = output["output_type"]
    if kind == "stream":
        printed = _printed(output["text"])
        if output["name"] == "stdout":
            return printed
        return f"<details><summary>messages of libraries (stderr)</summary>{printed}</details>"
    if kind == "error":
        return _printed("\n".join(output["traceback"]), "error")
    data = output.get("data", {})
    if "image/svg+xml" in data:
        try:
            alt = "".join(data.get("text/plain", "")) or "The report describes it."
            svg = inline_svg("".join(data["image/svg+xml"]), prefix, "figure of this cell", alt)
            return f'<div class="scroll figure">{svg}</div>'
        except UserError:
            pass  # shown as whatever else the cell has
    if "image/png" in data:
        image = _png("".join(data["image/png"]))
        if image:
            return image
    if "text/html" in data:
        return f'<div class="scroll">{safe_html("".join(data["text/html"]))}</div>'
    return _printed("".join(data.get("text/plain", "")))


def _printed(text: str, kind: str = "printed") -> str:
    return f'<pre class="{kind}" tabindex="0">{html(_ANSI.sub("", text))}</pre>' if text else ""


def _png(data: str) -> str:
    try:
        image = base64.b64decode(data, validate=False)
    except (binascii.Error, ValueError):
        return ""
    if not image.startswith(b"\x89PNG"):
        return ""
    encoded = base64.b64encode(image).decode()
    return f'<img alt="figure of this cell" src="data:image/png;base64,{encoded}">'


def safe_html(text: str) -> Markup:
    """Only tables and plain emphasis of an HTML output; everything else becomes its text."""
    parser = _Safe()
    parser.feed(text)
    parser.close()
    return Markup(parser.page())


class _Safe(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._parts: list[str] = []
        self._open: list[str] = []
        self._dropping: str = ""

    def page(self) -> str:
        return "".join(self._parts) + "".join(f"</{tag}>" for tag in reversed(self._open))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._dropping:
            return
        if tag in _DROPPED_WHOLE:
            self._dropping = tag
        elif tag in _KEPT:
            kept = "".join(f' {k}="{html(v)}"' for k, v in attrs
                           if (k == "scope" and v in _SCOPES)
                           or (k in ("colspan", "rowspan") and v and v.isdigit()))
            self._parts.append(f"<{tag}{kept}>")
            if tag != "br":
                self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._dropping:
            self._dropping = "" if tag == self._dropping else self._dropping
        elif tag in self._open:
            while self._open[-1] != tag:
                self._parts.append(f"</{self._open.pop()}>")
            self._parts.append(f"</{self._open.pop()}>")

    def handle_data(self, data: str) -> None:
        if not self._dropping:
            self._parts.append(str(html(data)))
