"""A report about one small study, for the tests of what is built from it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pandas as pd

from analysis.report import build_report
from analysis.runs.folders import RECORD, Run, Value, load_run, tables_of
from analysis.runs.folders import write_record as write_record_json
from analysis.runs.folders import write_run as write_run_folder
from analysis.runs.records import write_record_folder
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


def update_record(folder: Path, **entries) -> None:
    """Entries of a run.json as they are not written by us."""
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    write_record_json(folder, {**record, **entries})


def write_run(root: Path, name: str, study: str = "tiny", **changes) -> Path:
    """A finished run of a study with one figure, one table and four values. ``changes`` are fields
    of the Run, or entries of run.json where it has no such field."""
    frame = pd.DataFrame({"length, bytes": [1, 2], "time, ms": [0.5, math.nan],
                          "energy, J": pd.Series([None, 2.0], dtype=object)})
    run = Run(
        study, {"n": 3},
        {"slope": Value(0.51234, "ms/byte", "fitted"), "joules": Value(None, "J"),
         "best": Value("chunked"), "peak": Value(3 * 2**20, "B")},
        tables_of({"times": ("Times.", frame), "lengths": ("", frame)}), {"times": "lengths"},
        PROVENANCE, run_id=name, profile="quick", seconds=1.5)
    folder = write_run_folder(run, root / name)
    if changes:
        update_record(folder, **changes)
    return folder


def write_record(world: World, run: Path, name: str) -> Path:
    """The run in a folder as a record of the world."""
    found = replace(load_run(run), title="A record", about="What it is.")
    return write_record_folder(found, world.records / found.study / name)


class World:
    """Runs, prose and registry of a report about one study, below a folder."""

    def __init__(self, root: Path) -> None:
        self.runs, self.prose = root / "runs", root / "prose"
        self.records, self.out = root / "records", root / "out" / "report.html"
        self.evidence = root / "out" / "report-evidence"
        (self.prose / "sections").mkdir(parents=True)
        self.study = Study("tiny", "Tiny", "Is it small?", root / "tiny.ipynb",
                           "tests.helpers.tiny", root)
        self.notebook("x = 1")
        self.config('article = ["summary"]')
        self.section("summary", "It is {{ value('tiny.slope') | sig(2) }} ms.")

    def notebook(self, code: str) -> None:
        """The study's sources: other code makes its runs stale."""
        cell = {"cell_type": "code", "source": code, "metadata": {}, "outputs": []}
        self.study.notebook.write_text(json.dumps({"cells": [cell]}))

    def config(self, extra: str) -> None:
        (self.prose / "report.toml").write_text(f'title = "Report"\n{extra}\n')

    def section(self, name: str, words: str) -> None:
        (self.prose / "sections" / f"{name}.md").write_text(words)

    def run(self, name: str = "tiny-1", **changes) -> Path:
        return write_run(self.runs, name, **{"sources": self.study.sources_digest(), **changes})

    def build(self, draft: bool = False) -> str:
        """The article."""
        path = build_report(self.runs, self.out, prose=self.prose, draft=draft,
                            records_root=self.records, registry={"tiny": self.study})
        return path.read_text(encoding="utf-8")

    def page(self, name: str = "tiny", draft: bool = False) -> str:
        """A page of the evidence, after building."""
        self.build(draft)
        return (self.evidence / f"{name}.html").read_text(encoding="utf-8")

    def pages(self) -> dict[str, str]:
        """Every page, after building, by name; the article is "report"."""
        self.build()
        return {path.stem: path.read_text(encoding="utf-8")
                for path in (self.out, *sorted(self.evidence.glob("*.html")))}
