"""What is in a run folder or a notebook cannot inject into the report, nor break it."""

from __future__ import annotations

import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from analysis import plots
from analysis.report.appendix import notebook_html, safe_html
from analysis.report.html.check import check_page
from analysis.report.html.svg import THEME, inline_svg
from analysis.runs.frames import write_frame
from mambabyte.errors import UserError
from tests.helpers.report_world import PROVENANCE, SVG, update_record, write_record, write_run

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = (
    "<script>alert(1)</script>", "\"><img src=x onerror=alert(1)>", "</style></svg></table>",
    "&lt;b&gt; &amp;", "{{ 7 * 7 }} {% raw %}", "[x](javascript:alert(1)) ![i](http://e.test/i)",
    "w" * 400, "a\x00b\x07c\x1b[31m", "\u202eevil\u202c \u200f", "\ud800", "`code` **bold** $x$",
    "]]><!--", "' onmouseover='alert(1)", "[[figure.tiny.times]]",
)

PIECES = (
    "<", ">", "&", '"', "'", "`", "\n", "\n\n", "\t", " ", "$", "$$", "|", "\\", "#", "# ", "- ",
    "> ", "~~~", "```", "[", "](", ")", "![", "{{", "}}", "{%", "%}", "{#", "<!--", "-->",
    "<![CDATA[", "</script", "<svg/onload=", "<a href=", "javascript:", "data:text/html,",
    "&#x3c;", "%3C", "\u2028", "\ufeff", "\u0000", "\ud83d", "e\u0301", "<template>",
    "<math><mi>", "</td></tr>", "style=", "expression(", "{{ value('tiny.best') }}", "1e999",
)


