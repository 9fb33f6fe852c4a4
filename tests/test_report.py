"""The report: its numbers, its words, and that nothing in a run folder can break it."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from analysis import plots
from analysis.frames import write_frame
from analysis.records import load_record, load_records, write_record_file
from analysis.report import build_report
from analysis.report.appendix import notebook_html, safe_html
from analysis.report.check import check_page
from analysis.report.svg import THEME, inline_svg
from analysis.results import write_record
from analysis.studies import Study
from mambabyte.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
SVG = ('<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
       'viewBox="0 0 500 300"><defs><clipPath id="p"><rect width="5" height="5"/></clipPath>'
       '<path id="m" d="M0 0L1 1"/></defs><g clip-path="url(#p)">'
       '<use xlink:href="#m" style="fill: #0072b2; stroke: #22272e"/></g><text>ms</text></svg>')
PROVENANCE = {
    "date": "2026-01-02T03:04:05+00:00", "commit": "0123456789ab", "command": "mambabyte sweep",
    "versions": {"python": "3.11", "torch": "2.13"},
    "machine": {"cpu": "Test CPU", "cpu_count": 2, "memory_bytes": 2**34, "gpus": []},
}
HOSTILE = (
    "<script>alert(1)</script>", "\"><img src=x onerror=alert(1)>", "</style></svg></table>",
    "&lt;b&gt; &amp;", "{{ 7 * 7 }} {% raw %}", "[x](javascript:alert(1)) ![i](http://e.test/i)",
    "w" * 400, "a\x00b\x07c\x1b[31m", "\u202eevil\u202c \u200f", "\ud800", "`code` **bold** $x$",
    "]]><!--", "' onmouseover='alert(1)", "[[figure.tiny.times]]",
)


def write_run(root: Path, name: str, study: str = "tiny", **changes) -> Path:
    """A finished run of a study with one figure, one table and three values."""
    folder = root / name
    for part in ("tables", "figures"):
        (folder / part).mkdir(parents=True)
    frame = pd.DataFrame({"length, bytes": [1, 2], "time, ms": [0.5, math.nan],
                          "energy, J": pd.Series([None, 2.0], dtype=object)})
    write_frame(folder / "tables" / "times.parquet", frame)
    write_frame(folder / "figures" / "times.parquet", frame)
    (folder / "figures" / "times.svg").write_text(changes.pop("svg", SVG), encoding="utf-8")
    record = {
        "study": study, "parameters": {"n": 3}, "status": "done", "run_id": name,
        "sources": "", "profile": "quick", "seconds": 1.5, "provenance": PROVENANCE,
        "values": {"slope": {"value": 0.51234, "unit": "ms/byte", "about": "fitted"},
                   "joules": {"value": None, "unit": "J", "about": ""},
                   "best": {"value": "chunked", "unit": "", "about": ""},
                   "peak": {"value": 3 * 2**20, "unit": "B", "about": ""}},
        "tables": [{"name": "times", "caption": "Times."}],
        "figures": [{"name": "times", "title": "Time over length", "caption": "It grows.",
                     "alt": "A rising line."}],
    }
    write_record(folder, {**record, **changes})
    return folder


@pytest.fixture
def world(tmp_path):
    """Runs, prose and registry of a report about one study; call it to build."""

    class World:
        runs, prose, measurements = tmp_path / "runs", tmp_path / "prose", tmp_path / "measurements"
        out = tmp_path / "out" / "report.html"

        def __init__(self) -> None:
            (self.prose / "sections").mkdir(parents=True)
            (tmp_path / "tiny.py").write_text("x = 1\n")
            (tmp_path / "tiny.ipynb").write_text('{"cells": []}')
            self.study = Study("tiny", "Tiny", "Is it small?", tmp_path / "tiny.ipynb", "tiny",
                               tmp_path)
            self.config('front = ["summary"]')
            self.section("summary", "It is {{ value('tiny.slope') | sig(2) }} ms.")

        def config(self, extra: str) -> None:
            (self.prose / "report.toml").write_text(f'title = "Report"\n{extra}\n')

        def section(self, name: str, words: str) -> None:
            (self.prose / "sections" / f"{name}.md").write_text(words)

        def run(self, name: str = "tiny-1", **changes) -> Path:
            return write_run(self.runs, name,
                             **{"sources": self.study.sources_digest(), **changes})

        def build(self, draft: bool = False) -> str:
            path = build_report(self.runs, self.out, prose=self.prose, draft=draft,
                                measurements=self.measurements, registry={"tiny": self.study})
            return path.read_text(encoding="utf-8")

    return World()


# --- numbers in the prose ---------------------------------------------------------------------

def test_prose_takes_its_numbers_from_runs(world):
    world.run()
    world.section("summary", "A {{ value('tiny.slope') | sig(2) }} B {{ value('tiny.slope') }} "
                  "C {{ value('tiny.peak') | bytes }} D {{ value('tiny.slope') | percent }} "
                  "E {{ value('tiny.best') }} F {{ unit('tiny.slope') }} "
                  "G {{ parameter('tiny.n') }} "
                  "H {{ value('tiny.joules', missing='not measured') }} "
                  "{% if not measured('tiny.joules') %}I{% endif %}")
    page = world.build()
    assert ("A 0.51 B 0.5123 C 3 MiB D 51.2\u202f% E chunked F ms/byte G 3 H not measured I"
            in page)


@pytest.mark.parametrize(("words", "match"), [
    ("{{ value('tiny.slop') }}", r"tiny\.slop is not among .*did you mean slope"),
    ("{{ value('tny.slope') }}", r"tny: nothing is known.*did you mean tiny"),
    ("{{ value('tiny.joules') }}", "was not measured: write value"),
    ("{{ value('slope') }}", "write 'study.name'"),
    ("{{ figure('tiny.absent') }}", r"there is no figure 'tiny\.absent'"),
    ("{{ parameter('tiny.m') }}", "no parameter 'm'"),
    ("{{ nothing }}", "nothing"),
    ("{{ value('tiny.slope') | wrong }}", r"summary\.md line 1: .*wrong"),
    ("{% if %}", r"sections/summary\.md line 1"),
    ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ("[away](#nowhere)", "#nowhere, which does not exist"),
    ("[away](missing.html)", "missing.html"),
    (r"$\foo$", r"unknown command \\foo"),
    (r"$\frac{1}{$", "cannot be read"),
])
def test_what_is_wrong_in_the_prose_breaks_the_build(world, words, match):
    world.run()
    world.section("summary", words)
    with pytest.raises(UserError, match=match) as error:
        world.build()
    assert "\n" not in str(error.value)
    assert not world.out.exists()


def test_stale_run_breaks_the_build_and_marks_a_draft(world, tmp_path):
    world.run()
    world.build()
    (tmp_path / "tiny.py").write_text("x = 2\n")
    world.out.unlink()
    with pytest.raises(UserError, match=r"tiny: its sources changed .*`mambabyte sweep tiny`"):
        world.build()
    assert not world.out.exists()
    assert "out of date" in world.build(draft=True)
    world.run("tiny-2")
    assert "out of date" not in world.build()


def test_study_without_a_run_breaks_the_build_and_marks_a_draft(world):
    with pytest.raises(UserError, match="tiny: it has not been run: run `mambabyte sweep tiny`"):
        world.build()
    page = world.build(draft=True)
    assert "[missing: tiny.slope]" in page
    assert "No finished run" in page


def test_a_draft_computes_and_links_where_a_study_is_missing(world):
    world.section("summary", "{{ (value('tiny.slope') / value('tiny.peak')) | fixed(1) }} "
                  "{{ 1000 * value('tiny.slope') - 1 }} {{ -value('tiny.slope') }} "
                  "{% if value('tiny.slope') > 1 %}much{% endif %} [see](#tiny-figure-times)")
    page = world.build(draft=True)
    assert page.count("[missing: tiny.slope]") >= 3
    assert "much" not in page
    world.run()
    world.section("summary", "[see](#tiny-figure-absent)")
    with pytest.raises(UserError, match="#tiny-figure-absent, which does not exist"):
        world.build()


def test_full_profile_speaks_before_quick_and_newer_before_older(world):
    def slope(value):
        return {"values": {"slope": {"value": value}}}

    world.run("tiny-1", **slope(1))
    world.run("tiny-2", **slope(2), provenance={**PROVENANCE, "date": "2026-02-02"})
    assert "It is 2 ms" in world.build()
    world.run("tiny-3", **slope(3), profile="full")
    assert "It is 3 ms" in world.build()
    world.run("tiny-4", **slope(4), profile="", parameters={"n": 9})
    page = world.build()
    assert "It is 3 ms" in page
    assert "Runs with other parameters" in page
    assert "tiny-4" in page


def test_missing_configuration_is_a_clear_error(world):
    world.run()
    world.config('front = ["absent"]')
    with pytest.raises(UserError, match="names the section 'absent'"):
        world.build()
    world.config("colour = 1")
    with pytest.raises(UserError, match="colour"):
        world.build()
    (world.prose / "report.toml").unlink()
    with pytest.raises(UserError, match="there is no"):
        world.build()


# --- the page ---------------------------------------------------------------------------------

def test_same_input_same_bytes(world):
    world.run()
    world.run("tiny-2", status="failed", error="boom", parameters={"n": 4})
    first = world.build()
    assert first == world.build()
    assert len(first) > 5000


def test_every_figure_has_words_and_data(world):
    world.run()
    page = world.build()
    figure = re.search(r'<figure id="tiny-figure-times">.*?</figure>', page, re.S)[0]
    assert 'role="img"' in figure
    assert re.search(r"<title [^>]*>Time over length</title>", figure)
    assert re.search(r"<desc [^>]*>A rising line.</desc>", figure)
    assert "<figcaption>It grows.</figcaption>" in figure
    assert "Data of this figure (2 rows)" in figure
    assert '<th scope="col"' in figure
    assert "not measured" in figure
    assert ">nan<" in figure


def test_prose_places_figures_once(world):
    world.run()
    world.section("tiny", "Before.\n\n{{ figure('tiny.times') }}\n\nAfter.")
    page = world.build()
    assert page.count('<figure id="tiny-figure-times">') == 1
    assert page.index("Before.") < page.index("<figure") < page.index("After.")


def test_page_loads_nothing(world):
    world.run()
    page = world.build()
    assert not re.search(r"<(link|iframe|object|embed|base)\b", page)
    assert not re.search(r"\b(src|srcset|poster)=", page)
    assert "@import" not in page
    assert "url(http" not in page
    assert "default-src 'none'" in page


def test_failed_runs_are_shown_as_failed(world):
    world.run()
    world.run("tiny-2", status="failed", error="ValueError: boom", parameters={"n": 4}, values={},
              tables=[], figures=[])
    page = world.build()
    failed = page[page.index('id="failed-runs"'):]
    assert "ValueError: boom" in failed
    assert "tiny-2" in failed
    # Once the same parameters have run well, the failure is no news.
    world.run("tiny-3", parameters={"n": 4})
    assert 'id="failed-runs"' not in world.build()


def test_failed_headline_says_so(world):
    world.run(status="failed", error="ValueError: boom")
    with pytest.raises(UserError, match=r"tiny-1 failed \(ValueError: boom\): run `mambabyte"):
        world.build()


def test_ledger_is_a_run_whose_tables_can_be_filtered(world):
    world.run()
    world.section("tiny", "Words.")
    write_run(world.runs, "claims-1", study="claims")
    page = world.build()
    ledger = page[page.index('<section id="claims"'):]
    assert '<table class="ledger">' in ledger
    assert '<table class="ledger">' not in page[:page.index('<section id="claims"')]


def test_records_are_marked_with_their_machine(world):
    machine = {"cpu": "Server CPU", "gpus": [{"name": "NVIDIA H200", "memory_bytes": 1}]}
    folder = world.run("tiny-1", provenance={**PROVENANCE, "machine": machine})
    write_record_file(folder, "h200-tiny", title="On a GPU", about="The same, faster.",
                      folder=world.measurements)
    (folder / "run.json").unlink()
    world.run("tiny-2")
    world.section("summary", "{{ record('h200-tiny.slope') | sig(2) }} {{ value('tiny.slope') }}")
    page = world.build()
    record = re.search(r'<section class="record" id="record-h200-tiny">.*?</section>', page,
                       re.S)[0]
    assert "measured on NVIDIA H200" in record
    assert 'id="h200-tiny-figure-times"' in record
    assert "0.51 0.5123" in page
    assert page.count("<h3 id=\"machine-") == 2


def test_record_keeps_nan_and_not_measured_apart(tmp_path):
    folder = write_run(tmp_path, "tiny-1")
    path = write_record_file(folder, "r", title="t", about="a", folder=tmp_path / "m")
    frame = load_record(path).run.tables["times"].frame
    assert math.isnan(frame["time, ms"][1])
    assert frame["energy, J"][0] is None
    json.loads(path.read_text(), parse_constant=pytest.fail)  # strict JSON


@pytest.mark.parametrize(("change", "match"), [
    (lambda d: d["provenance"].pop("machine"), "does not say its machine"),
    (lambda d: d.update(format=7), "format 7"),
    (lambda d: d["tables"][0]["rows"].append([1]), "not 3 cells"),
    (lambda d: d.pop("title"), "not a measurement record"),
    (lambda d: d["figures"][0].update(name='"><script>'), "figure name"),
])
def test_bad_record_is_a_clear_error(tmp_path, change, match):
    folder = write_run(tmp_path, "tiny-1")
    path = write_record_file(folder, "r", title="t", about="a", folder=tmp_path / "m")
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=match):
        load_records(tmp_path / "m")


def test_records_of_the_project_can_be_read():
    load_records()


def test_report_imports_neither_torch_nor_a_study(world):
    world.run()
    code = (
        "import sys; from analysis.report import build_report\n"
        "from analysis.studies import STUDIES\n"
        "try: build_report(sys.argv[1], sys.argv[2], draft=True)\n"
        "finally: print(sorted({'torch', 'matplotlib', 'papermill',"
        " *(s.module for s in STUDIES.values())} & sys.modules.keys()))")
    run = subprocess.run([sys.executable, "-c", code, str(world.runs), str(world.out)],
                         capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.stdout.strip() == "[]", run.stderr


# --- hostile strings --------------------------------------------------------------------------

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
    world.run()
    failed = world.run("tiny-2", status="failed", error="boom", parameters={"n": 4})
    world.section("tiny", "Best: {{ value('tiny.best') }} end.")
    harmless = Elements(world.build()).found

    change(world.runs / "tiny-1", {
        "values": {"slope": {"value": 0.5, "unit": evil, "about": evil},
                   "best": {"value": evil}, "joules": {"value": None}, "peak": {"value": 1}},
        "tables": [{"name": "times", "caption": evil}],
        "figures": [{"name": "times", "title": evil, "caption": evil, "alt": evil}],
        "parameters": {"n": evil},
        "provenance": {**PROVENANCE, "command": evil, "versions": {evil: evil},
                       "machine": {"cpu": evil, evil: evil, "gpus": [{"name": evil}]}},
    })
    cell = evil.encode("utf-8", "replace").decode()  # Parquet itself refuses lone surrogates
    write_frame(world.runs / "tiny-1" / "tables" / "times.parquet",
                pd.DataFrame({"length, bytes": [1, 2], f"a {cell}": [cell, "b"]}))
    change(failed, {"error": evil, "parameters": {evil: evil}, "provenance": {"date": evil}})
    page = world.build()
    found = Elements(page).found
    assert {tag for tag, _ in found} <= {tag for tag, _ in harmless}
    assert [tag for tag, _ in found].count("script") == 1
    assert not [a for _, a in found if any(k.startswith("on") for k in a)]
    # Links go where the harmless page's go, or to the parts that a failed run adds.
    extra = {a.get("href") for _, a in found} - {a.get("href") for _, a in harmless}
    assert all(link.startswith("#") for link in extra)
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200e\u200f\x00-\x08\x0b-\x1f]", page)
    assert page.encode("utf-8")
    assert page.rstrip().endswith("</html>")


def change(folder: Path, entries: dict) -> None:
    write_record(folder, {**json.loads((folder / "run.json").read_text()), **entries})


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


def test_page_knows_every_colour_of_the_house():
    house = {plots.BLUE, plots.VERMILION, plots.GREEN, plots.PURPLE, plots.ORANGE, plots.SKY,
             plots.BLACK, plots.INK, plots.MUTED, plots.GRID, plots.PAPER, plots.PANEL,
             *(plots.look(i)["color"] for i in range(7))}
    assert {c.lower().replace("#", "") for c in house} == {c.replace("#", "") for c in THEME}
    css = (ROOT / "analysis" / "templates" / "page.css").read_text()
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
    assert 'href="appendices/tiny-1.html"' in world.build()
    other = world.run("tiny-2", parameters={"n": 5}, profile="")
    (other / "notebook.ipynb").write_text('{"cells": []}')
    assert '<a href="appendices/tiny-2.html">tiny-2</a>' in world.build()
    appendix = (world.out.parent / "appendices" / "tiny-1.html").read_text()
    assert "default-src 'none'" in appendix
    assert "script" not in appendix.replace("script-src", "")
    check_page(appendix, [])
