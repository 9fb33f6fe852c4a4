"""The report in a real browser: it runs clean, loads nothing, fits every screen, every link works.

Needs Chromium (``chromium``, ``google-chrome`` or the variable CHROME); skipped where there is
none.
"""

from __future__ import annotations

import base64
import json
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest

from analysis.report import build_report
from analysis.runs.folders import Run, Value, tables_of, write_run
from analysis.studies import Study
from tests.helpers.chromium import NEEDED, OPEN_ALL, accessibility
from tests.helpers.report_world import update_record
from tests.report.test_report_hostile import HOSTILE, harmless_pages, hostile_pages

pytestmark = NEEDED

WIDTHS = (360, 1280)
THEMES = ("light", "dark")
# A notebook may begin with any heading, or have none: it is shown as it was written.
APPENDIX_STYLE = ("page-has-heading-one", "heading-order")
LONG = "averyveryverylongwordthatnobodywouldbreak" * 8


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """A report with all that one can hold: prose, figures, ledger, failed runs, an appendix."""
    root = tmp_path_factory.mktemp("report")
    notebook = {"cells": [
        {"cell_type": "markdown", "source": "# Notebook\n\n$$\nh_t = a_t h_{t-1}\n$$"},
        {"cell_type": "code", "source": "print('x' * 400)", "metadata": {}, "outputs": [
            {"output_type": "stream", "text": "x" * 400}]}]}
    (root / "tiny.ipynb").write_text(json.dumps(notebook))
    study = Study("tiny", "Tiny", "Is it small?", root / "tiny.ipynb",
                  "tests.helpers.tiny", root)
    wide = pd.DataFrame({f"column {i}, ms": [float(i)] * 3 for i in range(20)})
    lengths = pd.DataFrame({"length, bytes": [1, 2, 3], "time, ms": [3.0, 2.0, 3.0]})
    for name, number in (("tiny-1", 3), ("tiny-2", 4)):
        folder = write_run(Run(
            "tiny", {"n": number, "words": LONG}, {"best": Value(LONG)},
            tables_of({"wide": (f"Wide. {LONG}", wide), "lengths": ("", lengths)}),
            {"times": "lengths"}, run_id=name, sources=study.sources_digest()),
            root / "runs" / name)
        (folder / "notebook.ipynb").write_text(json.dumps(notebook))
    update_record(root / "runs" / "tiny-2", status="failed", error=LONG)
    claims = pd.DataFrame({
        "claim": ["fits in 40 GB", "overflows at 50", "is exact"],
        "ours": pd.Series([121.0, 3.5, None], dtype=object),
        "verdict": ["holds", "does not hold", "not decidable"],
        "kind": ["memory", "memory", "numerical"], "reason": [LONG, "It does.", "No run."],
        "id": ["fits", "overflows", "exact"]})
    write_run(Run("claims", {}, tables=tables_of({"claims": ("Claims.", claims)})),
              root / "runs" / "claims-1")
    sections = root / "prose" / "sections"
    sections.mkdir(parents=True)
    (sections / "summary.md").write_text(
        f"# Found\n\n$$\n{' + '.join(['x_{i}^2'] * 40)}\n$$\n\n"
        "{% call finding('tiny.times') %}It grows: " + f"{LONG}" + "{% endcall %}\n\n"
        f"[evidence](#tiny-figure-times) {LONG}\n\n"
        f"| a | b |\n|---|---|\n| {LONG} | {LONG} |\n\n```\n{LONG}\n```\n")
    (sections / "tiny.md").write_text(
        "{{ figure('tiny.times') }}\n\n{{ table('tiny.wide') }}\n\n# On your machine\n\nHere.")
    (sections / "claims.md").write_text("{{ table('claims.claims') }}")
    (root / "prose" / "report.toml").write_text(
        f'title = "A title with {LONG}"\narticle = ["summary"]\n')
    return build_report(root / "runs", root / "out" / "report.html", prose=root / "prose",
                        records_root=root / "none", registry={"tiny": study})


@pytest.fixture(scope="module")
def pages(report) -> list[Path]:
    return [report, *sorted((report.parent / "report-evidence").glob("*.html"))]


