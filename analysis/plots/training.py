"""Curves of trainings: on a terminal in characters, and as a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from analysis.plots import label_axes, legend_below, looks, new_figure

_MARKS = "o+x*#@%&"


def curves(runs: Mapping[str, pd.DataFrame], columns: Mapping[str, str]) -> Figure:
    """A panel a column (its name -> the axis' words), a line a run, by the seconds of training."""
    style = looks(list(runs))
    figure, axes = new_figure(len(columns), 1, size=(7.2, 2.6 * len(columns)), sharex=True,
                              squeeze=False)
    for ax, (column, words) in zip(axes[:, 0], columns.items(), strict=True):
        for name, frame in runs.items():
            known = frame.dropna(subset=[column])
            # (An underscore in front would keep it out of the legend, two dollars are a formula.)
            label = ("./" if name.startswith("_") else "") + name.replace("$", r"\$")
            ax.plot(known["seconds"], known[column].astype(float), label=label, **style[name])
        label_axes(ax, "training time, s", words)
    legend_below(figure)
    return figure


def chart(
    runs: Mapping[str, pd.DataFrame], column: str, width: int = 72, height: int = 14
) -> list[str]:
    """Lines of text with one column of every run, by the seconds of training; a mark a run.

    Empty where no run has a finite number there.
    """
    points = {name: [(float(x), float(y)) for x, y in zip(
        frame["seconds"], frame[column].astype(float), strict=True)
        if math.isfinite(x) and math.isfinite(y)] for name, frame in runs.items()}
    every = [point for found in points.values() for point in found]
    if not every:
        return []
    right, low, high = max(x for x, _ in every), *(f(y for _, y in every) for f in (min, max))
    inner = width - 10
    rows = [[" "] * inner for _ in range(height)]
    for i, found in enumerate(points.values()):
        for x, y in found:
            at = round((inner - 1) * x / right) if right else 0
            down = round((height - 1) * (high - y) / (high - low)) if high > low else height - 1
            rows[down][at] = _MARKS[i % len(_MARKS)]
    sides = [f"{high:>9.4g}", *[" " * 9] * (height - 2), f"{low:>9.4g}"]
    lines = [f"{side}|{''.join(row).rstrip()}" for side, row in zip(sides, rows, strict=True)]
    end = f"{right:.0f} s"
    lines += [" " * 9 + "+" + "-" * inner, " " * 10 + "0 s" + end.rjust(inner - 3)]
    return lines + [f"  {_MARKS[i % len(_MARKS)]} {name}" for i, name in enumerate(points)]
