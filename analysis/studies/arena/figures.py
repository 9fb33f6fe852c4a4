"""Figures of the arena: DataFrames in, matplotlib Figures out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.plots import (
    label_axes,
    legend_below,
    log2_axis,
    looks,
    mark_line,
    new_figure,
    tick_bytes,
)
from analysis.studies.drawing import Drawing

ORDER = ("M", "S", "D", "K", "A", "A/2", "L", "MMMA", "SSSA", "DDDA", "KKKA", "MA", "SA", "DA",
         "KA")


def _styles(systems: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The same look for a system in every figure, whatever else is drawn."""
    found = set(systems)
    styles = looks([*ORDER, *sorted(found - set(ORDER))])
    return {name: style for name, style in styles.items() if name in found}


def best(frame: pd.DataFrame) -> Figure:
    """Bits per byte of every system at its best rate, a panel a size and budget."""
    groups = list(frame.groupby(["size", "budget"], sort=False))
    figure, axes = new_figure(1, len(groups), size=(max(7.2, 4.2 * len(groups)), 4.6),
                              squeeze=False)
    styles = _styles(frame["system"])
    for ax, ((size, budget), rows) in zip(axes[0], groups, strict=True):
        rows = rows.sort_values("bits_per_byte", ascending=False)
        for y, row in enumerate(rows.to_dict("records")):
            look = styles[row["system"]]
            ax.plot([row["bits_per_byte"]], [y], color=look["color"], marker=look["marker"])
            if pd.notna(row["low"]):
                ax.plot([row["low"], row["high"]], [y, y], color=look["color"], marker="",
                        linestyle="-")
        ax.set_yticks(range(len(rows)), rows["system"])
        label_axes(ax, "validation bits per byte", "layer pattern",
                   f"{size} parameters, {budget / 2**20:.3g} MiB of text")
    return figure


def sensitivity(frame: pd.DataFrame) -> Figure:
    """Bits per byte against the learning rate, a panel a size and optimizer."""
    groups = list(frame.groupby(["size", "optimizer"], sort=False))
    figure, axes = new_figure(1, len(groups), size=(max(7.2, 4.2 * len(groups)), 4.4),
                              squeeze=False, sharey=False)
    styles = _styles(frame["system"])
    for ax, ((size, optimizer), rows) in zip(axes[0], groups, strict=True):
        for system, look in styles.items():
            mine = rows[rows["system"] == system].sort_values("rate")
            if len(mine):
                ax.plot(mine["rate"], mine["chosen_by"].astype(float), label=system, **look)
        ax.set_xscale("log", base=2)
        rates = sorted(rows["rate"].unique())
        ax.set_xticks(rates, [f"{rate:g}" for rate in rates], rotation=45)
        ax.minorticks_off()
        name = {"adamw": "AdamW", "muon": "Muon"}.get(optimizer, optimizer)
        label_axes(ax, f"largest rate of {name}, a step", "bits per byte of held-out training text",
                   f"{size}, {name}")
    legend_below(figure)
    return figure


def tasks(frame: pd.DataFrame) -> Figure:
    """Accuracy against size, a panel a task, at the largest width."""
    shown = frame[frame["width"] == frame.groupby("task")["width"].transform("max")]
    names = list(dict.fromkeys(shown["task"]))
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure, axes = new_figure(rows, columns, size=(max(7.2, 3.3 * columns), 3.6 * rows),
                              squeeze=False, sharey=True)
    styles = _styles(shown["system"])
    for ax in axes.flat[len(names):]:
        ax.set_visible(False)
    for ax, task in zip(axes.flat, names, strict=False):
        some = shown[shown["task"] == task]
        for system, look in styles.items():
            mine = some[some["system"] == system].sort_values("size")
            if len(mine):
                ax.plot(mine["size"], mine["accuracy"], label=system, **look)
        guess = some.drop_duplicates("size").sort_values("size")
        ax.plot(guess["size"], guess["chance"], color="black", linestyle=":", marker="",
                label="a guesser that knows the values")
        if not some["trained"].all():
            mark_line(ax, x=float(some[some["trained"]]["size"].max()), text="trained up to here")
        log2_axis(ax, "x", sorted(some["size"].unique()))
        ax.set_ylim(0, 1.05)
        label_axes(ax, f"number of {some['unit'].iloc[0]}", "accuracy", task)
    legend_below(figure)
    return figure


def state(frame: pd.DataFrame) -> Figure:
    """Accuracy of recall, the mean over sizes, against the bytes of state."""
    some = frame[frame["task"] == "recall"]
    figure, ax = new_figure(size=(7.2, 4.2))
    for system, look in _styles(some["system"]).items():
        mine = some[some["system"] == system].groupby("state_bytes")["accuracy"].mean()
        ax.plot(mine.index, np.asarray(mine), label=system, **look)
    ax.set_xscale("log", base=2)
    tick_bytes(ax.xaxis)
    ax.set_ylim(0, 1.05)
    label_axes(ax, "state after a sample, bytes", "accuracy of recall, mean over sizes")
    legend_below(figure)
    return figure


FIGURES = (
    Drawing(
        "best", best, ("best",), "Every system at its best rate",
        caption="Validation bits per byte, lower is better. A line is the 95 % interval over "
                "seeds, and appears from three on.",
        alt="One panel a size and budget; a mark a layer pattern, from worst to best."),
    Drawing(
        "sensitivity", sensitivity, ("sensitivity",), "Sensitivity to the learning rate",
        caption="Bits per byte of held-out training text, one seed. A curve that ends early "
                "diverged or was not tried there. Muon's rate is that of matrices; all else has a "
                "tenth of it, by AdamW.",
        alt="One panel a size and optimizer; curves of bits per byte against the rate."),
    Drawing(
        "tasks", tasks, ("tasks",), "Tasks that ask one thing",
        caption="Accuracy on unseen samples at each system's best rate, mean over seeds. The "
                "dotted line is a guesser that knows which values a sample holds.",
        alt="One panel a task; accuracy against size, a curve a layer pattern."),
    Drawing(
        "state", state, ("tasks",), "Recall against state",
        caption="Accuracy of associative recall, mean over sizes, against the bytes that a layer "
                "pattern carries at the end of a sample, by width of the model.",
        alt="Accuracy against bytes of state on a logarithmic axis, a curve a layer pattern.",
        when=lambda frame: "recall" in set(frame["task"])),
)
