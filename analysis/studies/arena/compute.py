"""Study: every mixer at the rate that suits it, on text and on tasks that ask one thing.

The trainings are the cells of a sweep (analysis.measure.cells): a file each, in a folder that the
next run goes on in, by one worker a GPU. ``plan`` says which are wanted, given what is done; the
tables are made from what is there.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from analysis.measure.cells import Row, done_rows, forget_failed, share, work
from analysis.measure.threads import threads
from analysis.studies.arena import Parameters, Results, outcome
from analysis.studies.arena.laws import law_tables
from analysis.studies.arena.memory import remembered
from analysis.studies.arena.precision import lost_bits
from analysis.studies.arena.trainings.clamp import train_followed
from analysis.studies.arena.trainings.costs import measure_costs
from analysis.studies.arena.trainings.learning import learn_task
from analysis.studies.arena.trainings.pieces import train_on_units
from analysis.studies.arena.trainings.plan import (
    Cell,
    Done,
    clamp_cells,
    memory_cells,
    name_of,
    plan,
    precision_cells,
)
from analysis.studies.arena.trainings.recorded import recorded
from analysis.studies.arena.trainings.text import open_corpus, target_parameters, text_id, train
from mambabyte.config.files import make_dir, write_json
from mambabyte.errors import UserError

COMMON = ("corpus", "context", "batch_size", "heldout_windows", "stream_bytes", "task_layers",
          "task_batch")  # what trainings depend on, besides what a cell says


def run(p: Parameters, report: Callable[[str], None] = lambda line: None) -> Results:
    """The whole study, or what of it is done when ``max_seconds`` are over."""
    until = time.time() + p.max_seconds if p.max_seconds else float("inf")
    with ExitStack() as stack:
        folder = Path(p.work or stack.enter_context(tempfile.TemporaryDirectory()))
        if p.continues:
            take_over(Path(p.continues), folder)
        same_settings(p, folder)
        forget_failed(folder)
        done = Done(trainings(folder))
        if time.time() < until and any(
                cell.name not in done.rows for cell in plan(p, list(done.rows.values()))):
            _same_text(p, folder)
            _share(p, folder, until, report)
        return tables(p, trainings(folder), report)


def same_settings(p: Parameters, folder: Path) -> None:
    """UserError where a sweep's trainings were made with other values of what they all depend on
    and their names do not say."""
    mine: dict[str, Any] = {
        **{name: getattr(p, name) for name in COMMON}, "device": p.device.partition(":")[0],
        **{f"parameters of {size}": target_parameters(p, size)
           for size in (p.size, *p.larger, *p.scaling)}}
    if "tasks" in p.parts:  # whose parameters are matched as well
        mine["task_systems"] = sorted(p.task_systems)
    _go_on_with(folder, mine)


def take_over(record: Path, folder: Path) -> None:
    """Put the trainings of a record, and what they were made with, into a work folder that lacks
    them. Where a record does not say which text was read, its name alone is compared."""
    p, rows = recorded(record)
    same_settings(p, folder)
    for text in {row["text"] for row in rows if row.get("text")}:
        _go_on_with(folder, {"text": text})
    for row in rows:
        path = folder / f"{name_of(row)}.json"
        if not path.exists():
            write_json(path, row)


def _same_text(p: Parameters, folder: Path) -> None:
    """UserError where a sweep's trainings read another text of the same name."""
    if set(p.parts) - {"costs", "tasks"}:
        _go_on_with(folder, {"text": text_id(p.corpus)})


def _go_on_with(folder: Path, mine: dict[str, Any]) -> None:
    path = folder / "settings"
    try:
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError:
        kept = None
    if not isinstance(kept, dict):
        raise UserError(f"{path} is no object of JSON, as the settings of a sweep are: choose "
                        "another folder as work; without the file the next run writes its own, and "
                        "takes the trainings there as made with them")
    for name, value in mine.items():
        if kept.get(name, value) != value:
            raise UserError(f"{folder} has trainings with {name}={kept[name]!r}, and this run "
                            f"{value!r}: choose another folder as work, or that value")
    if kept != kept | mine:
        make_dir(folder)
        write_json(path, kept | mine)


def trainings(folder: Path) -> list[Row]:
    """The rows of a work folder; UserError for one of another sweep."""
    rows = done_rows(folder)
    for row in rows:
        if missing := sorted(Cell.__dataclass_fields__.keys() - row.keys()):
            raise UserError(f"{folder} has a row without {', '.join(missing)}, which is none of "
                            "this study: choose another folder as work")
    return rows


def _share(
    p: Parameters, folder: Path, until: float, report: Callable[[str], None]
) -> None:
    """Do what is wanted: here, or by workers."""
    places = [p.device]
    if p.device.startswith("cuda"):
        if p.device == "cuda":
            places = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    elif p.workers == 1:
        _work(p, folder, until, report, p.device)
        return
    share(folder, partial(_work, p, folder, until, print), places * p.workers, report)


def _work(
    p: Parameters, folder: Path, until: float, report: Callable[[str], None], device: str
) -> None:
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    with threads(p.threads):
        work(folder, partial(plan, p), partial(measure, p, device), until=until,
             report=lambda line: report(f"{device} {line}"))


def measure(p: Parameters, device: str, cell: Cell) -> dict[str, Any]:
    """The row of one cell."""
    if device.startswith("cuda"):
        gc.collect()  # a captured graph keeps its memory as long as anything refers to it
    if cell.kind == "clamp":
        return train_followed(p, cell, device)
    if cell.kind == "costs":
        return measure_costs(p, cell, device)
    if cell.kind in ("pieces", "noise"):
        return train_on_units(p, cell, device)
    if cell.kind in ("text", "memory", "precision"):
        done, row = train(p, cell, device)
        text = open_corpus(p.corpus)[0].valid[: p.stream_bytes]
        if cell.kind == "memory":
            row |= remembered(done.model, text, p.context)
        elif cell.kind == "precision":
            row |= lost_bits(done.model, text, device)
        return row
    return learn_task(p, cell, device)


def tables(
    p: Parameters, rows: list[Row], report: Callable[[str], None] = lambda line: None
) -> Results:
    """The study's tables, of the cells that are done."""
    done = Done(rows)
    costs = outcome.costs_table(p, done)
    law, points, crossings = law_tables(p, done, report)
    return Results(
        cells=outcome.cells_table(rows), best=outcome.best_table(p, done),
        tuning=outcome.tuning_table(p, done), sensitivity=outcome.sensitivity_table(rows, p),
        paired=outcome.differences_table(p, done), costs=costs,
        equal=outcome.equal_table(p, done, costs), answers=outcome.answers_table(rows, p),
        tasks=outcome.tasks_table(p, done),
        law=law, points=points, crossings=crossings,
        **{name: outcome.looked_at(done, memory_cells(p, done), name)
           for name in ("context", "half_lives", "horizon", "maps")},
        **{name: outcome.looked_at(done, precision_cells(p, done), name)
           for name in ("precision", "state_errors")},
        units=outcome.units_table(p, done),
        clamp=outcome.clamp_table(done, clamp_cells(p, done)),
        followed=outcome.looked_at(done, clamp_cells(p, done), "followed"),
    )
