"""What a step of training costs every system: time and joules, in turns in one process.

One after the other, a machine that warms up or that others use would stand in the ratios.
"""

from __future__ import annotations

from typing import Any

from analysis.measure.bench.steps import time_steps
from analysis.studies.arena import Parameters
from analysis.studies.arena.trainings.plan import BETWEEN, Cell, at
from analysis.studies.arena.trainings.text import config_of, recipe_of
from mambabyte.config.provenance import commit, job

ROUNDS = 5
TURN_SECONDS = {"cuda": 0.5, "cpu": 0.05}  # a GPU's counter of energy moves ten times a second


def measure_costs(p: Parameters, cell: Cell, device: str) -> dict[str, Any]:
    """The row of a cell of costs: for each of its systems the milliseconds of a step, median and
    quartiles over ROUNDS, and the gross joules of a byte, None without a counter."""
    kind = device.partition(":")[0]
    # A rate changes nothing that a step does.
    recipe = recipe_of(p, at(cell, rate=1e-3, budget=p.context * p.batch_size))
    frame, _ = time_steps(
        {system: config_of(p, system, cell.size) for system in cell.system.split(BETWEEN)},
        recipe, device, "fused" if kind == "cuda" else "eager", ROUNDS,
        ROUNDS * TURN_SECONDS[kind])
    return {"commit": commit(), "job": job()["id"], "costs": [
        {"system": row.system, "ms_per_step": row.ms, "low": row.low, "high": row.high,
         "seconds_per_byte": 1 / row.bytes_per_second,
         "joules_per_byte": None if row.joules_per_megabyte != row.joules_per_megabyte
         else row.joules_per_megabyte / 1e6}
        for row in frame.itertuples()]}
