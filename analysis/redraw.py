"""Draws the figures of measurement records again, from their numbers, after a plot changed.

``python -m analysis.redraw data/measurements/h200-ablation.json ...`` replaces the drawings and
nothing else: numbers, words and provenance stay as they were measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from analysis import bounds
from analysis.plots import ablation, overflow, throughput
from analysis.records import load_record
from analysis.results import Run, draw
from mambabyte.errors import UserError
from mambabyte.files import write_json


def _curves(run: Run) -> Figure | None:
    """None where the record has no bits of byte frequencies: the drawing has a line there."""
    found = run.values.get("unigram_bits")
    if found is None or not isinstance(found.value, float):
        return None
    return ablation.curves(run.figures["curves"].data, found.value)


# study.figure -> the drawing, from the record's data of that figure and what else it needs.
DRAWINGS: dict[str, Callable[[Run], Figure | None]] = {
    "ablation.curves": _curves,
    "ablation.differences": lambda run: ablation.differences(
        run.figures["differences"].data, run.tables["paired"].frame),
    "ablation.state": lambda run: ablation.quality_and_state(run.figures["state"].data),
    "ablation.drift": lambda run: ablation.drift(run.figures["drift"].data),
    "ablation.tasks": lambda run: ablation.tasks(run.figures["tasks"].data),
    "ablation.variants": lambda run: ablation.variants(run.figures["variants"].data),
    "overflow.pairs": lambda run: overflow.pair_shares(run.figures["pairs"].data),
    "overflow.headroom": lambda run: overflow.headroom_lines(
        run.figures["headroom"].data, bounds.log_max()),
    "throughput.streaming": lambda run: throughput.streaming(run.figures["streaming"].data),
    "throughput.training": lambda run: throughput.training(run.figures["training"].data),
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
        write_json(path, data)
    return drawn


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m analysis.redraw", description=(__doc__ or "").partition("\n")[0])
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
