"""The report in a real browser: it runs clean, loads nothing, fits every screen, every link works.

Needs Chromium (``chromium``, ``google-chrome`` or the variable CHROME); skipped where there is
none. The browser is driven over a pipe with its own protocol, so nothing else is needed.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest

from analysis import plots
from analysis.report import build_report
from analysis.results import Recorder, update_record
from analysis.studies import Study

CHROME = os.environ.get("CHROME") or next(filter(None, map(shutil.which, (
    "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)
pytestmark = pytest.mark.skipif(
    CHROME is None, reason="no Chromium found: install one or set CHROME to its path")

WIDTHS = (360, 1280)
THEMES = ("light", "dark")
LONG = "averyveryverylongwordthatnobodywouldbreak" * 8


class Browser:
    """A headless Chromium with one page, spoken to in its DevTools protocol over two pipes."""

    def __init__(self, profile: Path) -> None:
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()

        def hand_over() -> None:  # the protocol wants descriptors 3 and 4
            low = os.dup(to_browser), os.dup(from_browser)
            os.dup2(low[0], 3)
            os.dup2(low[1], 4)

        self._process = subprocess.Popen(
            [CHROME, "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu",
             "--disable-dev-shm-usage", "--hide-scrollbars", f"--user-data-dir={profile}"],
            preexec_fn=hand_over, close_fds=False, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL)
        os.close(to_browser)
        os.close(from_browser)
        self._number, self._buffer = 0, b""
        self.events: list[dict] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = None
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters) -> dict:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if getattr(self, "_session", None):
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def open(self, path: Path, width: int, theme: str = "light", scripts: bool = True) -> None:
        self.events.clear()
        self.ask("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=800,
                 deviceScaleFactor=1, mobile=width < 600)
        self.ask("Emulation.setEmulatedMedia", media="",
                 features=[{"name": "prefers-color-scheme", "value": theme}])
        self.ask("Page.navigate", url=path.as_uri())
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self._next())

    def run(self, script: str):
        answer = self.ask("Runtime.evaluate", expression=script, returnByValue=True,
                          awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, path: Path, full: bool = True) -> None:
        data = self.ask("Page.captureScreenshot", captureBeyondViewport=full)["data"]
        path.write_bytes(base64.b64decode(data))

    def complaints(self) -> list[str]:
        """Console messages, exceptions and log entries (a blocked load among them)."""
        return [json.dumps(e) for e in self.events if e.get("method") in (
            "Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")]

    def requests(self) -> list[str]:
        return [e["params"]["request"]["url"] for e in self.events
                if e.get("method") == "Network.requestWillBeSent"]

    def close(self) -> None:
        os.close(self._write)  # the browser ends with its pipe
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read)

    def _next(self) -> dict:
        while b"\0" not in self._buffer:
            block = os.read(self._read, 1 << 16)
            assert block, "the browser ended"
            self._buffer += block
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """A report with all that one can hold: prose, figures, ledger, failed runs, an appendix."""
    root = tmp_path_factory.mktemp("report")
    (root / "tiny.py").write_text("")
    notebook = {"cells": [
        {"cell_type": "markdown", "source": "# Notebook\n\n$$\nh_t = a_t h_{t-1}\n$$"},
        {"cell_type": "code", "source": "print('x' * 400)", "metadata": {}, "outputs": [
            {"output_type": "stream", "text": "x" * 400}]}]}
    (root / "tiny.ipynb").write_text(json.dumps(notebook))
    study = Study("tiny", "Tiny", "Is it small?", root / "tiny.ipynb", "tiny", root)
    wide = pd.DataFrame({f"column {i}, ms": [float(i)] * 3 for i in range(20)})
    for name, number in (("tiny-1", 3), ("tiny-2", 4)):
        figure, axes = plots.new_figure()
        axes.plot([1, 2, 3], [number, 2, 3])
        plots.label_axes(axes, "length, bytes", "time, ms")
        recorder = Recorder("tiny", {"n": number, "word": LONG}, str(root / "runs" / name))
        recorder.value("best", LONG)
        recorder.table("wide", wide, caption=f"Wide. {LONG}")
        recorder.figure("time", figure, title=LONG, caption=LONG, alt="A line.", data=wide)
        (recorder.finish() / "notebook.ipynb").write_text(json.dumps(notebook))
        update_record(root / "runs" / name, sources=study.sources_digest(), run_id=name)
    update_record(root / "runs" / "tiny-2", status="failed", error=LONG)
    claims = Recorder("claims", {}, str(root / "runs" / "claims-1"))
    claims.table("claims", pd.DataFrame({
        "claim": ["fits in 40 GB", "overflows at 50", "is exact"],
        "ours": pd.Series([121.0, 3.5, None], dtype=object),
        "verdict": ["holds", "does not hold", "not decidable"]}), caption="Claims.")
    claims.finish()
    sections = root / "prose" / "sections"
    sections.mkdir(parents=True)
    (sections / "summary.md").write_text(
        f"# Found\n\n$$\n{' + '.join(['x_{i}^2'] * 40)}\n$$\n\n"
        f"[evidence](#tiny-figure-time) {LONG}\n\n"
        f"| a | b |\n|---|---|\n| {LONG} | {LONG} |\n\n```\n{LONG}\n```\n")
    (root / "prose" / "report.toml").write_text(
        f'title = "A title with {LONG}"\nfront = ["summary"]\n')
    return build_report(root / "runs", root / "out" / "report.html", prose=root / "prose",
                        measurements=root / "none", registry={"tiny": study})


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def pages(report) -> list[Path]:
    return [report, *sorted((report.parent / "appendices").glob("*.html"))]


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_runs_clean_loads_nothing_and_fits(browser, pages, width, theme):
    assert len(pages) == 3
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
        assert all((page.parent / name).is_file() for name in files)


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


def test_readable_without_scripts(browser, report):
    browser.open(report, 1280, scripts=False)
    rows = browser.ask("Runtime.evaluate", returnByValue=True,
                       expression="document.querySelectorAll('table.ledger tbody tr').length")
    browser.ask("Emulation.setScriptExecutionDisabled", value=False)
    assert rows["result"].get("value", 3) == 3
    assert browser.run("document.querySelectorAll('.filter').length") == 0
    assert browser.run("document.querySelectorAll('table.ledger tbody tr').length") == 3


def test_ledger_filters_and_sorts(browser, report):
    browser.open(report, 1280)
    assert browser.run("""(() => {
        const input = document.querySelector(".filter input");
        input.value = "hold not";
        input.dispatchEvent(new Event("input"));
        return [...document.querySelectorAll("table.ledger tbody tr")]
            .filter((row) => !row.hidden).map((row) => row.cells[0].textContent);
    })()""") == ["overflows at 50"]
    order = """(() => {
        const table = document.querySelector("table.ledger");
        table.tHead.rows[0].cells[1].click();
        return [...table.tBodies[0].rows].map((row) => row.cells[1].textContent);
    })()"""
    assert browser.run(order) == ["3.5", "121.0", "not measured"]
    assert browser.run(order) == ["not measured", "121.0", "3.5"]


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


@pytest.mark.parametrize("theme", THEMES)
def test_accessibility_checker_finds_nothing_serious(browser, pages, theme):
    package = importlib.util.find_spec("axe_core_python")
    if package is None or not package.submodule_search_locations:
        pytest.skip("axe-core-python is not installed")
    axe = Path(package.submodule_search_locations[0], "axe.min.js").read_text(encoding="utf-8")
    for page in pages:
        browser.open(page, 1280, theme)
        browser.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        browser.run(axe + "; 0")
        found = browser.run("""axe.run(document, {resultTypes: ["violations"]}).then((r) =>
            r.violations.filter((v) => ["serious", "critical"].includes(v.impact)).map((v) =>
                v.id + ": " + v.nodes.slice(0, 3).map((n) => n.html.slice(0, 150)).join(" | ")))""")
        assert found == []


def test_prints_on_paper(browser, report):
    browser.open(report, 1280)
    pdf = base64.b64decode(browser.ask("Page.printToPDF")["data"])
    assert pdf.startswith(b"%PDF")
    assert len(pdf) > 10_000
