"""Runs studies: all of them, one with other parameters, or a grid. What is finished is skipped.

Every combination is checked before the first one starts. A run is identified by study,
parameters and sources, so a changed study runs again and an interrupted one starts over; a
failed one stays visible and is tried again by the next sweep.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.runs.folders import RECORD, RUNS
from analysis.studies import (
    DEFAULT_PROFILE,
    STUDIES,
    Study,
    check_device,
    command,
    get_study,
    profile_of,
    run_id,
    validate,
)
from analysis.sweep.execute import Task
from analysis.sweep.executors import LocalExecutor, make_executor, run_task
from analysis.sweep.progress import Progress, make_progress
from mambabyte.config.files import make_dir, temporary_dir
from mambabyte.config.owners import only_one, remove_leftovers
from mambabyte.errors import UserError

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Row:
    """How one run ended: "done", "skipped" (was done already) or "failed" with its error."""

    run_id: str
    study: str
    parameters: dict[str, Any]
    status: str
    folder: Path
    seconds: float | None = None
    error: str = ""


def run_sweep(
    names: Sequence[str] = (), *, profile: str = DEFAULT_PROFILE,
    overrides: Mapping[str, Any] | None = None, grid: Mapping[str, Sequence[Any]] | None = None,
    root: Path | str = RUNS, executor: str = "serial", workers: int = 1, address: str = "",
    force: bool = False, progress: Progress | None = None, registry: Mapping[str, Study] = STUDIES,
) -> list[Row]:
    """Runs every combination that is not done yet and returns one row for each.

    ``names`` are studies, all when empty. ``overrides`` replaces parameters of the profile;
    ``grid`` gives several values each, and their product is run: ``{"context": [512, 1024]}``.
    ``force`` runs what is done again. UserError before anything runs where a name, a type or a
    value is wrong; KeyboardInterrupt leaves finished runs in place and nothing of unfinished ones.
    """
    root = Path(root).resolve()
    studies = [get_study(n, registry) for n in names or registry]
    # What is timed runs alone, after what may run side by side. Those that judge the others'
    # results come last: what they depend on is known only then.
    stages = [[s for s in studies if (s.reads_runs, s.timed) == kind]
              for kind in ((False, False), (False, True), (True, False), (True, True))]
    point = (profile, overrides or {}, grid or {}, root)
    tasks = plan(studies, *point)  # every mistake in the input is found here
    if executor in ("serial", "local"):  # another machine may have the GPU that this one lacks
        for task in tasks:
            check_device(get_study(task.study, registry), task.parameters.get("device"))
    total = len(tasks)
    pool = make_executor(executor, workers, address)
    alone = LocalExecutor(1) if executor == "local" else pool
    progress = progress or make_progress()
    make_dir(root)
    try:
        with only_one(root / ".lock", "runs a sweep"):
            remove_leftovers(root)
            rows: list[Row] = []
            for stage in filter(None, stages):
                by = alone if any(study.timed for study in stage) else pool
                rows += _run(plan(stage, *point), by, progress, force, len(rows), total)
            return rows
    finally:
        alone.shutdown(wait=True, cancel_futures=True)
        pool.shutdown(wait=True, cancel_futures=True)
        progress.close()


def plan(
    studies: Sequence[Study], profile: str, overrides: Mapping[str, Any],
    grid: Mapping[str, Sequence[Any]], root: Path,
) -> list[Task]:
    """The runs of a sweep, each validated and with its identity, without double ones."""
    both = sorted(overrides.keys() & grid.keys())
    if both:
        raise UserError(f"{', '.join(both)} is given twice: as one value and in the grid")
    for name, values in grid.items():
        if not values:
            raise UserError(f"the grid has no values for {name}: write e.g. {name}=1,2,4")
    tasks: dict[str, Task] = {}
    for study in studies:
        sources = study.sources_digest(root)
        for point in itertools.product(*grid.values()):
            parameters = validate(study, {**overrides, **dict(zip(grid, point, strict=True))},
                                  profile)
            name = run_id(study, parameters, sources)
            tasks[name] = Task(
                study=study.name, notebook=str(study.notebook), parameters=parameters,
                run_id=name, folder=str(root / name),
                temporary=str(temporary_dir(root / name)), sources=sources,
                profile=profile_of(study, parameters), command=command(study, parameters),
                cwd=os.getcwd(),
            )
    return list(tasks.values())


def _run(
    tasks: Sequence[Task], pool: Any, progress: Progress, force: bool, before: int, total: int
) -> list[Row]:
    """Runs one stage; ``before`` runs of ``total`` have ended already."""
    rows: dict[str, Row] = {}
    futures: dict[Future[None], Task] = {}
    for task in tasks:
        old = _row(task)
        if old and old.status == "done" and not force:
            rows[task.run_id] = Row(**{**vars(old), "status": "skipped"})
            progress.finished(task.run_id, "skipped", "up to date")
        else:
            futures[pool.submit(run_task, task)] = task
    pending = set(futures)
    tails = {task.run_id: _Tail(task) for task in futures.values()}
    position = before + len(rows)
    while pending:
        done, pending = wait(pending, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
        for future in [*done, *pending]:
            task = futures[future]
            tail = tails[task.run_id]
            if tail.begins():
                position += 1
                progress.started(task.run_id, position, total)
            for line in tail.lines(ended=future in done):
                progress.line(task.run_id, line)
        for future in done:
            row = _ended(futures[future], future)
            rows[row.run_id] = row
            note = row.error or (f"{row.seconds:.1f} s" if row.seconds is not None else "")
            progress.finished(row.run_id, row.status, note)
    return [rows[task.run_id] for task in tasks]


def _ended(task: Task, future: Future[None]) -> Row:
    try:
        error: BaseException | None = future.exception()
    except CancelledError:  # by a cluster that has gone
        error = RuntimeError("the cluster was lost before this run had ended")
    row = None if error else _row(task)
    if row:
        return row
    words = [line for line in str(error or "").splitlines() if line.strip()]
    why = words[-1].strip() if words else "it left no run folder"
    return Row(task.run_id, task.study, task.parameters, "failed", Path(task.folder), error=why)


def _row(task: Task) -> Row | None:
    """The row of a run folder, None where there is none that can be read."""
    folder = Path(task.folder)
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return Row(task.run_id, task.study, task.parameters, record["status"], folder,
                   record.get("seconds"), record.get("error", ""))
    except (OSError, ValueError, KeyError):
        return None


class _Tail:
    """New whole lines of a run's log, each time it is asked, wherever the run is executed."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._attempt = 0
        self._position = 0
        self._begun = False

    def begins(self) -> bool:
        """True once: when the log has appeared."""
        if self._begun or not self._path():
            return False
        self._begun = True
        return True

    def lines(self, ended: bool) -> Iterator[str]:
        path = Path(self._task.folder) / "log.txt" if ended else self._path()
        if path is None or not self._begun:
            return
        try:
            with path.open("rb") as file:
                file.seek(self._position)
                block = file.read()
        except OSError:  # renamed in between: the next call finds it under its final name
            return
        whole = block[: block.rfind(b"\n") + 1]
        self._position += len(whole)
        for line in whole.decode("utf-8", "replace").splitlines():
            if line.strip():
                yield line.strip()

    def _path(self) -> Path | None:
        """The log of the newest attempt, from its beginning on."""
        while self._task.attempt(self._attempt + 1).log.is_file():
            self._attempt, self._position = self._attempt + 1, 0
        log = self._task.attempt(self._attempt).log
        return log if log.is_file() else None
