"""Figures over several records: the frames behind them, and their words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from analysis.plots.comparisons import both_sides, step_costs
from analysis.report.headlines import FILE, NOISE, Headline, headline_records, load_headlines
from analysis.runs.folders import Run, Table
from analysis.studies.drawing import Figure

MAP = "cpu-overflow-map"
STEPS = ("h200-step-1024", "h200-step-2048", "h200-step-8192")  # each is one job


def comparisons(records: Mapping[str, Run]) -> dict[str, Figure]:
    """By name; those whose records are not there are left out."""
    found = []
    if FILE.is_file() and set(headline_records()) <= records.keys():
        sides = sides_frame(load_headlines(records))
        found.append(_figure(
            "sides", sides, partial(both_sides, sides), "Both sides of every comparison",
            f"Ours over theirs, one row a pair of costs; each pair is of one job. Level: within "
            f"{NOISE:.0%} of 1. Quality, which is a difference, has its own figure.",
            "Rows of bars from 1 to the left where we are ahead and to the right where we are "
            "behind, grouped by comparison, with both numbers in the name of the row."))
    if set(STEPS) <= records.keys():
        steps = steps_frame([records[name] for name in STEPS])
        found.append(_figure(
            "steps", steps, partial(step_costs, steps), "Joules of a training step",
            "Models of one million parameters on one H200, compiled; each panel is one job. Joules "
            "are the card's counter, idle included. Windows of attention were timed where they are "
            "shorter than the context.",
            "Three panels of dots, joules a megabyte for windows of 1,024, 2,048 and 8,192 bytes, "
            "one row a layer pattern."))
    return {f"comparisons.{figure.name}": figure for figure in found}


def lab_tables(records: Mapping[str, Run]) -> list[Table]:
    """Tables that the page's things to try read, and that say the same without them."""
    found = []
    if MAP in records:
        found.append(Table("chunk", "Error of the corrected cumulated sum in float32, worst of "
                           "value and gradients, by chunk and log-decay a step (constant decay).",
                           chunk_frame(records[MAP].tables["errors"].frame)))
    if set(STEPS) <= records.keys():
        steps = steps_frame([records[name] for name in STEPS])
        found.append(Table("steps", "Training steps of one million parameters, each number of "
                           "windows one job.", steps.drop(columns="record")))
    return found


def chunk_frame(errors: pd.DataFrame) -> pd.DataFrame:
    """A row a chunk, a column a decay."""
    some = errors[(errors["kind"] == "constant") & (errors["precision"] == "float32")
                  & (errors["form"] == "corrected_cumsum")]
    decays = [c for c in some if c not in ("kind", "precision", "form", "of", "chunk")]
    # numpy's maximum: a nan is worse than any number
    worst = some.groupby("chunk")[decays].agg(lambda column: np.max(column.to_numpy(float)))
    return worst.reset_index(names="chunk, steps")


def sides_frame(headlines: Sequence[Headline]) -> pd.DataFrame:
    """A row a side of each headline that has two numbers."""
    rows = []
    for headline in headlines:
        for side in headline.sides:
            if side.theirs is None:
                continue
            rows.append((headline.short, side.label, side.ours, side.theirs,
                         side.ours / side.theirs, side.outcome, headline.record))
    return pd.DataFrame(rows, columns=["comparison", "cost", "ours", "theirs", "ratio", "outcome",
                                       "record"])


def steps_frame(records: Sequence[Run]) -> pd.DataFrame:
    """The systems of several records of training steps, a job each."""
    frames = []
    for record in records:
        steps = record.tables["steps"].frame
        shape = (f"{record.parameters['batch_size']} windows of "
                 f"{record.parameters['context']:,} bytes")
        frames.append(pd.DataFrame({
            "job": shape, "system": steps["layers"], "step, ms": steps["step, median (ms)"],
            "J/MB": steps["gross (J/MB)"],
            "record": record.run_id}))
    return pd.concat(frames, ignore_index=True)


def _figure(
    name: str, frame: pd.DataFrame, draw: Callable[[], Any], title: str, caption: str, alt: str
) -> Figure:
    return Figure(name, title, caption, alt, frame, name, draw,
                  lambda: repr(frame.to_dict("list")))
