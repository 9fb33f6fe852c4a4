"""Trainings that a record holds, as rows of a sweep: what was trained once is not trained again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from analysis.measure.cells import Row
from analysis.runs.records import load_record
from analysis.studies.arena import Parameters
from analysis.studies.arena.trainings.plan import BETWEEN, Cell
from mambabyte.config.checks import from_plain
from mambabyte.errors import UserError


def recorded(folder: Path) -> tuple[Parameters, list[Row]]:
    """What a record of this study was made with, and its trainings on text and what steps cost:
    all of its cells whose rows its tables hold whole. UserError where it is no such record."""
    run = load_record(folder)
    if run.study != "arena" or "cells" not in run.tables:
        raise UserError(f"{folder} is a record of the study {run.study} without trainings on text: "
                        "continues names one of the arena that has them")
    rows: list[Row] = [{"kind": "text", **row}
                       for row in run.tables["cells"].frame.to_dict("records")]
    p = from_plain(Parameters, run.parameters, str(folder))
    if "costs" in run.tables:
        for (optimizer, job), of in run.tables["costs"].frame.groupby(["optimizer", "job"]):
            costs: list[dict[str, Any]] = of.drop(columns=["optimizer", "job"]).to_dict("records")
            cell = Cell("costs", BETWEEN.join(of["system"]), p.size, str(optimizer), 0.0, 0, 0)
            rows.append({**vars(cell), "status": "done", "job": job, "costs": costs})
    return p, rows
