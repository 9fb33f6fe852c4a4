"""Figures of the memory study. Each takes a DataFrame of its results."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import plots
from analysis.studies.drawing import Drawing
from mambabyte.config.mixers import kind_of

# Category -> colour and hatching: the hatching says what the colour says.
PARTS = {
    "weights, gradients, AdamW": (plots.BLACK, ""),
    "activations kept": (plots.BLUE, "//"),
    "workspace at the peak, libraries": (plots.ORANGE, ".."),
}
SIZE = (5.2, 3.8)  # inches: on a phone the words are still as large as those around the figure


def budget_bars(budgets: pd.DataFrame, configuration: str, devices_gb: tuple[int, ...]) -> Figure:
    """Peak bytes of one training step by category: two bars a scan form, fp32 above bf16.

    Names stand at the left and totals at the right of the axes, where no device's line is.
    """
    rows = budgets[(budgets["configuration"] == configuration) & ~budgets["checkpointing"]]
    forms = list(dict.fromkeys(rows["form"]))[::-1]
    figure, axes = plots.new_figure(size=(SIZE[0], 0.62 * len(forms) + 1.7))
    # The first autocast state of a form is its upper bar.
    y = np.array([forms.index(f) for f in rows["form"]]) + 0.2 - 0.4 * rows.groupby(
        "form").cumcount().to_numpy()
    left = np.zeros(len(rows))
    widths = {
        "weights, gradients, AdamW":
            rows["weights, GB"] + rows["gradients, GB"] + rows["AdamW, GB"],
        "activations kept": rows["activations, GB"],
        "workspace at the peak, libraries": rows["workspace, GB"] + rows["libraries, GB"],
    }
    for name, (colour, hatch) in PARTS.items():
        width = widths[name].to_numpy()
        axes.barh(y, width, 0.36, left=left, color=colour, hatch=hatch, edgecolor="white",
                  label=name, linewidth=0.6)
        left = left + width
    for height, total, autocast in zip(y, left, rows["autocast"], strict=True):
        axes.annotate(f"{autocast}  {total:.3g} GB", (1.0, height), xytext=(5, 0), va="center",
                      xycoords=("axes fraction", "data"), textcoords="offset points",
                      fontsize=9.5, color=plots.INK, annotation_clip=False)
    # As far as a device that holds every step, unless the steps would be too small to see.
    limit = max([1.05 * left.max(), *(1.04 * gb for gb in devices_gb if gb < 2 * left.max())])
    named = limit
    for gb in sorted(devices_gb, reverse=True):
        if gb < limit and (named - gb > 0.2 * limit or named == limit):
            plots.mark_line(axes, x=gb, text=f"{gb} GB")
            named = gb
    axes.set_yticks(range(len(forms)), forms)
    axes.set_xlim(0, limit)
    axes.grid(axis="y", visible=False)
    plots.label_axes(axes, "bytes, GB; dashed: memory of a device", "scan form")
    axes.set_ylabel("")  # the names say what they are
    figure.legend(loc="outside lower left", ncols=1)
    return figure


def measured_peaks(cuda: pd.DataFrame, devices_gb: tuple[int, ...]) -> Figure:
    """Peaks that an allocator measured, bf16 without checkpointing, by batch and context and scan
    form; a tick is the closed form."""
    rows = cuda[(cuda["layers"] == "MMMM") & (cuda["autocast"] == "bf16")
                & ~cuda["checkpointing"] & (cuda["outcome"] == "measured")]
    shapes = sorted(set(zip(rows["batch"], rows["context"], strict=True)),
                    key=lambda shape: shape[0] * shape[1])
    forms = list(dict.fromkeys(rows["form"]))
    figure, axes = plots.new_figure(size=(7.6, 4.4))
    ends = {}
    for form, look in plots.looks(forms).items():
        one = rows[rows["form"] == form]
        x = np.array([shapes.index(s) for s in zip(one["batch"], one["context"], strict=True)])
        axes.plot(x, one["peak, measured, MB"] / 1e3, **(look | {"linestyle": "-"}))
        axes.plot(x, one["peak, closed form, MB"] / 1e3, linestyle="none", marker="_",
                  markersize=22, color=plots.INK, zorder=4)
        ends[form] = (x[-1], one["peak, measured, MB"].iloc[-1] / 1e3, look["color"])
        if x[-1] < len(shapes) - 1:  # its line ends where there is no room beside the axes
            _name_line(axes, pd.Series(x), one["peak, measured, MB"] / 1e3, form, look["color"],
                       above=False)
            del ends[form]
    axes.set_yscale("log")
    axes.set_xticks(range(len(shapes)), [f"{b} × {c:,}" for b, c in shapes])
    axes.set_xlim(-0.3, len(shapes) - 0.7)
    axes.set_yticks([0.3, 1, 3, 10, 30, 100])
    plots.tick_with(axes.yaxis, "{:g}".format)
    axes.yaxis.set_minor_locator(plots.mpl.ticker.NullLocator())
    for gb in devices_gb:
        plots.mark_line(axes, y=gb, text=f"{gb} GB device")
    plots.label_axes(axes, "batch × context, windows of bytes", "peak of a training step, GB")
    plots.label_lines(axes, ends)
    return figure


def state_lines(state: pd.DataFrame) -> Figure:
    """Bytes of the streaming state over the bytes seen: constant, or growing for ever."""
    figure, axes = plots.new_figure(size=(SIZE[0], 4.4))
    for pattern, look in plots.looks(list(dict.fromkeys(state["pattern"]))).items():
        rows = state[state["pattern"] == pattern]
        axes.plot(rows["bytes seen"], rows["state, B"], **look,
                  label=f"{kind_of(pattern)} ({pattern})")
    _bytes_against(axes, state["bytes seen"], "bytes seen", "streaming state, bytes")
    figure.legend(loc="outside lower left", ncols=2)
    return figure


def slice_lines(slices: pd.DataFrame) -> Figure:
    """Bytes that one backward pass allocates over the length: quadratic against linear."""
    figure, axes = plots.new_figure(size=SIZE)
    names = list(dict.fromkeys(slices["how"]))
    for i, (name, look) in enumerate(plots.looks(names).items()):
        rows = slices[slices["how"] == name]
        axes.plot(rows["length, steps"], rows["allocated in backward, B"], **look)
        _name_line(axes, rows["length, steps"], rows["allocated in backward, B"], name,
                   look["color"], above=i == 0)
    _bytes_against(axes, slices["length, steps"], "length, steps",
                   "allocated in one backward pass, bytes")
    return figure


def _name_line(
    axes: Axes, x: pd.Series, y: pd.Series, name: str, colour: str, above: bool
) -> None:
    """The name of a line that does not fall: left of and above its end, or right of and below
    its middle. Nothing crosses it there, and no room beside the axes is needed."""
    at = len(x) - 1 if above else (len(x) - 1) // 2
    axes.annotate(name, (x.iloc[at], y.iloc[at]), xytext=(-10, 2) if above else (8, -5),
                  textcoords="offset points", ha="right" if above else "left",
                  va="bottom" if above else "top", color=colour, fontsize=10, fontweight="bold")


def _bytes_against(axes: Axes, x: pd.Series, x_label: str, y_label: str) -> None:
    """Both axes in powers of two, the upright one in bytes."""
    axes.set_yscale("log", base=2)
    values = sorted(x.unique())
    plots.log2_axis(axes, values[::-(-len(values) // 6)][::-1])
    plots.tick_bytes(axes.yaxis)
    plots.label_axes(axes, x_label, y_label)


FIGURES = (
    Drawing(
        "budget", partial(budget_bars, configuration="64 x 2048", devices_gb=(40, 80, 141)),
        ("budgets",), "One training step at batch 64, context 2048",
        caption="Peak bytes by category, predicted for a GPU. The cumulated-sum forms and the "
                "chunked form keep five full tensors a layer and are far beyond a 40 GB device; "
                "the recurrent form keeps two; the fused scan keeps none. bf16 autocast (the "
                "lower bar of each form) changes little: the full tensors stay float32. Weights, "
                "gradients and AdamW's moments are too small to be seen at this scale.",
        alt="Stacked horizontal bars of predicted peak memory for each scan form, in float32 and "
            "under bf16 autocast, with dashed lines at devices of 40, 80 and 141 GB."),
    Drawing(
        "cuda", partial(measured_peaks, devices_gb=(40,)), ("cuda",),
        "Peak of a training step by scan form, measured",
        caption="Four layers of width 192, bf16 autocast, no checkpointing: the allocator's peak, "
                "by batch and context. Level ticks: the closed form. Up to the largest step no "
                "form but the fused one stays below a 40 GB device.",
        alt="Lines on a log axis of gigabytes over four sizes of a step; the fused scan lies a "
            "factor of ten to twenty below the others, and each mark has the closed form on it."),
    Drawing(
        "state", state_lines, ("state",), "Streaming state against bytes seen",
        caption="The states of recurrent layers do not grow, and that of local attention stops "
                "growing at its window. A full KV cache grows with every byte, and so does a "
                "hybrid's, at a quarter of the rate.",
        alt="Log-log lines: the states of recurrent mixers are constant, those of attention and of "
            "the hybrid grow in proportion to the bytes seen."),
    Drawing(
        "slices", slice_lines, ("slices",), "Slices in a loop make the backward pass quadratic",
        caption="Bytes that one backward pass of a scan in chunks of 32 allocates in all. The "
                "gradient of a slice is as long as the sequence, that of split as long as the "
                "chunk.",
        alt="Log-log lines of allocated bytes against length: steeper for slices than for split."),
)
