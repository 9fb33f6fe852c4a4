"""The same figure for a phone: as wide as its screen, panels one below the other, text as large.

Works on any figure of this package, so a study draws once and the report has both.
"""

from __future__ import annotations

import copy
import textwrap
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.legend import Legend
from matplotlib.text import Text

from analysis.plots import title_pad

WIDTH = 4.5  # inches: 324 points, what a screen of 360 px leaves beside the margins
MANY = 4  # more panels than this stand two in a row
HEIGHT = 3.1  # inches of a panel alone in its row
SMALLEST = 9.5  # points of any word
_CHUNKY = 0.8  # of the height, for panels of which there are many


def phone_layout(figure: Figure) -> Figure:
    """A copy of ``figure``, laid out again; the original stays as it is."""
    narrow: Figure = copy.deepcopy(figure)
    panels = [axes for axes in narrow.axes if axes.get_visible()]
    if not panels:
        return narrow
    columns = 2 if len(panels) > MANY else 1
    rows = -(-len(panels) // columns)
    was_rows = max((axes.get_subplotspec().get_gridspec().nrows  # type: ignore[union-attr]
                    for axes in panels), default=1)
    height = max(figure.get_figheight() / was_rows, HEIGHT) if columns == 1 else HEIGHT * _CHUNKY
    for legend in list(narrow.legends):
        _one_column(narrow, legend)
        height += 0.25 * len(legend.get_texts()) / rows
    narrow.set_size_inches(WIDTH, height * rows)
    grid = GridSpec(rows, columns, figure=narrow)
    for i, axes in enumerate(panels):
        axes.set_subplotspec(grid[i // columns, i % columns])
        _stands_alone(axes, panels[0], first=i % columns == 0, last=i >= len(panels) - columns)
        inside = axes.get_legend()
        if inside:  # where it was free in the wide panel there may be a curve now
            inside.set_bbox_to_anchor(None)
            inside.set_loc("best")
    narrow.draw_without_rendering()  # places ticks and labels
    for i, axes in enumerate(panels):
        _turn_crowded_ticks(axes)
        _fit_words(axes, narrow.bbox.width * (i % columns + 1) / columns)
    again = getattr(narrow, "again", None)
    if again:
        again(panels)
    return narrow


def _stands_alone(axes: Axes, shared: Axes, *, first: bool, last: bool) -> None:
    """What a panel had from its neighbours: tick labels and the label of a shared axis."""
    if first and axes.get_shared_y_axes().joined(axes, shared):
        axes.tick_params(labelleft=True)
        axes.set_ylabel(axes.get_ylabel() or shared.get_ylabel())
    if not first:
        axes.set_ylabel("")
    if last and not axes.get_xlabel():
        axes.set_xlabel(shared.get_xlabel())


def _one_column(figure: Figure, legend: Legend) -> None:
    """A legend below all panels again, its entries one below the other."""
    texts = [text.get_text() for text in legend.get_texts()]
    handles = legend.legend_handles
    figure.legends.remove(legend)  # legend.remove() of a copy asks the original
    figure.legend(handles=handles, labels=texts, loc="outside lower center", ncols=1)


def _fit_words(axes: Axes, right: float) -> None:
    """Titles and labels in more lines where they would leave the panel's column, which ends at
    ``right`` (pixels of the drawing)."""
    for place in ("left", "center", "right"):
        title = axes.get_title(loc=place)
        if title:
            axes.set_title(title, loc=place, pad=title_pad(axes))
    name, x, y = axes._left_title, axes.xaxis.label, axes.yaxis.label  # type: ignore[attr-defined]
    box = x.get_window_extent()
    middle = (box.x0 + box.x1) / 2
    _wrap(name, name.get_window_extent().width, right - name.get_window_extent().x0)
    _wrap(x, box.width, 2 * min(middle, right - middle))
    _wrap(y, y.get_window_extent().height, 1.15 * axes.bbox.height)


def _wrap(text: Text, length: float, room: float) -> None:
    if length > room:
        letters = max(int(len(text.get_text()) * room / length) - 2, 8)  # they differ in width
        longest = max(map(len, text.get_text().split()))
        text.set_text(textwrap.fill(text.get_text(), letters, break_long_words=False,
                                    break_on_hyphens=False))
        if longest > letters:  # one word is too long for the line
            text.set_fontsize(max(float(text.get_fontsize()) * letters / longest, SMALLEST))


def _turn_crowded_ticks(axes: Axes) -> None:
    """Upright tick labels below an axis where they would run into each other."""
    labels = [label for label in axes.get_xticklabels() if label.get_text()]
    boxes = [label.get_window_extent() for label in labels]
    if any(one.x1 + 3 > other.x0 for one, other in pairwise(boxes)):
        axes.tick_params(axis="x", rotation=90)
