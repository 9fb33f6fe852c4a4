"""Study: every mixer at the rate that suits it, on text and on tasks that ask one thing.

The trainings are the cells of a sweep (analysis.measure.cells): a file each, in a folder that the
next run goes on in, by one worker a GPU. ``plan`` says which are wanted, given what is done; the
tables are made from what is there.
"""

from __future__ import annotations

import gc
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
from analysis.studies.arena.trainings.learning import learn_task
from analysis.studies.arena.trainings.pieces import train_on_units
from analysis.studies.arena.trainings.plan import Cell, Done, plan
from analysis.studies.arena.trainings.text import open_corpus, step_costs, train
from mambabyte.errors import UserError
from mambabyte.model import ByteLM


def run(p: Parameters, report: Callable[[str], None] = lambda line: None) -> Results:
    """The whole study, or what of it is done when ``max_seconds`` are over."""
    if p.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("no CUDA device is available: set device to cpu, or use the quick profile")
    until = time.time() + p.max_seconds if p.max_seconds else float("inf")
    with ExitStack() as stack:
        folder = Path(p.work or stack.enter_context(tempfile.TemporaryDirectory()))
        forget_failed(folder)
        if p.device == "cpu" and p.workers == 1:
            _work(p, folder, until, report, "cpu")
        else:
            places = [p.device]
            if p.device == "cuda":
                places = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
            elif p.device == "cpu":
                places = [f"cpu:{i}" for i in range(p.workers)]
            share(folder, partial(_work, p, folder, until, print), places, report)
        return tables(p, done_rows(folder), report)


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
    gc.collect()  # a captured graph keeps its memory as long as anything refers to it
    if cell.kind == "cost":
        return {"costs": step_costs(p, device)}
    if cell.kind == "clamp":
        return train_followed(p, cell, device)
    if cell.kind in ("pieces", "noise"):
        return train_on_units(p, cell, device)
    if cell.kind in ("text", "memory"):
        done, row = train(p, cell, device)
        return row | (look(p, done.model, device) if cell.kind == "memory" else {})
    return learn_task(p, cell, device)


def look(p: Parameters, model: ByteLM, device: str) -> dict[str, Any]:
    """What a trained model remembers, and what its state loses in fewer bits."""
    text = open_corpus(p.corpus)[0].valid[: p.stream_bytes]
    return remembered(model, text, p.context) | (
        lost_bits(model, text, device) if "precision" in p.parts else {})


def tables(
    p: Parameters, rows: list[Row], report: Callable[[str], None] = lambda line: None
) -> Results:
    """The study's tables, of the cells that are done."""
    done = Done(rows)
    costs = outcome.costs_table(rows)
    law, points, crossings = law_tables(p, done, report)
    return Results(
        cells=outcome.cells_table(rows), best=outcome.best_table(p, done),
        tuning=outcome.tuning_table(p, done), sensitivity=outcome.sensitivity_table(rows, p),
        paired=outcome.differences_table(p, done), costs=costs,
        equal=outcome.equal_table(p, done, costs), answers=outcome.answers_table(rows, p),
        tasks=outcome.tasks_table(p, done),
        law=law, points=points, crossings=crossings,
        **{name: outcome.looked_at(rows, "memory", name)
           for name in ("context", "half_lives", "horizon", "maps", "precision", "state_errors")},
        units=outcome.units_table(rows), clamp=outcome.clamp_table(rows),
        followed=outcome.looked_at(rows, "clamp", "followed"),
    )
