"""Draws the figures of measurement records again, from their numbers, after a plot changed.

``python -m analysis.sweep.redraw data/measurements/h200-ablation.json ...`` replaces the drawings
and nothing else: numbers, words and provenance stay as they were measured. A figure whose record
does not hold all that it draws (the maps of the overflow study) stays as it is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from analysis.runs.folders import Run, draw
from analysis.runs.records import load_record, write_record_json
from analysis.studies.ablation import figures as ablation
from analysis.studies.ablation.tables import differences_table
from analysis.studies.gradients import figures as gradients
from analysis.studies.gradients import scan_against_step
from analysis.studies.overflow import figures as overflow
from analysis.studies.throughput import figures as throughput
from analysis.theory import bounds
from mambabyte.errors import UserError


def _curves(run: Run) -> Figure | None:
    """None where the record has no bits of byte frequencies: the drawing has a line there."""
    found = run.values.get("unigram_bits")
    if found is None or not isinstance(found.value, float):
        return None
    return ablation.curves(_data(run, "curves"), found.value)


def _data(run: Run, name: str) -> pd.DataFrame:
    return run.figures[name].data


# study.figure -> the drawing, from the record's data of that figure and what else it needs.
DRAWINGS: dict[str, Callable[[Run], Figure | None]] = {
    "ablation.curves": _curves,
    "ablation.differences": lambda run: ablation.differences(
        _data(run, "differences"), differences_table(
            _data(run, "differences"), run.parameters["patterns"], run.parameters["reference"])),
    "ablation.state": lambda run: ablation.quality_and_state(_data(run, "state")),
    "ablation.drift": lambda run: ablation.drift(_data(run, "drift")),
    "ablation.tasks": lambda run: ablation.tasks(_data(run, "tasks")),
    "ablation.variants": lambda run: ablation.variants(_data(run, "variants")),
    "overflow.pairs": lambda run: overflow.pair_shares(_data(run, "pairs")),
    "overflow.headroom": lambda run: overflow.headroom_lines(
        _data(run, "headroom"), bounds.log_max()),
    "gradients.boundaries": lambda run: gradients.boundary_lines(_data(run, "boundaries")),
    "gradients.distances": lambda run: gradients.distance_lines(_data(run, "distances")),
    "gradients.steps": lambda run: gradients.step_bars(
        _data(run, "steps"), scan_against_step.DOCUMENT_DIFFERENCE),
    "gradients.recall": lambda run: gradients.recall_lines(_data(run, "recall")),
    "throughput.scan_time": lambda run: throughput.scan_time(_data(run, "scan_time")),
    "throughput.allocations": lambda run: throughput.allocations(_data(run, "allocations")),
    "throughput.mixers": lambda run: throughput.mixer_time(
        _data(run, "mixers"), run.tables["crossovers"].frame),
    "throughput.batch": lambda run: throughput.batch_time(
        _data(run, "batch"), _data(run, "mixers"), run.parameters["batch_length"]),
    "throughput.energy": lambda run: throughput.energy(
        _data(run, "scan_time"), _data(run, "mixers")),
    "throughput.streaming": lambda run: throughput.streaming(_data(run, "streaming")),
    "throughput.training": lambda run: throughput.training(_data(run, "training")),
}


def redraw(path: Path) -> list[str]:
    """Replaces what can be drawn from the record alone; returns the names of those figures."""
    run = load_record(path).run
    data = json.loads(path.read_text(encoding="utf-8"))
    drawn = []
    for entry in data["figures"]:
        name = f"{run.study}.{entry['name']}"
        figure = DRAWINGS[name](run) if name in DRAWINGS else None
        if figure is not None:
            entry["svg"], entry["narrow"] = draw(figure, name)
            drawn.append(entry["name"])
    if drawn:
        write_record_json(path, data)
    return drawn


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m analysis.sweep.redraw", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("records", nargs="+", type=Path)
    try:
        for path in parser.parse_args(arguments).records:
            print(f"{path.name}: {', '.join(redraw(path)) or 'nothing drawn'}")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
