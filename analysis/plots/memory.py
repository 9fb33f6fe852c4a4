"""Figures of the memory study. Each takes one DataFrame of analysis.memory.Memory."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import plots

# Category -> colour and hatching: the hatching says what the colour says.
PARTS = {
    "weights, gradients, AdamW": (plots.BLACK, ""),
    "activations kept": (plots.BLUE, "//"),
    "workspace at the peak, libraries": (plots.ORANGE, ".."),
}
PATTERNS = {"M": "SSM (M)", "A": "attention, full KV cache (A)", "MMMA": "hybrid 3:1 (MMMA)"}


def budget_bars(budgets: pd.DataFrame, configuration: str, devices_gb: tuple[int, ...]) -> Figure:
    """Peak bytes of one training step by category, a bar for each scan form and autocast state."""
    rows = budgets[(budgets["configuration"] == configuration) & ~budgets["checkpointing"]]
    rows = rows.iloc[::-1].reset_index(drop=True)
    figure, axes = plots.new_figure(size=(8.4, 0.38 * len(rows) + 1.6))
    y = np.arange(len(rows))
    left = np.zeros(len(rows))
    widths = {
        "weights, gradients, AdamW":
            rows["weights, GB"] + rows["gradients, GB"] + rows["AdamW, GB"],
        "activations kept": rows["activations, GB"],
        "workspace at the peak, libraries": rows["workspace, GB"] + rows["libraries, GB"],
    }
    for name, (colour, hatch) in PARTS.items():
        width = widths[name].to_numpy()
        axes.barh(y, width, left=left, color=colour, hatch=hatch, edgecolor="white", label=name,
                  linewidth=0.6)
        left = left + width
    for i, total in enumerate(left):  # on paper of its own, so that no device's line crosses it
        axes.text(total + left.max() * 0.015, i, f"{total:.3g}", va="center", fontsize=9.5,
                  color=plots.INK, bbox={"facecolor": plots.PAPER, "edgecolor": "none", "pad": 1.5})
    shown = [gb for gb in devices_gb if gb < left.max() * 1.12]
    for gb in shown:
        plots.mark_line(axes, x=gb, text=f"{gb} GB device")
    axes.set_yticks(y, [f"{f}, {a}" for f, a in zip(rows["form"], rows["autocast"], strict=True)])
    axes.set_xlim(0, left.max() * 1.12)
    axes.grid(axis="y", visible=False)
    plots.label_axes(axes, f"bytes of one training step at {configuration}, GB", "scan form")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def state_lines(state: pd.DataFrame) -> Figure:
    """Bytes of the streaming state over the bytes seen: constant, or growing for ever."""
    figure, axes = plots.new_figure()
    ends = {}
    for pattern, look in plots.looks(list(PATTERNS)).items():
        rows = state[state["pattern"] == pattern]
        axes.plot(rows["bytes seen"], rows["state, B"], **look)
        ends[PATTERNS[pattern]] = (rows["bytes seen"].iloc[-1], rows["state, B"].iloc[-1],
                                   look["color"])
    _bytes_against(axes, state["bytes seen"], "bytes seen", "streaming state, bytes")
    plots.label_lines(axes, ends)
    return figure


def slice_lines(slices: pd.DataFrame) -> Figure:
    """Bytes that one backward pass allocates over the length: quadratic against linear."""
    figure, axes = plots.new_figure()
    names = list(dict.fromkeys(slices["how"]))
    ends = {}
    for name, look in plots.looks(names).items():
        rows = slices[slices["how"] == name]
        x = rows["length, steps"].to_numpy(float)
        y = rows["allocated in backward, B"].to_numpy(float)
        axes.plot(x, y, **look)
        ends[name] = (x[-1], y[-1], look["color"])
    _bytes_against(axes, slices["length, steps"], "length, steps",
                   "allocated in one backward pass, bytes")
    plots.label_lines(axes, ends)
    return figure


def _bytes_against(axes: Axes, x: pd.Series, x_label: str, y_label: str) -> None:
    """Both axes in powers of two, the upright one in bytes."""
    axes.set_yscale("log", base=2)
    plots.log2_axis(axes, "x", sorted(x.unique()))
    plots.tick_bytes(axes.yaxis)
    plots.label_axes(axes, x_label, y_label)
