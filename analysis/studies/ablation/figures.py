"""Figures of the ablation study: DataFrames in, matplotlib Figures out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.plots import (
    INK,
    label_axes,
    label_lines,
    legend_below,
    looks,
    mark_line,
    new_figure,
    tick_bytes,
)
from analysis.studies.ablation.tables import differences_table
from analysis.studies.drawing import Drawing

ORDER = ("M", "MMMA", "MMA", "MA", "A")
COSTS = (("step", "training step", 1.0), ("seconds", "training time, seconds", 1.0),
         ("train_flops", "training operations, 10¹² FLOPs", 1e12))


def _styles(patterns: pd.Series) -> dict[str, dict[str, Any]]:
    """The same look for a pattern in every figure, whatever else is drawn."""
    found = set(patterns)
    styles = looks([*ORDER, *sorted(found - set(ORDER))])
    return {name: look for name, look in styles.items() if name in found}


def curves(frame: pd.DataFrame, unigram_bits: float | None) -> Figure:
    """Held-out bits per byte against three kinds of cost; thin lines are single seeds.

    ``unigram_bits`` is what byte frequencies alone reach, a line across; None where that was not
    counted.
    """
    style = _styles(frame["pattern"])
    figure, axes = new_figure(1, 3, size=(11.0, 4.0), sharey=True)
    ends: dict[str, tuple[float, float, str]] = {}
    shown = frame[frame["step"] > 0]
    for ax, (column, label, unit) in zip(axes, COSTS, strict=True):
        for pattern, look in style.items():
            one = shown[shown["pattern"] == pattern]
            for _, seed in one.groupby("seed"):
                ax.plot(seed[column] / unit, seed["bits_per_byte"], color=look["color"],
                        linewidth=0.8, alpha=0.5, linestyle="-", marker="")
            mean = one.groupby("step")[[column, "bits_per_byte"]].mean()
            ax.plot(mean[column] / unit, mean["bits_per_byte"], label=pattern, **look)
            ends[pattern] = (mean[column].iloc[-1] / unit, mean["bits_per_byte"].iloc[-1],
                             look["color"])
        label_axes(ax, label, "held-out bits per byte" if ax is axes[0] else "bits per byte")
        if unigram_bits is not None:
            mark_line(ax, y=unigram_bits, text="byte frequencies", right=True)
    axes[-1].autoscale_view()
    label_lines(axes[-1], ends)
    legend_below(figure)
    return figure


def differences(
    comparisons: pd.DataFrame, every: Sequence[str], reference: str
) -> Figure:
    """Bits per byte minus the reference's on the same seed, one panel a comparison, for the layer
    patterns ``every``.

    Small marks are seeds, the bar across is their mean, the vertical line the interval, where
    there are seeds enough for one.
    """
    paired = differences_table(comparisons, every, reference)
    kinds = [c for c in dict.fromkeys(paired["comparison"])
             if paired[paired["comparison"] == c]["mean"].notna().any()]
    style = _styles(comparisons["pattern"])
    patterns = [p for p in style if p != reference]
    columns = 2 if len(kinds) % 2 == 0 else min(len(kinds), 3)
    rows = -(-len(kinds) // columns)
    figure, axes = new_figure(rows, columns, size=(3.6 * columns, 3.6 * rows), sharey=True,
                              squeeze=False)
    for ax in axes.flat[len(kinds):]:
        ax.set_visible(False)
    for i, (ax, kind) in enumerate(zip(axes.flat, kinds, strict=False)):
        some = comparisons[comparisons["comparison"] == kind]
        wide = some.pivot(index="seed", columns="pattern", values="bits_per_byte").astype(float)
        for x, pattern in enumerate(patterns):
            look = style[pattern]
            points = wide[pattern] - wide[reference]
            ax.plot(x + np.linspace(-0.15, 0.15, len(points)), points, linestyle="none",
                    color=look["color"], marker=look["marker"])
            row = paired[(paired["comparison"] == kind) & (paired["pattern"] == pattern)].iloc[0]
            ax.plot([x - 0.3, x + 0.3], [row["mean"]] * 2, color=look["color"], marker="")
            if pd.notna(row["low"]):
                ax.plot([x, x], [row["low"], row["high"]], color=look["color"], marker="",
                        linestyle="-")
        ax.set_xticks(range(len(patterns)), patterns)
        ax.set_xlim(-0.6, len(patterns) - 0.4)
        mark_line(ax, y=0.0, text=f"as good as {reference}")
        label_axes(ax, "layer pattern",
                   f"bits per byte minus those of {reference}" if i % columns == 0
                   else "difference, bits", f"equal {kind}")
    return figure


def equal_budget(systems: pd.DataFrame, equal: str) -> Figure:
    """Bits per byte of every system where ``equal`` is what all spend: means, and intervals where
    there are seeds enough."""
    figure, ax = new_figure()
    style = _styles(systems["pattern"])
    for x, row in enumerate(systems.to_dict("records")):
        look = style[row["pattern"]]
        ax.plot([x], [row["bits per byte"]], color=look["color"], marker=look["marker"])
        if pd.notna(row["low"]):
            ax.plot([x, x], [row["low"], row["high"]], color=look["color"], marker="",
                    linestyle="-")
    ax.set_xticks(range(len(systems)), systems["pattern"])
    ax.set_xlim(-0.6, len(systems) - 0.4)
    label_axes(ax, "layer pattern", "held-out bits per byte", f"equal {equal}")
    return figure


def quality_and_state(systems: pd.DataFrame) -> Figure:
    """Bits per byte at equal steps against the bytes of streaming state."""
    figure, ax = new_figure(size=(7.2, 4.0))
    style = _styles(systems["pattern"])
    for row in systems.itertuples():
        look = style[row.pattern]
        ax.plot(row.state_bytes, row.bits_per_byte, color=look["color"], marker=look["marker"],
                markersize=10)
        ax.annotate(row.pattern, (row.state_bytes, row.bits_per_byte), xytext=(10, 0),
                    textcoords="offset points", va="center", color=look["color"],
                    fontweight="bold")
    ax.set_xscale("log", base=2)
    ax.margins(x=0.2, y=0.15)
    tick_bytes(ax.xaxis)
    label_axes(ax, "state of one stream after one training context, bytes",
               "held-out bits per byte")
    return figure


def drift(positions: pd.DataFrame) -> Figure:
    """Stream minus fresh windows on the same bytes, by position; the mean over seeds."""
    some = positions[positions["drift_bits"].notna()]
    style = _styles(some["pattern"])
    caches = [c for c in ("state", "window", "all keys") if c in set(some["cache"])]
    bounded = [c for c in caches if c != "all keys"]
    panels = [("bounded state", bounded)]
    if "all keys" in caches:
        panels.append(("attention keeps all keys", ["all keys"]))
    # Each panel has its own scale: all keys go wrong by bits, the others by thousandths.
    figure, axes = new_figure(1, len(panels), size=(5.0 * len(panels), 4.0), squeeze=False)
    for ax, (title, kinds) in zip(axes[0], panels, strict=True):
        part = some[some["cache"].isin(kinds)]
        for pattern, look in style.items():
            one = part[part["pattern"] == pattern].astype({"drift_bits": float})
            if one.empty:
                continue
            mean = one.groupby("last_position")["drift_bits"].mean()
            ax.plot(mean.index + 1, mean, label=pattern, **look)
        ax.set_xscale("log", base=2)
        ax.set_xticks(sorted(part["last_position"].unique() + 1),
                      [f"{x:,}" for x in sorted(part["last_position"].unique() + 1)])
        ax.axhline(0.0, color=INK, linewidth=0.9)
        label_axes(ax, "position in the stream (end of bin), bytes",
                   "stream minus fresh windows, bits per byte", title)
        ax.legend()
    return figure


def tasks(frame: pd.DataFrame) -> Figure:
    """Accuracy on synthetic tasks while learning, one panel a task; the mean over seeds, of which
    one that has solved the task counts with its last accuracy."""
    kinds = list(dict.fromkeys(zip(frame["task"], frame["size"], strict=True)))
    style = _styles(frame["pattern"])
    figure, axes = new_figure(1, len(kinds), size=(max(7.2, 3.6 * len(kinds)), 3.8), sharey=True,
                              squeeze=False)
    for ax, (task, size) in zip(axes[0], kinds, strict=True):
        some = frame[(frame["task"] == task) & (frame["size"] == size)]
        for pattern, look in style.items():
            mine = some[some["pattern"] == pattern]
            mean = mine.pivot(index="step", columns="seed", values="accuracy").ffill().mean(axis=1)
            if len(mean):
                ax.plot(mean.index, mean, label=pattern, **look)
        mark_line(ax, y=float(some["chance"].iloc[0]), text="chance", right=True)
        ax.set_ylim(0, 1.05)
        label_axes(ax, "training step", "accuracy",
                   f"{task} {size} {'pairs' if task == 'recall' else 'symbols'}")
    legend_below(figure)
    return figure


def variants(frame: pd.DataFrame) -> Figure:
    """Change of held-out bits by each choice of the second document, one at a time."""
    some = frame[(frame["variant"] != "field") & frame["difference_to_field"].notna()]
    names = list(dict.fromkeys(some["variant"]))
    figure, ax = new_figure(size=(7.2, 0.42 * len(names) + 1.4))
    for y, name in enumerate(names):
        points = some[some["variant"] == name]["difference_to_field"]
        ax.plot(points, [y] * len(points), linestyle="none", marker="o", color="#0072B2")
        change = f"{points.mean():+.3f}".replace("-", "−")
        ax.annotate(change, (1.0, y), xycoords=("axes fraction", "data"), xytext=(6, 0),
                    textcoords="offset points", va="center", annotation_clip=False)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.axvline(0.0, color=INK, linewidth=0.9)
    ax.set_xlabel("held-out bits per byte minus the baseline's")
    return figure


FIGURES = (
    Drawing(
        "curves", curves, ("curves", "unigram_bits"), "Held-out bits per byte while training",
        caption="Each panel has another measure of cost: steps (data), time (steps times the "
                "median time of a step), operations. Lower is better; the same runs in every "
                "panel. The dashed line is what byte frequencies alone reach.",
        alt="Three panels of falling curves, one curve a layer pattern, against training steps, "
            "seconds and floating-point operations."),
    Drawing(
        "differences", differences, ("comparisons", "patterns", "reference"),
        "Difference to the reference at equal cost",
        caption="Paired by seed. Small marks are seeds, the bar is their mean; a vertical line is "
                "a 95 % interval, Student's t below ten seeds, and appears from three on.",
        alt="One panel a comparison; marks for each layer pattern above or below the zero line of "
            "the reference pattern."),
    Drawing(
        "state", quality_and_state, ("systems",), "Quality against streaming state",
        caption="State of one stream after one training context. Down and to the left is better.",
        alt="Scatter of held-out bits per byte against bytes of state, one mark a layer pattern."),
    Drawing(
        "drift", drift, ("positions",), "Streaming past the training context",
        caption="Bits per byte of a stream minus those of fresh windows over the same bytes, by "
                "position; mean over seeds. Above zero the stream is worse.",
        alt="Lines of the difference against position, one a layer pattern; a second panel for "
            "attention that keeps all keys."),
    Drawing(
        "tasks", tasks, ("tasks",), "Associative recall and copying",
        caption="Accuracy on unseen samples while learning, mean over seeds. A seed that has "
                "solved the task counts with its last accuracy; a curve ends where all have. The "
                "dashed line is chance.",
        alt="One panel a task; accuracy against training steps, one line a layer pattern."),
    Drawing(
        "variants", variants, ("variants",), "The second document's choices, one at a time",
        caption="Held-out bits per byte minus the baseline's on the same seed, after the same few "
                "steps. Left of zero is better. 'published' makes all changes at once.",
        alt="Horizontal dot plot of the change in bits per byte for each choice.",
        when=lambda frame: "difference_to_field" in frame and set(frame["variant"]) > {"field"}),
)
