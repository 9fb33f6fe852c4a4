"""Figures of the gradient study. Each takes a DataFrame of its results."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis import plots
from analysis.studies.drawing import Drawing
from analysis.studies.gradients import DOCUMENT_DIFFERENCE


def boundary_lines(boundaries: pd.DataFrame, gradient: str = "d u") -> Figure:
    """Error of one gradient at every boundary, float32: a line each form, and truncation."""
    figure, axes = plots.new_figure()
    rows = boundaries[(boundaries["gradient"] == gradient)
                      & ((boundaries["precision"] == "float32")
                         | (boundaries["form"] == "truncated"))]
    names = list(dict.fromkeys(rows["form"]))
    ends = {}
    for name, look in plots.looks(names).items():
        line = rows[rows["form"] == name]
        axes.plot(line["boundary, step"], line["relative error"], **look)
        ends[name] = (line["boundary, step"].iloc[-1], line["relative error"].iloc[-1],
                      look["color"])
    axes.set_yscale("log")
    axes.set_xticks(sorted(rows["boundary, step"].unique()))
    plots.label_axes(axes, "boundary, step", f"relative error of {gradient}")
    plots.label_lines(axes, ends)
    return figure


def distance_lines(distances: pd.DataFrame) -> Figure:
    """Above: the size of the gradient of u by distance. Below: each form's error there."""
    figure, (top, bottom) = plots.new_figure(2, 1, size=(7.6, 6.0), sharex=True)
    x = distances["distance, steps"].to_numpy()
    top.plot(x, distances["size of the gradient of u"], **(plots.look(6) | {"marker": ""}))
    top.set_yscale("log")
    top.set_ylabel("gradient of u, relative units")
    top.set_title("How much arrives")
    columns = [c for c in distances.columns if c.startswith("error of ")]
    ends = {}
    for column, look in zip(columns, map(plots.look, range(len(columns))), strict=True):
        y = distances[column].to_numpy()
        bottom.plot(x, y, markevery=max(1, len(x) // 10), **look)
        ends[column.removeprefix("error of ")] = (x[-1], y[-1], look["color"])
    bottom.set_yscale("log")
    plots.log2_axis(bottom, [4**k for k in range(10) if 4**k <= x[-1]])
    plots.label_axes(bottom, "distance before the boundary, steps", "relative error")
    bottom.set_title("How wrong it is, float32")
    plots.label_lines(bottom, ends, gap=0.09)
    return figure


def step_bars(steps: pd.DataFrame) -> Figure:
    """Scan against step: the difference of the logits by form and precision, every draw a point.
    """
    column = "logits, relative RMS, %"
    rows = steps[steps["dt"] == "log-uniform"]
    forms = list(dict.fromkeys(rows["form"]))
    figure, axes = plots.new_figure()
    for precision, look, shift in (("float32", plots.look(0), -0.12),
                                   ("float64", plots.look(1), 0.12)):
        for i, form in enumerate(forms):
            y = rows[(rows["form"] == form) & (rows["precision"] == precision)][column]
            axes.plot(np.full(len(y), i + shift), y, linestyle="", marker=look["marker"],
                      color=look["color"], label=precision if i == 0 else None)
    axes.set_yscale("log")
    axes.set_xticks(range(len(forms)), forms)
    axes.set_xlim(-0.8, len(forms) - 0.5)
    plots.mark_line(axes, y=DOCUMENT_DIFFERENCE, text=f"document: {DOCUMENT_DIFFERENCE:g} %",
                    right=True)
    plots.label_axes(axes, "scan form", "difference of the logits, %")
    axes.legend(loc="center right")
    return figure


def recall_lines(recall: pd.DataFrame) -> Figure:
    """Left: steps to learn where near symbols help. Right: accuracy where all symbols are far."""
    figure, (left, right) = plots.new_figure(1, 2, size=(10.0, 3.9))
    reaches = sorted(recall["gradient reaches, steps"].unique())
    looks = {reach: plots.look(i) for i, reach in enumerate(reaches)}
    runs = recall.drop_duplicates(["task", "gradient reaches, steps", "seed"])
    anywhere = runs[(runs["task"] == "any distance") & runs["steps to learn"].notna()]
    for i, reach in enumerate(reaches):
        y = anywhere[anywhere["gradient reaches, steps"] == reach]["steps to learn"].astype(float)
        left.plot(np.full(len(y), i), y, linestyle="", marker=looks[reach]["marker"],
                  color=looks[reach]["color"])
    left.set_xticks(range(len(reaches)), [str(reach) for reach in reaches])
    left.set_xlim(-0.5, len(reaches) - 0.5)
    left.margins(y=0.1)  # the highest mark whole
    left.set_ylim(0, None)
    left.set_title("Symbols at any distance")
    plots.label_axes(left, "gradient reaches, steps", "training steps to learn")
    far = recall[recall["task"] == "far only"]
    for reach in sorted(far["gradient reaches, steps"].unique()):
        line = far[far["gradient reaches, steps"] == reach].groupby(
            "distance up to, steps")["accuracy"].mean()
        right.plot(line.index, line, label=f"gradient reaches {reach} steps", **looks[reach])
    plots.mark_line(right, y=0.25, text="chance")
    right.set_ylim(0, 1.05)
    right.set_title("Trained on far symbols only")
    plots.label_axes(right, "distance to the symbol, up to, steps", "accuracy of recall")
    right.legend(loc="center right")
    return figure


FIGURES = (
    Drawing(
        "boundaries", boundary_lines, ("boundaries",), "Gradient of earlier inputs at every "
        "boundary",
        caption="Relative error of the gradient of u before each boundary, float32. The "
                "document's form is off at every boundary: its formula decays each input once "
                "more. The other forms are at rounding; truncation loses everything.",
        alt="Lines over the boundaries: right forms at rounding, the document's form far above, "
            "truncation at 1."),
    Drawing(
        "distances", distance_lines, ("distances",), "Gradient by distance from the boundary",
        caption="Above, the size of the gradient that reaches u; below, its error relative to that "
                "size. The right forms keep their relative accuracy as the gradient shrinks. The "
                "document's error shrinks too: far away only slow states are left, whose extra "
                "factor is near 1.",
        alt="Two panels over distance: the gradient shrinks; errors stay near 1e-7, the document's "
            "falls with the distance."),
    Drawing(
        "steps", step_bars, ("steps",), "Scan against step, untrained model, 80 bytes",
        caption="Relative RMS difference of the logits, one point a draw of the weights. The "
                "document's form differs by the same amount in float32 and float64; forms that "
                "compute the recurrence differ by rounding.",
        alt="Points by form: the document's form at a few tenths of a percent in both precisions, "
            "the others near 1e-5 and 1e-14 percent."),
    Drawing(
        "recall", recall_lines, ("recall",), "Recall after truncated training",
        caption="Left: training steps until recall is learned, one mark a seed, where the symbol "
                "may stand at any distance. Right: accuracy on fresh samples by distance, where "
                "training had far symbols only and a shorter reach of the gradient learns nothing.",
        alt="Left, marks that fall as the gradient reaches further; right, one line near 1 and one "
            "at chance."),
)
