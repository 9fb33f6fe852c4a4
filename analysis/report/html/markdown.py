"""Markdown to HTML: no raw HTML, no images from elsewhere, formulas as MathML.

Formulas are written ``$h_t$`` in a line, and ``$$ ... $$`` as a paragraph of their own.
"""

from __future__ import annotations

import re
from functools import cache

from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from markupsafe import Markup
from mdit_py_plugins.dollarmath import dollarmath_plugin

from analysis.report.html.text import clean, slug
from mambabyte.errors import UserError


def to_html(text: str, *, prefix: str = "", top: int = 0) -> Markup:
    """Rendered markdown. With ``top``, the highest heading becomes that level and the others
    follow; with ``prefix``, each heading gets the id PREFIX-slug."""
    parser = _parser()
    tokens = parser.parse(clean(text))
    levels = [int(t.tag[1]) for t in tokens if t.type == "heading_open"]
    shift = top - min(levels) if top and levels else 0
    for i, token in enumerate(tokens):
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(int(token.tag[1]) + shift, 6)}"
        if token.type == "heading_open" and prefix:
            token.attrSet("id", f"{prefix}-{slug(tokens[i + 1].content)}")
    page = parser.renderer.render(tokens, parser.options, {})
    # A table wider than the page scrolls in its own box, and so does code.
    page = page.replace("<table>", '<div class="scroll" role="region" tabindex="0" '
                        'aria-label="table"><table>').replace("</table>", "</table></div>")
    page = page.replace("<pre>", '<pre tabindex="0">')
    return Markup(page)


def to_line(text: str) -> Markup:
    """Markdown of one line, such as a heading, without a paragraph around it."""
    return Markup(_parser().renderInline(" ".join(clean(text).split())))


def formula(latex: str, display: bool = False) -> Markup:
    """MathML of a LaTeX formula; UserError where it cannot be read."""
    try:
        mathml = convert(latex, display="block" if display else "inline")
    except Exception as error:  # latex2mathml has many, without a common base
        raise UserError(f"the formula {latex!r} cannot be read: {type(error).__name__}") from None
    unknown = re.search(r"<mi>(\\\w+)", mathml)
    if unknown:
        raise UserError(f"the formula {latex!r} has the unknown command {unknown[1]}")
    if display:
        return Markup(f'<div class="scroll formula" role="region" tabindex="0" '
                      f'aria-label="formula">{mathml}</div>')
    return Markup(mathml)


@cache
def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    # No space just inside of the dollars, so that "5 $ or 6 $" stays text.
    parser.use(dollarmath_plugin, allow_labels=False, allow_space=False, allow_blank_lines=False)
    # The plugin's own rules would put each formula into an element more.
    parser.add_render_rule("math_inline", lambda _s, tokens, i, _o, _e: formula(tokens[i].content))
    parser.add_render_rule(
        "math_block", lambda _s, tokens, i, _o, _e: formula(tokens[i].content, display=True))
    return parser
