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
         "KA", "R", "RRRA", "RA")


def _styles(systems: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The same look for a system in every figure, whatever else is drawn."""
    found = set(systems)
    styles = looks([*ORDER, *sorted(found - set(ORDER))])
    return {name: style for name, style in styles.items() if name in found}


def _curves(ax: Any, frame: pd.DataFrame, x: str, y: str, styles: dict[str, Any]) -> None:
    """A curve of ``y`` against ``x`` for each system that the frame has."""
    for system, look in styles.items():
        mine = frame[frame["system"] == system].sort_values(x)
        if len(mine):
            ax.plot(mine[x], mine[y].astype(float), label=system, **look)


def best(frame: pd.DataFrame) -> Figure:
    """Bits per byte of every system at its best rate, a panel a size and budget."""
    groups = list(frame.groupby(["size", "budget"], sort=False))
    columns = min(2 if len(groups) == 4 else 3, len(groups))
    lines = -(-len(groups) // columns)
    figure, axes = new_figure(lines, columns, size=(max(7.2, 4.2 * columns), 4.6 * lines),
                              squeeze=False)
    styles = _styles(frame["system"])
    for ax in axes.flat[len(groups):]:
        ax.set_visible(False)
    for ax, ((size, budget), rows) in zip(axes.flat, groups, strict=False):
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
        _curves(ax, rows, "rate", "chosen_by", styles)
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
    figure, axes = new_figure(rows, columns, size=(max(7.2, 3.0 * columns), 3.6 * rows),
                              squeeze=False, sharey=True)
    styles = _styles(shown["system"])
    for ax in axes.flat[len(names):]:
        ax.set_visible(False)
    for ax, task in zip(axes.flat, names, strict=False):
        some = shown[shown["task"] == task]
        _curves(ax, some, "size", "accuracy", styles)
        guess = some.drop_duplicates("size").sort_values("size")
        ax.plot(guess["size"], guess["chance"], color="black", linestyle=":", marker="",
                label="a guesser that knows the values")
        trained = some[some["trained"]]["size"]
        if len(trained) and trained.max() < some["size"].max():
            mark_line(ax, x=float(trained.max()), text="trained up to here")
        log2_axis(ax, sorted(some["size"].unique()))
        ax.set_ylim(0, 1.05)
        label_axes(ax, f"number of {some['unit'].iloc[0]}", "accuracy", task)
    legend_below(figure)
    return figure


def state(frame: pd.DataFrame) -> Figure:
    """Accuracy of recall against the bytes of state, a panel each of the four largest sizes; a
    system's widths are joined."""
    some = frame[frame["task"] == "recall"]
    sizes = sorted(some["size"].unique())[-4:]
    figure, axes = new_figure(1, len(sizes), size=(max(7.2, 3.0 * len(sizes)), 3.8),
                              squeeze=False, sharey=True)
    styles = _styles(some["system"])
    for ax, size in zip(axes[0], sizes, strict=True):
        _curves(ax, some[some["size"] == size], "state_bytes", "accuracy", styles)
        ax.set_xscale("log", base=2)
        tick_bytes(ax.xaxis)
        ax.set_ylim(0, 1.05)
        label_axes(ax, "state after a sample, bytes", "accuracy of recall", f"{size} pairs")
    legend_below(figure)
    return figure


def scaling(points: pd.DataFrame) -> Figure:
    """Bits against parameters, a panel an amount of text; a hollow mark was held back."""
    budgets = sorted(points["trained_bytes"].unique())
    figure, axes = new_figure(1, len(budgets), size=(max(7.2, 4.0 * len(budgets)), 4.4),
                              squeeze=False, sharey=True)
    styles = _styles(points["system"])
    for ax, budget in zip(axes[0], budgets, strict=True):
        for system, look in styles.items():
            mine = points[(points["system"] == system) & (points["trained_bytes"] == budget)]
            mine = mine.sort_values("n_parameters")
            if mine.empty:
                continue
            ax.plot(mine["n_parameters"], mine["by_the_law"], color=look["color"], marker="",
                    linestyle=look["linestyle"], label=system)
            for held, some in mine.groupby("held_back"):
                ax.plot(some["n_parameters"], some["valid_bits"], linestyle="none",
                        color=look["color"], marker=look["marker"],
                        fillstyle="none" if held else "full")
            out = mine[mine["held_back"]]
            ax.vlines(out["n_parameters"], out["low"], out["high"], color=look["color"])
        ax.set_xscale("log")
        label_axes(ax, "number of parameters", "validation bits per byte",
                   f"{budget / 2**20:.3g} MiB of text")
    legend_below(figure)
    return figure


def context(frame: pd.DataFrame) -> Figure:
    """Bits per byte by how often the state is reset."""
    figure, ax = new_figure()
    _curves(ax, frame, "reset_every", "bits_per_byte", _styles(frame["system"]))
    log2_axis(ax, sorted(frame["reset_every"].unique()))
    label_axes(ax, "the state is reset every so many bytes", "bits per byte")
    legend_below(figure)
    return figure


def half_lives(frame: pd.DataFrame) -> Figure:
    """Median half-life by layer, and the middle half of the channels."""
    figure, ax = new_figure()
    for i, (system, look) in enumerate(_styles(frame["system"]).items()):
        mine = frame[frame["system"] == system]
        x = mine["layer"] + 0.06 * i
        ax.plot(x, mine["half_life_50"], label=system, **look)
        ax.vlines(x, mine["half_life_25"], mine["half_life_75"], color=look["color"])
    ax.set_yscale("log")
    ax.set_xticks(sorted(frame["layer"].unique()))
    label_axes(ax, "layer", "half-life of the state, bytes")
    legend_below(figure)
    return figure


def horizon(frame: pd.DataFrame) -> Figure:
    """Share of the gradient that lies within a distance."""
    figure, ax = new_figure()
    _curves(ax, frame, "distance", "share_up_to_here", _styles(frame["system"]))
    log2_axis(ax, sorted(frame["distance"].unique()))
    label_axes(ax, "distance from the predicted byte, bytes", "share of the gradient up to there")
    legend_below(figure)
    return figure


def maps(frame: pd.DataFrame) -> Figure:
    """How much each output of a mixer depends on each input, a panel a system."""
    systems = list(_styles(frame["system"]))
    columns = min(4, len(systems))
    rows = -(-len(systems) // columns)
    figure, axes = new_figure(rows, columns, size=(max(7.2, 2.9 * columns), 3.1 * rows),
                              squeeze=False)
    for ax in axes.flat[len(systems):]:
        ax.set_visible(False)
    for ax, system in zip(axes.flat, systems, strict=False):
        draw_map(ax, frame[frame["system"] == system].pivot(
            index="output", columns="input", values="share").to_numpy(float))
        ax.set_title(system)
    return figure


def draw_map(ax: Any, shares: np.ndarray) -> None:
    """A picture of shares (outputs, inputs), nan above the diagonal."""
    ax.imshow(np.sqrt(shares), cmap="Blues", vmin=0.0, vmax=1.0, interpolation="nearest")
    label_axes(ax, "input byte", "output byte")
    ax.grid(visible=False)


def precision(frame: pd.DataFrame) -> Figure:
    """Bits lost by format and way, a panel a system."""
    systems = list(_styles(frame["system"]))
    figure, axes = new_figure(1, len(systems), size=(max(7.2, 3.2 * len(systems)), 3.8),
                              squeeze=False, sharey=True)
    ways = looks(tuple(dict.fromkeys(frame["way"])))
    for ax, system in zip(axes[0], systems, strict=True):
        for way, look in ways.items():
            mine = frame[(frame["system"] == system) & (frame["way"] == way)]
            ax.plot(mine["kept"], mine["bits_lost"].abs().clip(lower=1e-7), label=way,
                    **{**look, "linestyle": "none"})
        ax.set_yscale("log")
        label_axes(ax, "format of the state (number a byte)", "bits per byte lost, size", system)
    legend_below(figure)
    return figure


def units(frame: pd.DataFrame) -> Figure:
    """Bits per raw byte and accuracy by noise, of bytes (full marks) and pieces (hollow)."""
    figure, axes = new_figure(1, 2, size=(10.0, 4.2))
    noises = list(dict.fromkeys(frame["noise"]))
    styles = _styles(frame["system"])
    for ax, column in zip(axes, ("bits_per_raw_byte", "accuracy"), strict=True):
        for i, (system, look) in enumerate(styles.items()):
            for unit, fill in (("bytes", "full"), ("pieces", "none")):
                mine = frame[(frame["system"] == system) & (frame["units"] == unit)]
                x = [noises.index(noise) + 0.08 * (i - (len(styles) - 1) / 2)
                     for noise in mine["noise"]]
                ax.plot(x, mine[column].astype(float), label=f"{system}, {unit}",
                        **{**look, "linestyle": "none", "fillstyle": fill})
        ax.set_xticks(range(len(noises)), noises)
    label_axes(axes[0], "noise in the text (kind)", "bits per raw byte")
    label_axes(axes[1], "noise in the text (kind)", "share of raw bytes predicted right")
    legend_below(figure)
    return figure


def followed(frame: pd.DataFrame) -> Figure:
    """Step size times decay while training: quantiles, and the largest of 32 steps."""
    figure, axes = new_figure(1, 2, size=(10.0, 4.2))
    quantiles = [c for c in frame if c.startswith("q0")] + ["largest"]
    free = frame[~frame["system"].str.contains(" ")]
    for name, look in looks(quantiles).items():
        mean = free.groupby("step")[name].mean()
        label = "largest" if name == "largest" else f"quantile {name[1:]}"
        axes[0].plot(mean.index, mean, label=label, **{**look, "marker": ""})
    for system, look in looks(tuple(dict.fromkeys(frame["system"]))).items():
        for _, one in frame[frame["system"] == system].groupby("seed"):
            axes[1].plot(one["step"], one["largest_in_chunk"], label=system,
                         **{**look, "marker": "", "linewidth": 1.0})
    mark_line(axes[1], y=float(np.log(np.finfo(np.float32).max)), text="float32 overflows")
    for ax in axes:
        ax.set_yscale("log")
    label_axes(axes[0], "training step", "step size times decay, one step, exponent")
    label_axes(axes[1], "training step", "largest exponent of 32 steps")
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
        caption="Accuracy on unseen samples at each system's best rate, mean over seeds, some of "
                "which solve a size that others do not. The "
                "dotted line is a guesser that knows which values a sample holds.",
        alt="One panel a task; accuracy against size, a curve a layer pattern."),
    Drawing(
        "state", state, ("tasks",), "Recall against state",
        caption="Accuracy of associative recall against the bytes that a layer pattern carries at "
                "the end of a sample; the widths of a pattern's models are joined.",
        alt="One panel a number of pairs; accuracy against bytes of state on a logarithmic axis, a "
            "mark a model.",
        when=lambda frame: "recall" in set(frame["task"])),
    Drawing(
        "scaling", scaling, ("points",), "Laws of parameters and text",
        caption="Lines are the fitted laws. Hollow marks were held back from the fit; the line at "
                "one is the interval that the law predicts for it.",
        alt="One panel an amount of text; bits per byte against parameters, a curve a system."),
    Drawing(
        "context", context, ("context",), "Effective context",
        caption="The same validation bytes with the state reset every so many bytes. Where a curve "
                "is flat, resets do no harm; where each reset costs the same, it falls as one over "
                "the distance. Attention keeps the keys of one training context. One model each.",
        alt="Bits per byte against the distance between resets, a curve a system."),
    Drawing(
        "half_lives", half_lives, ("half_lives",), "How soon the state forgets",
        caption="Median over channels by layer; the vertical line is the middle half.",
        alt="Half-life on a logarithmic axis against the layer, a curve a system."),
    Drawing(
        "horizon", horizon, ("horizon",), "Gradient horizon",
        caption="Share of the gradient of the last byte's loss, with respect to the embedded bytes "
                "before it, that lies within a distance.",
        alt="Rising curves of the share against distance, a curve a system."),
    Drawing(
        "maps", maps, ("maps",), "Implicit attention",
        caption="How much each output of a middle layer's mixer depends on each input, rows adding "
                "up to 1, drawn as square roots: the norm of a gradient, so that a mixer with a "
                "state has a map as attention has.",
        alt="One square a system, dark where an output depends on an input; all lie on or below "
            "the diagonal."),
    Drawing(
        "precision", precision, ("precision",), "A state of fewer bits",
        caption="Bits per byte of a stream minus those with a float32 state, without their sign: "
                "differences below some 1e-4 are of either sign.",
        alt="One panel a system; bits lost on a logarithmic axis by format, a mark a way of "
            "rounding."),
    Drawing(
        "units", units, ("units",), "Bytes and pieces, and noise",
        caption="Validation text as it is, and with noise that no training had. Full marks are "
                "bytes, hollow ones 1,024 pieces; both read the same raw bytes of training text.",
        alt="Two panels, bits per raw byte and accuracy; a group of marks a noise."),
    Drawing(
        "followed", followed, ("followed",), "Step size times decay while training",
        caption="Left: quantiles over layers, channels and bytes of Mamba-1, its step size free, "
                "mean over seeds. Right: the largest exponent of 32 steps of every training.",
        alt="Two panels of curves against the training step on logarithmic axes."),
)