@pytest.fixture(scope="module")
def claims_page(report) -> Path:
    return report.parent / "report-evidence" / "claims.html"


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_runs_clean_loads_nothing_and_fits(browser, pages, width, theme):
    assert [page.stem for page in pages] == ["report", "claims", "machines", "notebook-tiny-1",
                                             "notebook-tiny-2", "tiny"]
    for page in pages:
        browser.open(page, width, theme)
        # Nothing may be wider than the screen, folded parts included.
        overflow = browser.run("""(() => {
            document.querySelectorAll("details").forEach((d) => { d.open = true; });
            return document.documentElement.scrollWidth - window.innerWidth;
        })()""")
        assert overflow <= 0
        assert browser.complaints() == []
        assert browser.requests() == [page.as_uri()]


def test_links_and_anchors_resolve(browser, pages):
    for page in pages:
        browser.open(page, 1280)
        assert browser.run("""[...document.querySelectorAll("a[href]")].filter((a) =>
            a.hash && a.pathname === location.pathname && !document.getElementById(
                decodeURIComponent(a.hash.slice(1)))).map((a) => a.href)""") == []
        files = browser.run("""[...document.querySelectorAll("a[href]")].map((a) =>
            a.getAttribute("href")).filter((href) => !href.startsWith("#"))""")
        assert all((page.parent / name.partition("#")[0]).is_file() for name in files)


def test_dark_is_dark_and_figures_follow(browser, report):
    def shades(theme: str) -> list[float]:
        browser.open(report, 1280, theme)
        return browser.run("""["body", "svg.plot text"].map((s) => {
            const style = getComputedStyle(document.querySelector(s));
            const colour = s === "body" ? style.backgroundColor : style.fill;
            return colour.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0) / 765;
        })""")
    assert shades("light") == [pytest.approx(1.0), pytest.approx(0.13, abs=0.08)]
    assert shades("dark") == [pytest.approx(0.09, abs=0.05), pytest.approx(0.9, abs=0.08)]


def test_readable_without_scripts(browser, claims_page):
    browser.open(claims_page, 1280, scripts=False)
    rows = browser.ask("Runtime.evaluate", returnByValue=True,
                       expression="document.querySelectorAll('table.ledger tbody').length")
    browser.ask("Emulation.setScriptExecutionDisabled", value=False)
    assert rows["result"].get("value", 3) == 3
    assert browser.run("document.querySelectorAll('.filter').length") == 0
    assert browser.run("document.querySelectorAll('table.ledger tbody').length") == 3
    assert "It does." in browser.run("document.querySelector('#claim-overflows').textContent")


SHOWN = """[...document.querySelectorAll("table.ledger tbody")]
    .filter((body) => !body.hidden).map((body) => body.rows[0].cells[0].textContent)"""


def test_ledger_filters_and_sorts(browser, claims_page):
    browser.open(claims_page, 1280)
    assert browser.run(f"""(() => {{
        const input = document.querySelector(".filter input");
        input.value = "hold not";
        input.dispatchEvent(new Event("input"));
        return {SHOWN};
    }})()""") == ["overflows at 50"]
    choose = """((place, value) => {
        const select = document.querySelectorAll(".filter select")[place];
        select.value = value;
        select.dispatchEvent(new Event("change"));
    })"""
    browser.open(claims_page, 1280)
    assert browser.run("""[...document.querySelectorAll(".filter select")].map((s) =>
        s.labels[0].firstChild.data.trim() + s.options.length)""") == ["verdict4", "kind3"]
    browser.run(f"{choose}(1, 'memory')")
    assert browser.run(SHOWN) == ["fits in 40 GB", "overflows at 50"]
    browser.run(f"{choose}(0, 'holds')")
    assert browser.run(SHOWN) == ["fits in 40 GB"]
    assert browser.run("document.querySelector('.filter [role=status]').textContent") == \
        "1 of 3 rows"
    # What is filtered is in the address: who opens it sees the same.
    assert browser.run("location.hash") == "#show?verdict=holds&kind=memory"
    assert browser.run(f"""new Promise((done) => {{
        window.addEventListener("hashchange", () => setTimeout(() => done({SHOWN}), 0));
        location.hash = "#show?words=hold+not&verdict=nothing";
    }})""") == ["overflows at 50"]
    browser.run("location.hash = '#%E0%A4%A'")  # not a name of anything
    order = """(() => {
        const table = document.querySelector("table.ledger");
        table.tHead.rows[0].cells[2].click();
        return [...table.tBodies].map((body) => body.rows[0].cells[2].textContent);
    })()"""
    assert browser.run(order) == ["3.5", "121", "not measured"]
    assert browser.run(order) == ["not measured", "121", "3.5"]