class Elements(HTMLParser):
    """Every element with its attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


@pytest.mark.parametrize("evil", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_strings_cannot_inject_or_break(world, evil):
    harmless = {n: Elements(p).found for n, p in harmless_pages(world).items()}
    assert_disarmed(hostile_pages(world, evil), harmless)


@pytest.mark.long
def test_hundreds_of_hostile_words(world):
    """Words put together at random of what is hostile and of what means something in a page."""
    harmless = {n: Elements(p).found for n, p in harmless_pages(world).items()}
    rng = random.Random(0)
    for _ in range(200):
        evil = "".join(rng.choice(HOSTILE + PIECES) for _ in range(rng.randrange(1, 9)))
        if not evil.strip():  # a caption without words is none, and its page another
            continue
        try:
            assert_disarmed(hostile_pages(world, evil), harmless)
        except Exception as error:
            raise AssertionError(f"of {evil!r}") from error


def assert_disarmed(pages: dict[str, str], harmless: dict[str, list[tuple[str, dict]]]) -> None:
    """That the pages have the elements, links and no more than those of harmless words have."""
    assert pages.keys() == harmless.keys()
    for name, page in pages.items():
        found = Elements(page).found
        assert {tag for tag, _ in found} <= {tag for tag, _ in harmless[name]}
        assert [tag for tag, _ in found].count("script") == 1
        assert not [a for _, a in found if any(k.startswith("on") for k in a)]
        # Links go to the files that the harmless page's go to, or to parts of this one.
        assert files(found) <= files(harmless[name])
        assert not re.search("[\u202a-\u202e\u2066-\u2069\u200e\u200f\x00-\x08\x0b-\x1f]", page)
        assert page.encode("utf-8")
        assert page.rstrip().endswith("</html>")


def files(elements: list[tuple[str, dict]]) -> set[str]:
    return {(a.get("href") or "").partition("#")[0] for _, a in elements}


def harmless_pages(world) -> dict[str, str]:
    """A report with a run, a failed run, a record and a ledger."""
    folder = world.run()
    write_record(world, folder, "tiny-record")
    world.run("tiny-2", status="failed", error="boom", parameters={"n": 4})
    world.section("summary",
                  "{% call finding('tiny.times') %}{{ value('tiny.best') }}{% endcall %}")
    world.section("tiny", "Best: {{ value('tiny.best') }} end.\n\n{{ figure('tiny.times') }}\n\n"
                  "{{ table('tiny.times') }}\n\n{{ table('tiny-record.times') }}")
    world.section("claims", "{{ table('claims.times') }}")
    claims(world, "a claim")
    return world.pages()


def claims(world, words: str) -> None:
    """A ledger of one claim whose every cell is ``words``."""
    folder = world.runs / "claims-1"
    if not folder.exists():
        write_run(world.runs, "claims-1", study="claims", tables={"times": "Claims."}, figures={})
    cell = words.encode("utf-8", "replace").decode()  # a file itself refuses lone surrogates
    write_frame(folder, "times", pd.DataFrame([dict.fromkeys(
        ("claim", "verdict", "theirs", "ours", "reason", "source", "document", "kind", "id"),
        cell)]))


def hostile_pages(world, evil: str) -> dict[str, str]:
    """The same report with ``evil`` wherever a run, a record or a ledger has words."""
    claims(world, evil)
    update_record(world.runs / "tiny-1", **{
        "values": {"slope": {"value": 0.5, "unit": evil, "about": evil},
                   "best": {"value": evil}, "joules": {"value": None}, "peak": {"value": 1}},
        "tables": {"times": evil, "lengths": ""},
        "parameters": {"n": evil, "words": evil},
        "provenance": {**PROVENANCE, "command": evil, "versions": {evil: evil},
                       "machine": {"cpu": evil, evil: evil, "gpus": [{"name": evil}]}},
    })
    cell = evil.encode("utf-8", "replace").decode()  # a file itself refuses lone surrogates
    write_frame(world.runs / "tiny-1", "times",
                pd.DataFrame({"length, bytes": [1, 2], f"a {cell}": [cell, "b"]}))
    update_record(world.runs / "tiny-2", error=evil, parameters={evil: evil},
                  provenance={"date": evil})
    update_record(world.records / "tiny" / "tiny-record", title=evil, about=evil,
                  tables={"times": evil, "lengths": ""}, parameters={"words": evil},
                  provenance={**PROVENANCE, "date": evil, "machine": {"cpu": evil}})
    return world.pages()


def test_hostile_svg_is_disarmed():
    evil = SVG.replace(
        "<text>", '<script>alert(1)</script><foreignObject><b/></foreignObject>'
        '<g onload="alert(1)" style="fill: url(http://e.test/x); background: red"/>'
        '<use xlink:href="http://e.test/x.svg#a"/><image href="http://e.test/i.png"/>'
        '<a xlink:href="javascript:alert(1)"><path d="M0 0"/></a>'
        "<style>@import url(http://e.test/s.css);</style>"
        '<g fill="url(  http://e.test )"/><set attributeName="href" to="x"/><text>')
    safe = str(inline_svg(evil, "f", "title", "alt"))
    assert "e.test" not in safe
    assert not re.search(r"script|onload|foreignObject|<a |<style|<set|background", safe)


@pytest.mark.parametrize("bad", [
    "", "<svg", "<html/>", "<!DOCTYPE svg [<!ENTITY a 'b'>]><x>&a;</x>"])
def test_unreadable_figure_is_a_clear_error(bad):
    with pytest.raises(UserError, match="run its study again"):
        inline_svg(bad, "f", "t", "a")


def test_figures_keep_their_ids_apart_and_take_the_pages_colours():
    first, second = (str(inline_svg(SVG, p, "t", "a")) for p in ("one", "two"))
    ids = set(re.findall(r' id="([^"]+)"', first))
    assert ids == {"one-t", "one-d", "one-p", "one-m"}
    assert not ids & set(re.findall(r' id="([^"]+)"', second))
    assert 'clip-path="url(#one-p)"' in first
    assert 'href="#one-m"' in first
    assert "fill:var(--blue);stroke:var(--ink)" in first


def test_coordinates_are_kept_to_a_hundredth():
    svg = SVG.replace("M0 0L1 1", "M 1.23456 -0.001234 L 10.000001 7.5").replace(
        "<text>", '<text x="3.14159" transform="translate(1.23456 2)">')
    safe = str(inline_svg(svg, "f", "t", "a"))
    assert 'd="M 1.23 -0 L 10 7.5"' in safe
    assert 'x="3.14"' in safe
    assert "translate(1.23456 2)" in safe  # a transform may scale: it stays exact


def test_page_knows_every_colour_of_the_house():
    house = {plots.BLUE, plots.VERMILION, plots.GREEN, plots.PURPLE, plots.ORANGE, plots.SKY,
             plots.BLACK, plots.INK, plots.MUTED, plots.GRID, plots.PAPER, plots.PANEL,
             *(plots.look(i)["color"] for i in range(7))}
    assert {c.lower().replace("#", "") for c in house} == {c.replace("#", "") for c in THEME}
    css = (ROOT / "analysis" / "report" / "templates" / "page.css").read_text()
    for theme in re.findall(r":root \{(.*?)\}", css, re.S):
        assert all(f"--{name}:" in theme for name in THEME.values())


def test_notebook_output_is_disarmed(tmp_path):
    cells = [
        {"cell_type": "markdown", "source": "# T\n<script>x</script> ![i](http://e.test/i.png)"},
        {"cell_type": "code", "source": "print('<b>')", "metadata": {}, "outputs": [
            {"output_type": "stream", "text": "\x1b[31mred\x1b[0m <i>"},
            {"output_type": "error", "traceback": ["<script>boom</script>"]},
            {"output_type": "display_data", "data": {"image/png": "bm90IGEgcG5n"}},
            {"output_type": "display_data", "data": {"text/html": "<script>x</script>"
                                                     "<table onclick=x><td>1</td></table>"}},
            {"output_type": "display_data", "data": {"image/svg+xml": SVG}},
        ]},
    ]
    (tmp_path / "n.ipynb").write_text(json.dumps({"cells": cells}))
    page = str(notebook_html(tmp_path / "n.ipynb"))
    found = Elements(page).found
    assert not {"script", "i", "img"} & {tag for tag, _ in found}
    assert not [a for _, a in found if "onclick" in a]
    assert "red &lt;i&gt;" in page
    assert {"svg", "table", "td"} <= {tag for tag, _ in found}
    (tmp_path / "bad.ipynb").write_text("{")
    with pytest.raises(UserError, match="not a readable notebook"):
        notebook_html(tmp_path / "bad.ipynb")


def test_html_outputs_are_closed_properly():
    assert safe_html("<table><tr><td>a<b>b</td></table></div><style>x</style>") == \
        "<table><tr><td>a<b>b</b></td></tr></table>"


def test_appendix_is_written_and_linked(world):
    folder = world.run()
    (folder / "notebook.ipynb").write_text(json.dumps({"cells": [
        {"cell_type": "code", "source": "1 + 1", "metadata": {}, "outputs": []}]}))
    assert 'href="notebook-tiny-1.html"' in world.page()
    other = world.run("tiny-2", parameters={"n": 5}, profile="")
    (other / "notebook.ipynb").write_text('{"cells": []}')
    assert '<a href="notebook-tiny-2.html">tiny-2</a>' in world.page()
    appendix = world.page("notebook-tiny-1")
    assert "default-src 'none'" in appendix
    assert "script" not in appendix.replace("script-src", "")
    check_page(appendix, "notebook-tiny-1.html", [])
