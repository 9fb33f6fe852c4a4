"""What other studies have recorded: run folders of this machine and records of others.

Only the files are read. A run whose sources have changed since is not evidence. The stronger of
two speaks: an accelerator's before a processor's, then full runs and records before quick runs,
then the larger, then the newest; its name and machine stand beside the verdict.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from analysis.runs.folders import RUNS, Run, list_runs
from analysis.runs.jobs import Job, job_of
from analysis.runs.records import RECORDS, load_records
from analysis.studies import STUDIES
from analysis.studies.task.record import COLUMNS

PROFILES = ("full", "quick")
# Parameters that say how large a run was.
SIZES = ("d_model", "n_layer", "context", "batch", "batch_size", "steps", "schedule_steps", "seeds",
         "lengths", "paired_seeds", "parts_steps", "streamed_steps", "tied_steps", "characters")
_TASK_WORDS = {column: key for column, (key, factor) in COLUMNS.items() if factor == 1}


@dataclass(frozen=True)
class Source:
    """A number or a table and where it comes from."""

    what: Any
    name: str  # the run's identity or the record's name
    machine: str
    parameters: Mapping[str, Any] = field(default_factory=dict)  # of that run
    job: Job | None = None  # None: several commands, or unknown

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
        for run in self._of(study, accelerator, like, most):
            for name in names:
                found = run.values.get(name)
                if found is not None and found.value is not None:
                    return _source(found.value, run)
        return None

    def each(
        self, study: str, *names: str, accelerator: bool = False,
        like: Mapping[str, Any] | None = None,
    ) -> list[Source]:
        """Every run of ``study`` that has measured all of ``names``: its values by name."""
        found = []
        for run in self._of(study, accelerator, like):
            values = {n: v.value for n in names
                      if (v := run.values.get(n)) is not None and v.value is not None}
            if len(values) == len(names):
                found.append(_source(values, run))
        return found

    def table(
        self, study: str, name: str, accelerator: bool = False,
        like: Mapping[str, Any] | None = None, most: str = "", column: str = "",
    ) -> Source | None:
        """A table of a run of ``study``, or the table behind a figure; chosen as a value is, of
        those that have the ``column`` where one is named: two benches may have one name."""
        for run in self._of(study, accelerator, like, most):
            table = run.tables.get(name if name in run.tables else run.figures.get(name, ""))
            if table is not None and (not column or column in table.frame):
                return _source(table.frame, run)
        return None

    def parameter(self, study: str, name: str) -> Source | None:
        """A parameter that a run of ``study`` had, as far as it was given."""
        for run in self._of(study, False):
            if run.parameters.get(name) is not None:
                return _source(run.parameters[name], run)
        return None

    def task(self, system: str) -> Source | None:
        """Rows of whole runs of ``system`` under the public task's rules, one a seed, in the words
        of ``mambabyte task``. A run that a fault of the program ended says nothing of the system.
        """
        return next((found for run in self.records if (found := _task_of(run, system))), None)

    def tasks(self, *systems: str) -> list[Source] | None:
        """The same of several systems: from one record where one has them all."""
        for found in [[_task_of(run, s) for s in systems] for run in self.records] + [
                [self.task(s) for s in systems]]:
            whole = [source for source in found if source is not None]
            if len(whole) == len(systems):
                return whole
        return None

    def _of(
        self, study: str, accelerator: bool, like: Mapping[str, Any] | None = None, most: str = "",
    ) -> list[Run]:
        mine = [r for r in (*self.runs, *self.records) if r.study == study
                and all(r.parameters.get(key) == value for key, value in (like or {}).items())]
        mine.sort(key=_strength, reverse=True)
        if most:  # a stable sort: of two equal runs the one that the report's rule prefers
            mine.sort(key=lambda run: -float(run.parameters.get(most) or 0))
        return [r for r in mine if _on_accelerator(r)] if accelerator else mine


def _strength(run: Run) -> tuple[bool, bool, float]:
    """What speaks first: a card's numbers before a processor's, then whatever is not a quick run,
    then the larger. A record was made to be kept, with parameters of its own."""
    return _on_accelerator(run), run.profile != "quick", _work(run.parameters)


def _work(parameters: Mapping[str, Any]) -> float:
    """How much was done, to compare runs of one study: the product of what sizes they have."""
    def size(value: Any) -> float:
        if isinstance(value, (list, tuple)):  # seeds by their number, lengths by the longest
            return max([len(value), *(v for v in value if isinstance(v, (int, float)))])
        return float(value or 1)

    return math.prod(size(parameters[name]) for name in SIZES if parameters.get(name))


def _task_of(run: Run, system: str) -> Source | None:
    if run.study == "throughput":
        return None  # what a bench starts or times is no whole run
    for table in run.tables.values():
        words = {_TASK_WORDS.get(name, name) for name in table.frame.columns}
        if not {"system", "seconds", "joules"} <= words:
            continue
        if run.study == "task" and "runs" in run.tables and table.name != "runs":
            continue  # means over seeds
        frame = table.frame.rename(columns=_TASK_WORDS)
        rows = frame[frame["system"] == system]
        if "failure" in rows:
            rows = rows[~rows["failure"].fillna("").astype(str).str.startswith("crashed")]
        if len(rows):
            return _source(rows, run)
    return None


def gather(runs_root: Path | str = "", records_root: Path | str = "") -> Evidence:
    """Reads the runs and records under these folders; "" is the project's."""
    done = [r for r in list_runs(runs_root or RUNS)
            if r.status == "done" and r.study != "claims"]
    current = {name: study.sources_digest() for name, study in STUDIES.items()
               if name in {r.study for r in done}}
    fresh = [r for r in done if not r.sources or current.get(r.study, r.sources) == r.sources]
    fresh.sort(key=lambda r: str(r.provenance.get("date", "")), reverse=True)
    fresh.sort(key=lambda r: PROFILES.index(r.profile) if r.profile in PROFILES else len(PROFILES))
    stale = {r.study for r in done} - {r.study for r in fresh}
    records = sorted(load_records(records_root or RECORDS).values(),
                     key=lambda r: str(r.provenance.get("date", "")), reverse=True)
    return Evidence(tuple(fresh), tuple(records), tuple(sorted(stale)))


def _source(what: Any, run: Run) -> Source:
    # What was run under the task's rules was a command a system, unless the record has its job.
    one = "job" in run.provenance or run.study != "task"
    return Source(what, run.run_id or run.folder.name, _machine(run), run.parameters,
                  job_of(run) if one else None)


def _on_accelerator(run: Run) -> bool:
    if device := str(run.parameters.get("device", "")):
        return device.startswith("cuda") or device in _gpus(run)  # a bench names the card
    # A machine may have a GPU that the run did not use; a record was made for its machine's.
    return bool(run.title and _gpus(run))


def _gpus(run: Run) -> list[str]:
    machine = run.provenance.get("machine")
    gpus = machine.get("gpus", []) if isinstance(machine, dict) else []
    return [str(g.get("name", g)) if isinstance(g, Mapping) else str(g) for g in gpus]


def _machine(run: Run) -> str:
    if _on_accelerator(run) and _gpus(run):
        return _gpus(run)[0]
    machine = run.provenance.get("machine", "")
    return str(machine.get("cpu", "") if isinstance(machine, dict) else machine)