def test_parts_have_names_for_screen_readers(browser, pages):
    for page in pages:
        browser.open(page, 1280)
        assert browser.run("document.documentElement.lang") == "en"
        assert browser.run("document.title").strip()
        assert browser.run("""[...document.querySelectorAll("svg, img, .scroll")].filter((e) => {
            const label = e.getAttribute("aria-label") ?? e.getAttribute("alt")
                ?? (e.getAttribute("aria-labelledby") ?? "").split(" ").map((id) =>
                    document.getElementById(id)?.textContent ?? "").join("");
            return !label.trim();
        }).length""") == 0
        assert browser.run("""[...document.querySelectorAll("thead th, tbody th")].filter((th) =>
            !th.scope && !th.closest(".cell")).map((th) => th.outerHTML).slice(0, 3)""") in (
                [], ["<th>a</th>", "<th>b</th>"])
        levels = browser.run("""[...document.querySelectorAll("h1, h2, h3, h4, h5, h6")].map(
            (h) => Number(h.tagName[1]))""")
        assert levels[:1] in ([], [1])
        assert all(b - a <= 1 for a, b in pairwise(levels))


@pytest.mark.parametrize(("width", "theme"), [
    (360, "dark"), (1280, "light"), *(pytest.param(*other, marks=pytest.mark.long)
                                      for other in ((360, "light"), (1280, "dark")))])
def test_accessibility_checker_finds_nothing(browser, report, width, theme):
    browser.open(report, width, theme)
    assert accessibility(browser) == []


def test_accessibility_checker_finds_nothing_in_the_evidence(browser, pages):
    for page in pages[1:]:
        browser.open(page, 1280)
        style = APPENDIX_STYLE if page.stem.startswith("notebook") else ()
        assert [f for f in accessibility(browser) if not f.startswith(style)] == []


def test_contents_mark_the_section_that_is_read(browser, report):
    browser.open(report, 1280)
    assert browser.run("document.querySelector('nav [aria-current=page]').textContent") == \
        "The article"
    browser.run("document.querySelector('h2.finding').scrollIntoView()")
    assert browser.run("""new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(
        () => done(document.querySelector("nav [aria-current=true]").textContent))))""") == \
        "It grows"


def test_prints_on_paper(browser, pages):
    browser.open(pages[-1], 1280)
    pdf = base64.b64decode(browser.ask("Page.printToPDF")["data"])
    assert pdf.startswith(b"%PDF")
    assert len(pdf) > 5_000
    browser.ask("Emulation.setEmulatedMedia", media="print")
    shown = browser.run("""["details.here > .facts", ".drawing.narrow", "figure"].map(
        (s) => document.querySelector(s).checkVisibility({contentVisibilityAuto: true}))""")
    assert shown == [False, False, True]  # folded parts stay closed


@pytest.mark.parametrize("evil", [  # test_report_hostile.py has all of them every day
    evil if i % 4 == 0 else pytest.param(evil, marks=pytest.mark.long)
    for i, evil in enumerate(HOSTILE)], ids=range(len(HOSTILE)))
def test_hostile_strings_do_nothing_in_a_browser(browser, world, evil):
    count = """[...document.querySelectorAll("*")].map((e) => e.localName).filter((n) =>
        ["script", "img", "iframe", "object", "embed", "link", "style", "form"].includes(n))"""
    harmless_pages(world)
    pages = [world.out, world.evidence / "tiny.html", world.evidence / "claims.html"]
    harmless = []
    for page in pages:
        browser.open(page, 360)
        harmless.append(browser.run(count))
    hostile_pages(world, evil)
    for page, expected in zip(pages, harmless, strict=True):
        browser.open(page, 360)
        assert browser.run(count) == expected
        assert browser.run("""[...document.querySelectorAll("*")].some((e) =>
            [...e.attributes].some((a) => a.name.startsWith("on")))""") is False
        browser.run(OPEN_ALL)
        assert browser.run("document.documentElement.scrollWidth - window.innerWidth") <= 0
        assert browser.complaints() == []
        assert browser.requests() == [page.as_uri()]
