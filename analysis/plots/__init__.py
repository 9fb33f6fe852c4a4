"""Figures of one piece: new_figure gives axes in the house style, the rest labels them.

A study's figures are in ``analysis/studies/STUDY/figures.py``: functions that take a DataFrame and
return a matplotlib Figure. Colours, line styles and markers come from the style's cycle, so line
style and marker repeat what the colour says; ask for ``look(i)`` where the order must be fixed.

The report recolours ink, grid and the cycle's colours for dark screens.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.style
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

STYLE = Path(__file__).resolve().parent / "style.mplstyle"

# Colours by name, the okabe_ito set as matplotlib has it.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"
)
INK, MUTED, GRID = "#22272e", "#8a929c", "#dfe3e8"
PAPER, PANEL = "#ffffff", "#f2f4f7"  # the page, and a cell that is to stand back

_ABOVE = "_named-above"  # marks a text above the axes, which the title must clear

# "time, s", "peak (MiB)", "loss [nats]": a unit after a comma or in brackets. A pure number says
# so: "ratio, 1" would be pedantic, so these words count as their own unit.
_UNIT = re.compile(r",\s*\S|[(\[].+[)\]]")
_UNITLESS = re.compile(
    r"\b(ratio|fraction|relative|error|number|count|index|step|steps|position|distance|accuracy|"
    r"exponent|layer|form|share|correlation|log-decay|times|seed|seeds|chunk|length|bytes|byte|"
    r"bits|seconds|tokens|characters|pattern)\b", re.IGNORECASE)


class StudyFigure(Figure):
    """A Figure that a notebook shows when it is the last line of a cell.

    Made without pyplot, so no figure stays open behind the notebook's back and none is shown
    twice.
    """

    # What a plot does once more when its panels have another size: see analysis.plots.phone.
    again: Callable[[Sequence[Axes]], None] | None = None

    def _repr_svg_(self) -> str:
        buffer = io.StringIO()
        self.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        return buffer.getvalue()


def new_figure(
    rows: int = 1, columns: int = 1, *, size: tuple[float, float] | None = None, **subplots: Any
) -> tuple[Figure, Any]:
    """A Figure and its Axes (an array of them for more than one) in the house style.

    ``size`` is (width, height) in inches; the default is 7.2 x 4.2 for one, wider and taller for
    several. ``subplots`` goes to matplotlib, e.g. ``sharey=True``. No title is needed: the report
    prints it above the figure.

    The style is set for the process, not for the call: matplotlib reads line widths, legends and
    the like when they are drawn, which is after this returns.
    """
    matplotlib.style.use(STYLE)
    if size is None:
        size = (7.2 if columns == 1 else 10.0, 4.2 if rows == 1 else 3.3 * rows)
    figure = StudyFigure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, **subplots)


def look(i: int) -> dict[str, Any]:
    """Colour, line style and marker number ``i`` of the house cycle, as keyword arguments.

    After its end colours come again, each with another line style and marker.
    """
    cycle = list(mpl.rc_params_from_file(STYLE, use_default_template=False)["axes.prop_cycle"])
    again, place = divmod(i, len(cycle))
    return {**cycle[(place + 3 * again) % len(cycle)], "color": cycle[place]["color"]}


def looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """One look a name, in order: the same series looks the same in every figure of a study."""
    return {name: look(i) for i, name in enumerate(names)}


def label_axes(axes: Axes, x: str, y: str, title: str = "") -> None:
    """Axis labels; each must name its unit: "peak memory, MiB", "chunk size, steps"."""
    for label in (x, y):
        if not (_UNIT.search(label) or _UNITLESS.search(label)):
            raise ValueError(f"axis label {label!r} names no unit: write e.g. 'time, ms'")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if title:
        axes.set_title(title, pad=title_pad(axes))


def legend_below(figure: Figure) -> None:
    """One legend of all panels below them, each name once: for lines that cross each other or end
    too early to be named at an end."""
    handles: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    figure.legend(handles=list(handles.values()), loc="outside lower center", ncols=4)


def label_lines(
    axes: Axes, labels: Mapping[str, tuple[float, float, str]], *, gap: float = 0.055
) -> None:
    """Names at the right end of lines instead of a legend, moved apart so that none overlap.

    ``labels``: name -> (x, y, colour) of the line's last point, in data units. ``gap`` is the
    least distance between two names as a share of the axes' height. Call it last: the limits of
    the axes must be final.
    """
    to_axes = axes.transAxes.inverted()
    ends = []
    for name, (x, y, colour) in labels.items():
        if np.isfinite(x) and np.isfinite(y):
            height = to_axes.transform(axes.transData.transform((x, y)))[1]
            ends.append((float(np.clip(height, 0.0, 1.0)), name, colour))
    ends.sort()
    heights = [end[0] for end in ends]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    overflow = max(heights[-1] - 1.0, 0.0) if heights else 0.0
    for i in reversed(range(len(heights))):
        limit = 1.0 if i == len(heights) - 1 else heights[i + 1] - gap
        heights[i] = min(heights[i], limit) if overflow else heights[i]
    for height, (_, name, colour) in zip(heights, ends, strict=True):
        axes.annotate(name, (1.0, height), xycoords="axes fraction", xytext=(7, 0),
                      textcoords="offset points", va="center", color=colour, fontsize=10,
                      fontweight="bold", annotation_clip=False)


def mark_line(
    axes: Axes, *, x: float | None = None, y: float | None = None, text: str, right: bool = False
) -> None:
    """A thin reference line with its meaning (a bound, a budget, a floor) above or on it.

    The text of a line across stands at the left; with ``right`` at the other end, for a figure
    whose curves meet the line on the left.
    """
    style: dict[str, Any] = {"color": INK, "linewidth": 1.1, "linestyle": (0, (5, 3)), "zorder": 1}
    words: dict[str, Any] = {"color": INK, "fontsize": 9.5, "textcoords": "offset points"}
    if x is not None:
        axes.axvline(x, **style)
        axes.annotate(text, (x, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 3),
                      va="bottom", ha="center", label=_ABOVE, **words)
        title = axes.get_title(loc="left")
        if title:
            axes.set_title(title, loc="left", pad=title_pad(axes))
    if y is not None:
        axes.axhline(y, **style)
        axes.annotate(text, (float(right), y), xycoords=("axes fraction", "data"),
                      xytext=(-5 if right else 5, 4), va="bottom",
                      ha="right" if right else "left", **words)


def title_pad(axes: Axes) -> float:
    """Points between axes and title: more where a reference line is named in between."""
    return 22.0 if any(text.get_label() == _ABOVE for text in axes.texts) else 10.0


def binary_bytes(value: float, _position: int | None = None) -> str:
    """1536 -> "1.5 KiB"; usable as a tick formatter."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            return f"{float(f'{value:.3g}'):g} {unit}"  # 1000 MiB, and not 1e+03 MiB
        value /= 1024
    raise AssertionError("not reached")


def tick_bytes(axis: Any) -> None:
    """Ticks of an axis in B, KiB, MiB, GiB."""
    axis.set_major_formatter(FuncFormatter(binary_bytes))


def tick_with(axis: Any, text: Callable[[float], str]) -> None:
    """Ticks of an axis by a function of the value."""
    axis.set_major_formatter(FuncFormatter(lambda value, _position: text(value)))


def log2_axis(axes: Axes, ticks: Sequence[float]) -> None:
    """A base-2 logarithmic x axis: 512, 4,096, then 16 Ki, 1 Mi at the given ticks."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_ticks(list(ticks))
    tick_with(axes.xaxis, _power_of_two)
    axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())


def _power_of_two(value: float) -> str:
    for size, unit in ((2**20, "Mi"), (2**10, "Ki")):
        if value >= max(size, 10_000) and value % size == 0:
            return f"{value / size:,.0f} {unit}"
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"
