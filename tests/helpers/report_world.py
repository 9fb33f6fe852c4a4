"""A report about one small study, for the tests of what is built from it."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd

from analysis.report import build_report
from analysis.runs.folders import write_record
from analysis.runs.frames import write_frame
from analysis.studies import Study

SVG = ('<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
       'viewBox="0 0 500 300"><defs><clipPath id="p"><rect width="5" height="5"/></clipPath>'
       '<path id="m" d="M0 0L1 1"/></defs><g clip-path="url(#p)">'
       '<use xlink:href="#m" style="fill: #0072b2; stroke: #22272e"/></g><text>ms</text></svg>')
PROVENANCE = {
    "date": "2026-01-02T03:04:05+00:00", "commit": "0123456789ab", "command": "mambabyte sweep",
    "versions": {"python": "3.11", "torch": "2.13"},
    "machine": {"cpu": "Test CPU", "cpu_count": 2, "memory_bytes": 2**34, "gpus": []},
}


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


class World:
    """Runs, prose and registry of a report about one study, below a folder."""

    def __init__(self, root: Path) -> None:
        self.runs, self.prose = root / "runs", root / "prose"
        self.measurements, self.out = root / "measurements", root / "out" / "report.html"
        (self.prose / "sections").mkdir(parents=True)
        (root / "tiny.py").write_text("x = 1\n")
        (root / "tiny.ipynb").write_text('{"cells": []}')
        self.study = Study("tiny", "Tiny", "Is it small?", root / "tiny.ipynb", "tiny", root)
        self.config('front = ["summary"]')
        self.section("summary", "It is {{ value('tiny.slope') | sig(2) }} ms.")

    def config(self, extra: str) -> None:
        (self.prose / "report.toml").write_text(f'title = "Report"\n{extra}\n')

    def section(self, name: str, words: str) -> None:
        (self.prose / "sections" / f"{name}.md").write_text(words)

    def run(self, name: str = "tiny-1", **changes) -> Path:
        return write_run(self.runs, name, **{"sources": self.study.sources_digest(), **changes})

    def build(self, draft: bool = False) -> str:
        path = build_report(self.runs, self.out, prose=self.prose, draft=draft,
                            measurements=self.measurements, registry={"tiny": self.study})
        return path.read_text(encoding="utf-8")
