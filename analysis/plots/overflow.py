"""Figures of the overflow study. Each takes a DataFrame of analysis.overflow.Overflow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from analysis import plots

# What a cell shows -> colour and hatching, from harmless to lost.
OUTCOMES = {
    "right, within 0.1 %": ("#f2f4f7", ""),
    "off by 0.1 to 1 %": (plots.SKY, ""),
    "silent: finite, off by more than 1 %": (plots.ORANGE, "////"),
    "value right, gradient inf or nan": (plots.PURPLE, "...."),
    "loud: inf or nan": (plots.VERMILION, "xxxx"),
}
_LEVEL = {"right": 0, "rough": 1, "silent": 2}


def error_maps(
    errors: pd.DataFrame, forms: Sequence[str], boundary: Callable[[str, float], float],
    kind: str = "constant", precision: str = "float32",
) -> Figure:
    """One map a form: chunk size against decay, what came out, and the analytic bound over it."""
    columns = 3
    rows = -(-len(forms) // columns)
    figure, grid = plots.new_figure(
        rows, columns, size=(10.0, 2.9 * rows + 0.9), sharey=True)
    chosen = errors[(errors["kind"] == kind) & (errors["precision"] == precision)]
    cells = np.atleast_2d(grid).ravel()
    for axes, form in zip(cells, forms, strict=False):
        _map(axes, chosen[chosen["form"] == form], partial(boundary, form))
        axes.set_title(form)
    for axes in cells[len(forms):]:
        axes.set_visible(False)
    for i, axes in enumerate(cells[:len(forms)]):
        plots.label_axes(axes, "log-decay per step, nats", "chunk size, steps")
        axes.tick_params(labelbottom=True)
        if i % columns:
            axes.set_ylabel("")
        if i < len(forms) - columns:
            axes.set_xlabel("")
    handles = [Patch(facecolor=c, hatch=h, edgecolor="white" if h else plots.MUTED, label=name)
               for name, (c, h) in OUTCOMES.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def _level(row: pd.Series) -> int:
    value, gradient = row["value"], row["gradient"]
    if value in ("inf", "nan"):
        return 4
    if gradient in ("inf", "nan"):
        return 3
    return max(_LEVEL[value], _LEVEL[gradient])


def _map(axes: plots.Axes, rows: pd.DataFrame, bound: Callable[[float], float]) -> None:
    levels = rows.assign(level=rows.apply(_level, axis=1)).pivot_table(
        index="chunk", columns="decay", values="level", aggfunc="max")
    decay, chunk = levels.columns.to_numpy(float), levels.index.to_numpy(float)
    x, y = _edges(decay), _edges(chunk)
    looks = list(OUTCOMES.values())
    for (row, column), level in np.ndenumerate(levels.to_numpy()):
        colour, hatch = looks[int(level)]
        left, bottom = float(x[column]), float(y[row])
        width, height = float(x[column + 1]) - left, float(y[row + 1]) - bottom
        axes.add_patch(Rectangle((left, bottom), width, height, facecolor=colour, hatch=hatch,
                                 edgecolor="white", linewidth=0.4))
    line = np.geomspace(x[0], x[-1], 80)
    limits = np.array([bound(v) for v in line])
    if np.isfinite(limits).any():
        axes.plot(line, limits, color=plots.BLACK, linestyle="--", linewidth=1.6, marker="")
    axes.set_xscale("log")
    axes.set_yscale("log", base=2)
    axes.set_xlim(x[0], x[-1])
    axes.set_ylim(y[0], y[-1])
    axes.grid(False)
    axes.set_yticks(chunk, [f"{v:g}" for v in chunk])
    axes.yaxis.set_minor_locator(plots.mpl.ticker.NullLocator())


def _edges(centres: np.ndarray) -> np.ndarray:
    """Edges of cells around logarithmically placed centres."""
    logs = np.log(centres)
    if len(logs) == 1:
        return np.exp(np.array([logs[0] - 0.5, logs[0] + 0.5]))
    middle = (logs[1:] + logs[:-1]) / 2
    first, last = 2 * logs[0] - middle[0], 2 * logs[-1] - middle[-1]
    return np.exp(np.concatenate([[first], middle, [last]]))


def gradient_noise(errors: pd.DataFrame, chunk: int, forms: Sequence[str]) -> Figure:
    """Error of the gradient of A over the decay: noise where the truth is small, then nan."""
    figure, axes = plots.new_figure()
    chosen = errors[(errors["kind"] == "constant") & (errors["precision"] == "float32")
                    & (errors["chunk"] == chunk)]
    ends = {}
    for form, look in plots.looks(list(forms)).items():
        rows = chosen[chosen["form"] == form].sort_values("decay")
        rows = rows[np.isfinite(rows["error of d A"])]
        axes.plot(rows["decay"], rows["error of d A"], **look)
        if len(rows):
            ends[form] = (rows["decay"].iloc[-1], rows["error of d A"].iloc[-1], look["color"])
    axes.set_xscale("log")
    axes.set_yscale("log")
    plots.label_axes(axes, "log-decay per step, nats", "relative error of the gradient of A")
    plots.mark_line(axes, y=1e-2, text="1 %")
    plots.label_lines(axes, ends)
    return figure


def error_by_position(positions: pd.DataFrame, chunk: int) -> Figure:
    """Error of y by position on a log axis, chunks as bands; what is inf or nan is marked above."""
    figure, axes = plots.new_figure()
    x, error = positions["position"].to_numpy(), positions["error"].to_numpy(float)
    for start in range(0, len(x), 2 * chunk):
        axes.axvspan(start - 0.5, min(start + chunk, len(x)) - 0.5, color=plots.PANEL, zorder=0)
    finite = np.isfinite(error)
    axes.plot(x[finite], error[finite].clip(1e-9), marker="", color=plots.BLUE)
    axes.plot(x[~finite], np.ones((~finite).sum()), "x", color=plots.VERMILION,
              label="inf or nan")
    axes.set_yscale("log")
    axes.set_xlim(-0.5, len(x) - 0.5)
    axes.set_ylim(5e-10, max(2.0, error[finite].max(initial=0.0) * 2))
    axes.grid(axis="x", visible=False)
    plots.mark_line(axes, y=1e-2, text="1 %")
    plots.label_axes(axes, "position, steps", "relative error of y")
    if not finite.all():
        axes.legend(loc="lower right")
    return figure


def pair_shares(pairs: pd.DataFrame) -> Figure:
    """Share of pairs past the bound over the length: closed form, counted, and channels lost."""
    figure, axes = plots.new_figure()
    names = {
        "closed form, share of pairs": "pairs, closed form",
        "counted, share of pairs": "pairs, counted",
        "counted, share of channels": "channels, counted",
    }
    ends = {}
    for (column, name), look in zip(names.items(), map(plots.look, range(3)), strict=True):
        axes.plot(pairs["length, steps"], 100 * pairs[column], **look)
        ends[name] = (pairs["length, steps"].iloc[-1], 100 * pairs[column].iloc[-1],
                      look["color"])
    plots.log2_axis(axes, "x", [16, 32, 64, 128, 256, 512, 1024])
    plots.label_axes(axes, "length, steps", "past the bound of float32, %")
    plots.label_lines(axes, ends)
    return figure


def headroom_lines(followed: pd.DataFrame, bound: float) -> Figure:
    """The largest exponent of a chunk of 32 while a model trains, a line each form, and the bound.
    """
    figure, axes = plots.new_figure()
    ends = {}
    names = list(dict.fromkeys(followed["form"]))
    for name, look in plots.looks(names).items():
        rows = followed[followed["form"] == name]
        line = rows.groupby("step")["largest exponent in 32 steps"].max()
        axes.plot(line.index, line, markevery=max(1, len(line) // 10), **look)
        ends["stable (auto)" if name == "auto" else name] = (
            line.index[-1], line.iloc[-1], look["color"])
    axes.set_ylim(0, max(bound * 1.1, followed["largest exponent in 32 steps"].max() * 1.05))
    plots.mark_line(axes, y=bound, text="float32 overflows")
    plots.label_axes(axes, "training step", "largest cumulated log-decay, nats")
    plots.label_lines(axes, ends)
    return figure
