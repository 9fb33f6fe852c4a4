"""What other studies have recorded: run folders of this machine and records of others.

Only the files are read. A run whose sources have changed since is not evidence; which run speaks
for a study follows the report's rule: full before quick, then the newest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.results import ROOT, RUNS, Figure, Run, Table, Value, list_runs
from analysis.studies import STUDIES
from analysis.task_record import COLUMNS
from mambabyte.errors import UserError

MEASUREMENTS = ROOT / "data" / "measurements"
PROFILES = ("full", "quick")
_TASK_WORDS = {column: key for column, (key, factor) in COLUMNS.items() if factor == 1}
_WORDS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True)
class Source:
    """A number or a table and where it comes from."""

    what: Any
    name: str  # the run's identity or the record's name
    machine: str

    @property
    def text(self) -> str:
        return f"{self.name} ({self.machine})" if self.machine else self.name


@dataclass(frozen=True)
class Evidence:
    """Runs that are done and up to date, and records of other machines."""

    runs: tuple[Run, ...] = ()
    records: tuple[Run, ...] = ()
    stale: tuple[str, ...] = field(default=())  # studies whose only runs are out of date

    def value(
        self, study: str, *names: str, accelerator: bool = False,
        like: Mapping[str, Any] | None = None, most: str = "",
    ) -> Source | None:
        """The first of ``names`` that a run of ``study`` has measured; ``like`` are parameters that
        the run must have had, ``most`` the parameter by which the largest run speaks first."""
        runs = self._of(study, accelerator)
        if most:  # a stable sort: of two equal runs the one that the report's rule prefers
            runs = sorted(runs, key=lambda run: -float(run.parameters.get(most) or 0))
        for run in runs:
            if any(run.parameters.get(key) != value for key, value in (like or {}).items()):
                continue
            for name in names:
                found = run.values.get(name)
                if found is not None and found.value is not None:
                    return Source(found.value, _name(run), _machine(run))
        return None

    def table(self, study: str, name: str, accelerator: bool = False) -> Source | None:
        """A table of a run of ``study``, or the table behind a figure."""
        for run in self._of(study, accelerator):
            if name in run.tables:
                return Source(run.tables[name].frame, _name(run), _machine(run))
            if name in run.figures:
                return Source(run.figures[name].data, _name(run), _machine(run))
        return None

    def task(self, system: str) -> Source | None:
        """Rows of whole runs of ``system`` under the public task's rules, one a seed, in the words
        of ``mambabyte task``. A run that a fault of the program ended says nothing of the system.
        """
        for run in self.records:
            for table in run.tables.values():
                frame = table.frame.rename(columns=_TASK_WORDS)
                if not {"system", "seconds", "joules"} <= set(frame.columns):
                    continue
                if run.study == "task" and "runs" in run.tables and table.name != "runs":
                    continue  # means over seeds
                rows = frame[frame["system"] == system]
                if "failure" in rows:
                    rows = rows[~rows["failure"].fillna("").astype(str).str.startswith("crashed")]
                if len(rows):
                    return Source(rows, _name(run), _machine(run))
        return None

    def _of(self, study: str, accelerator: bool) -> list[Run]:
        mine = [r for r in (*self.runs, *self.records) if r.study == study]
        return [r for r in mine if _on_accelerator(r)] if accelerator else mine


def gather(runs_root: Path | str = "", measurements: Path | str = MEASUREMENTS) -> Evidence:
    """Reads the runs under ``runs_root`` ("" is the project's folder) and all records."""
    done = [r for r in list_runs(runs_root or RUNS)
            if r.status == "done" and r.study != "claims"]
    current = {name: study.sources_digest() for name, study in STUDIES.items()
               if name in {r.study for r in done}}
    fresh = [r for r in done if not r.sources or current.get(r.study, r.sources) == r.sources]
    fresh.sort(key=lambda r: str(r.provenance.get("date", "")), reverse=True)
    fresh.sort(key=lambda r: PROFILES.index(r.profile) if r.profile in PROFILES else len(PROFILES))
    stale = {r.study for r in done} - {r.study for r in fresh}
    records = sorted(load_records(measurements), key=lambda r: str(r.provenance.get("date", "")),
                     reverse=True)
    return Evidence(tuple(fresh), tuple(records), tuple(sorted(stale)))


def load_records(folder: Path | str) -> list[Run]:
    """Records of ``folder`` as runs; a file of another shape is passed over."""
    records = []
    for path in sorted(Path(folder).glob("*.json")):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path.name} cannot be read: {error}") from None
        if isinstance(data, dict) and isinstance(data.get("study"), str):
            records.append(_record(path, data))
        for part in data if isinstance(data, list) else [data]:  # what ``mambabyte task`` prints
            if isinstance(part, dict) and isinstance(part.get("runs"), list) and "system" in part:
                records.append(_record(path, {**part, "study": "task", "tables": {
                    "runs": part["runs"]}}))
    return records


def _record(path: Path, data: Mapping[str, Any]) -> Run:
    tables = data.get("tables", [])
    if isinstance(tables, dict):  # name -> list of rows
        frames = {name: pd.DataFrame(rows) for name, rows in tables.items()}
    else:
        frames = {t["name"]: _rows(t) for t in tables}
    return Run(
        folder=path, study=data["study"], parameters=dict(data.get("parameters", {})),
        values={n: Value(_decode(v["value"]), v.get("unit", ""), v.get("about", ""))
                for n, v in data.get("values", {}).items()},
        tables={n: Table(n, "", frame) for n, frame in frames.items()},
        figures={f["name"]: Figure(f["name"], "", "", "", "", _rows(f))
                 for f in data.get("figures", [])},
        provenance=dict(data.get("provenance", data)), run_id=path.stem)


def _rows(table: Mapping[str, Any]) -> pd.DataFrame:
    return pd.DataFrame([[_decode(v) for v in row] for row in table["rows"]],
                        columns=table["columns"])


def _decode(value: Any) -> Any:
    return _WORDS.get(value, value) if isinstance(value, str) else value


def _name(run: Run) -> str:
    return run.run_id or run.folder.name


def _on_accelerator(run: Run) -> bool:
    if device := str(run.parameters.get("device", "")):
        return device.startswith("cuda") or device in _gpus(run)  # a bench names the card
    # A machine may have a GPU that the run did not use; a record was made for its machine's.
    return run.folder.suffix == ".json" and bool(_gpus(run))


def _gpus(run: Run) -> list[str]:
    machine = run.provenance.get("machine")
    gpus = machine.get("gpus", []) if isinstance(machine, dict) else []
    return [str(g.get("name", g)) if isinstance(g, Mapping) else str(g) for g in gpus]


def _machine(run: Run) -> str:
    if _on_accelerator(run) and _gpus(run):
        return _gpus(run)[0]
    machine = run.provenance.get("machine", "")
    return str(machine.get("cpu", "") if isinstance(machine, dict) else machine)
