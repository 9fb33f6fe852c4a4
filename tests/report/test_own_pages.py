"""The project's own report in a real browser: every page fits, drawings can be read, answers stand
early. Needs Chromium, as test_browser.py does."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

from analysis.plots import svg as plots
from analysis.report import build_report
from analysis.report.parts import drawings
from analysis.runs.folders import Run, tables_of, write_run
from analysis.runs.records import load_records
from analysis.studies.claims.compute import count
from analysis.studies.claims.ledger import VERDICTS, load_ledger
from analysis.studies.claims.tables import TABLES
from tests.helpers.chromium import NEEDED, OPEN_ALL, accessibility

pytestmark = NEEDED
# Rows and curves are alike: axe takes minutes for all of them.
THIN = """document.querySelectorAll("tbody").forEach((body) => {
        [...body.rows].slice(3).forEach((row) => row.remove()); });
    document.querySelectorAll("table.claims").forEach((table) => {
        [...table.tBodies].slice(9).forEach((body) => body.remove()); });
    document.querySelectorAll("svg.plot > g").forEach((g) => g.remove());"""


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    return projects_own(tmp_path_factory.mktemp("real"))


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """The same without what a phone alone shows, every figure's second drawing, and without the
    search for its layout, which is half of a drawing's time."""
    root = tmp_path_factory.mktemp("desk")
    nothing = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 324 220"/>'
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))  # which would keep these drawings

        def wide_alone(figure: Figure, name: str) -> tuple[str, str]:
            figure.set_layout_engine("none")
            return plots.svg(figure, name), nothing

        patch.setattr(drawings, "wide_and_narrow", wide_alone)
        patch.setattr(drawings, "FEWEST", math.inf)  # other processes would draw both
        return projects_own(root)


def projects_own(root: Path) -> Path:
    """The project's own sections, records and claims; no study has run, the numbers are gaps."""
    ledger = pd.DataFrame([
        {"claim": c.claim, "verdict": VERDICTS[i % len(VERDICTS)], "theirs": c.theirs,
         "ours": c.theirs, "reason": c.note or c.claim, "source": "computed here",
         "document": c.document, "where": c.where, "kind": c.kind, "id": c.id,
         "cannot fail": c.cannot_fail}
        for i, c in enumerate(load_ledger().claims)])
    counts = count(ledger)
    tables = {name: (caption, ledger if name == "ledger" else counts)
              for name, caption in TABLES.items()}
    write_run(Run("claims", {}, tables=tables_of({**tables, "counts": ("", counts)}),
                  figures={"verdicts": "counts"}), root / "runs" / "claims-1")
    return build_report(root / "runs", root / "out" / "report.html", draft=True)


def own_pages(article: Path) -> list[Path]:
    return [article, *sorted((article.parent / "report-evidence").glob("*.html"))]


# Drawings that are cut, and words of theirs that are too small to be read.
DRAWINGS = """(() => {
    const cut = [], small = [];
    for (const svg of document.querySelectorAll("svg.plot")) {
        const box = svg.getBoundingClientRect(), drawing = svg.closest(".drawing");
        if (box.width === 0) continue;
        const scale = box.width / svg.viewBox.baseVal.width;
        if (drawing.scrollWidth > drawing.clientWidth + 1) cut.push(drawing.parentElement.id);
        for (const text of svg.querySelectorAll("text")) {  // 7 px: exponents
            const size = parseFloat(text.style.fontSize);
            if (size > 7 && size * scale < 7.9) small.push(text.textContent);
        }
    }
    return [cut, small.slice(0, 5)];
})()"""


@pytest.mark.parametrize(("width", "theme"), [
    (360, "dark"), (768, "light"), (1280, "light")])
@pytest.mark.long
def test_the_projects_own_pages_fit_and_run_clean(browser, real, width, theme):
    for page in own_pages(real):
        browser.open(page, width, theme)
        assert browser.run(DRAWINGS) == [[], []], page.name
        browser.run(OPEN_ALL)
        assert browser.run("document.documentElement.scrollWidth - window.innerWidth") <= 0
        assert browser.run("""[...document.querySelectorAll("table.claims")].filter((table) =>
            table.scrollWidth > table.parentElement.clientWidth + 1).length""") == 0
        assert browser.complaints() == []
        assert browser.requests() == [page.as_uri()]
        if width != 768 and page.stem in ("report", "claims", "throughput"):
            browser.run(THIN)
            assert accessibility(browser) == [], page.name


def test_the_projects_report_is_an_article_with_evidence_behind_it(browser, desk):
    sizes = {page.name: page.stat().st_size for page in own_pages(desk)}
    assert sizes.pop("report.html") < 2e6
    assert all(size < 1.5e6 for size in sizes.values()), sizes
    browser.open(desk, 1280)
    assert 8 <= browser.run("document.querySelectorAll('figure').length") <= 12
    assert browser.run("document.querySelectorAll('h2.finding').length") == browser.run(
        "document.querySelectorAll('figure').length")
    # The first figure is on the first screen, the four answers on the first three.
    assert browser.run("document.querySelector('figure svg').getBoundingClientRect().bottom") < 800
    for question in ("Does it overflow?", "Will it fit?", "Which mixer?", "What does a joule buy?"):
        words, bottom = browser.run("""((question) => {
            const found = [...document.querySelectorAll("p > strong")].find((strong) =>
                strong.textContent === question).parentElement;
            return [found.textContent, found.getBoundingClientRect().bottom];
        })""" + f"({question!r})")
        assert len(re.findall(r"\d", words)) > 5, question
        assert "missing" not in words, question
        assert bottom < 3 * 800, question
    names = browser.run("[...document.querySelectorAll('h1, h2, h3')].map((h) => h.textContent)")
    assert len(names) == len(set(names))
    shown = "".join(page.read_text(encoding="utf-8") for page in own_pages(desk))
    assert [shown.count(f'id="record-{name}"') for name in load_records()] == [
        1 for _ in load_records()]


def test_what_can_be_tried_says_what_the_table_says(browser, desk):
    browser.open(desk.parent / "report-evidence" / "overflow.html", 1280)
    said = "document.querySelector('.labs [role=status]').textContent"
    words = browser.run(said)
    assert words.startswith("Exponent 32. float16 (11.09): overflows; float32 and bfloat16 "
                            "(88.72): holds.")
    browser.run("""(() => { const input = document.querySelectorAll(".labs input")[1];
        input.value = input.max;
        input.dispatchEvent(new Event("input", {bubbles: true})); })()""")
    assert "float32 and bfloat16 (88.72): overflows" in browser.run(said)
    cell = browser.run("""[...document.querySelectorAll("#labs-table-chunk tbody tr")].find((row) =>
        row.cells[0].textContent === "32").cells""" + "[17].textContent")
    assert browser.run(said).endswith(f"gradients: {cell}.")
    browser.open(desk.parent / "report-evidence" / "overflow.html", 1280, scripts=False)
    browser.ask("Emulation.setScriptExecutionDisabled", value=False)
    assert browser.run("document.querySelectorAll('.labs').length") == browser.run(
        "document.querySelectorAll('.labs:empty').length") == 1
