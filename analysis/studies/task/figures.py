"""Figure of the task: accuracy against energy, runs and trials. DataFrames in."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import plots
from analysis.runs.folders import Run
from analysis.studies.drawing import Drawing

# kind -> colour and marker: each says what the other says
LOOKS = {
    "SSM": (plots.BLUE, "o"), "SSM and attention": (plots.PURPLE, "D"),
    "attention": (plots.VERMILION, "s"), "n-gram alone": (plots.GREEN, "^"),
    "public file": (plots.MUTED, "P"), "not known": (plots.MUTED, "X"),
}
# Of the kinds of other mixers, in the order in which they appear.
MORE = ((plots.ORANGE, "v"), (plots.SKY, "P"), (plots.BLACK, "*"))
_TICKS = (100, 200, 500, 1000, 2000, 3000, 5000, 10_000, 15_000, 30_000)  # joules
FLOOR = 0.58  # accuracies below are drawn at the edge, with their number


def pareto(points: pd.DataFrame, systems: pd.DataFrame, target: float) -> Figure:
    """Left: systems on the validation split, means with ranges over seeds, named, and the front.
    Right: every run and trial on held-out training text. Filled with an n-gram, hollow without.
    """
    figure, (left, right) = plots.new_figure(
        1, 2, size=(11.0, 5.8), sharey=True, width_ratios=(1.35, 1))
    looks = _looks(points["kind"])
    _systems(left, systems, looks)
    held_out = points[points["held-out training text, accuracy"].notna()]
    for row in held_out.to_dict("records"):
        _point(right, looks[row["kind"]], row["with n-gram"], row["energy (J)"],
               row["held-out training text, accuracy"], size=5.5 if row["trial"] else 7.5)
    energies = points["energy (J)"].astype(float)
    for axes, title in ((left, "systems, validation split"),
                        (right, "every run and trial, held-out training text")):
        axes.set_xscale("log")
        low, high = energies.min() * 0.68, energies.max() * 1.3
        axes.set_xlim(low, high)
        axes.set_xticks([t for t in _TICKS if low <= t <= high])
        axes.xaxis.set_minor_locator(plots.mpl.ticker.NullLocator())
        plots.tick_with(axes.xaxis, lambda joules: f"{joules:,.0f}")
        plots.mark_line(axes, y=max(target, FLOOR), text=f"{target:.2f}")
        plots.label_axes(axes, "energy, J (idle subtracted)", "accuracy of the next character",
                         title)
    left.set_ylim(FLOOR, None)
    right.set_ylabel("")
    figure.legend(handles=_legend(looks), loc="outside lower center", ncols=4)
    _name(left, systems)
    figure.again = lambda panels: _name(panels[0], systems)  # type: ignore[attr-defined]
    return figure


def one_job(systems: pd.DataFrame, target: float) -> Figure:
    """Systems and public files of one job by energy, on a log axis, and accuracy: means with ranges
    over seeds, named, and the front."""
    figure, axes = plots.new_figure(size=(8.2, 5.2))
    looks = _looks(systems["kind"])
    _systems(axes, systems, looks)
    axes.set_xscale("log")
    low, high = systems["energy (J)"].min() * 0.6, systems["energy (J)"].max() * 1.5
    axes.set_xlim(low, high)
    axes.set_xticks([t for t in _TICKS if low <= t <= high])
    axes.xaxis.set_minor_locator(plots.mpl.ticker.NullLocator())
    plots.tick_with(axes.xaxis, lambda joules: f"{joules:,.0f}")
    plots.mark_line(axes, y=target, text=f"{target:.2f}")
    axes.margins(y=0.15)
    plots.label_axes(axes, "energy, J (idle subtracted)", "accuracy of the next character")
    figure.legend(handles=_legend(looks), loc="outside lower center", ncols=3)
    _name(axes, systems)
    figure.again = lambda panels: _name(panels[0], systems)  # type: ignore[attr-defined]
    return figure


def chosen(systems: pd.DataFrame) -> Figure:
    """Some systems by energy and accuracy: means, with ranges over seeds, named."""
    figure, axes = plots.new_figure()
    _systems(axes, systems.assign(**{"on the front": False}), _looks(systems["kind"]))
    axes.set_xlim(0, 1.3 * systems["energy (J)"].max())
    axes.margins(y=0.5)
    if systems["validation accuracy"].min() < FLOOR:
        axes.set_ylim(FLOOR, None)
    plots.label_axes(axes, "energy, J (idle subtracted)", "accuracy of the next character")
    _name(axes, systems)
    return figure


def _looks(kinds: pd.Series) -> dict[str, tuple[str, str]]:
    """Colour and marker of every kind, the known ones first; a fourth new kind looks as the first.
    """
    new = (kind for kind in dict.fromkeys(kinds) if kind not in LOOKS)
    return {**{kind: look for kind, look in LOOKS.items() if kind in set(kinds)},
            **{kind: MORE[i % len(MORE)] for i, kind in enumerate(new)}}


def _point(
    axes: Axes, look: tuple[str, str], ngram: bool | None, x: float, y: float, size: float,
    name: str | None = None,
) -> None:
    """``name`` marks the point in the drawing, for who asks what it is."""
    colour, marker = look
    axes.plot([x], [max(y, FLOOR)], marker=marker, color=colour, linestyle="none",
              markersize=size, markeredgewidth=1.6,
              markerfacecolor=colour if ngram else plots.PAPER, zorder=3, gid=name,
              clip_on=y >= FLOOR)


def _systems(
    axes: Axes, systems: pd.DataFrame, looks: dict[str, tuple[str, str]]
) -> None:
    front = systems[systems["on the front"]]
    axes.step(front["energy (J)"], front["validation accuracy"], where="post", color=plots.MUTED,
              linewidth=1.2, linestyle=(0, (2, 2)), marker="", zorder=1)
    for row in systems.to_dict("records"):
        x, y = row["energy (J)"], row["validation accuracy"]
        colour, _ = looks[row["kind"]]
        if row["seeds"] > 1:
            ends: dict[str, Any] = {"color": colour, "linewidth": 1.4, "marker": "", "zorder": 2,
                                    "linestyle": "-"}
            axes.plot([x, x], [row["lowest accuracy"], row["highest accuracy"]], **ends)
            axes.plot([row["lowest energy (J)"], row["highest energy (J)"]], [y, y], **ends)
        _point(axes, looks[row["kind"]], row["with n-gram"], x, y, size=9.0,
               name=f"point-{row['system']}")


# Where a name may stand, in points from its point: (x, y), x > 0 to the right of it.
_PLACES = ((10, 0), (-10, 0), (8, 13), (-8, 13), (8, -13), (-8, -13), (8, 26), (-8, 26), (8, -26),
           (-8, -26), (8, 39), (-8, 39), (-8, -39))
_NAMED = "name"  # marks these names in the drawing
Box = tuple[float, float, float, float]  # left, bottom, right, top, in points


def _name(axes: Axes, systems: pd.DataFrame) -> None:
    """Names beside the points, at the first place where they lie on no point and no other name."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    for old in [text for text in axes.texts if text.get_label() == _NAMED]:
        old.set_visible(False)  # remove() of a copied figure asks the original
    scale = 72.0 / figure.dpi
    figure.draw_without_rendering()  # the layout must be final
    extent = axes.get_window_extent()
    left, right = extent.x0 * scale, extent.x1 * scale
    rows = systems.sort_values("energy (J)").to_dict("records")
    spots = [(row["energy (J)"], max(row["validation accuracy"], FLOOR)) for row in rows]
    where = [tuple(axes.transData.transform(spot) * scale) for spot in spots]
    taken: list[Box] = [(x - 7, y - 7, x + 7, y + 7) for x, y in where]
    for row, spot, (x, y) in zip(rows, spots, where, strict=True):
        low = row["validation accuracy"] < FLOOR
        text = str(row["system"])
        text += f":\n{row['validation accuracy']:.2f} (below)" if low else ""
        width = 5.4 * max(map(len, text.splitlines()))

        def box(dx: float, dy: float, x: float = x, y: float = y, width: float = width) -> Box:
            start = x + dx if dx > 0 else x + dx - width
            return (start, y + dy - 6, start + width, y + dy + 6)

        places = [p for p in _PLACES if p[1] > 13] if low else _PLACES  # two lines, all above
        inside = [p for p in places if left < box(*p)[0] and box(*p)[2] < right]
        # the first that meets nothing, or else the least
        met = [sum(_meet(box(*p), other) for other in taken) for p in inside or places]
        dx, dy = (inside or places)[met.index(min(met))]
        taken.append(box(dx, dy))
        axes.annotate(text, spot, xytext=(dx, dy), textcoords="offset points", fontsize=9,
                      color=plots.INK, va="center", ha="left" if dx > 0 else "right",
                      annotation_clip=False, zorder=4, in_layout=False,
                      bbox={"facecolor": plots.PAPER, "edgecolor": "none", "pad": 0.6},
                      label=_NAMED)


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _legend(looks: dict[str, tuple[str, str]]) -> list[Line2D]:
    shape: dict[str, Any] = {"linestyle": "none", "markersize": 8, "markeredgewidth": 1.6}
    handles = [Line2D([], [], color=colour, marker=marker, label=kind, **shape)
               for kind, (colour, marker) in looks.items()]
    return [
        *handles,
        Line2D([], [], color=plots.MUTED, marker="o", label="with an n-gram model", **shape),
        Line2D([], [], color=plots.MUTED, marker="o", markerfacecolor=plots.PAPER,
               label="no n-gram", **shape),
        Line2D([], [], color=plots.MUTED, linestyle=(0, (2, 2)), marker="",
               label="nothing cheaper is as good"),
    ]


def _caption(run: Run) -> str:
    values = {name: value.value for name, value in run.values.items()}
    idle = f"{values['idle_watts']:g}" if values["idle_watts"] else "a stated number of"
    return (
        f"Recorded on {values['machines']}: {values['runs']} runs and {values['trials']} trials; "
        f"{values['crashed']} runs crashed and are left out. Energy is the GPU's counter from the "
        "start of training to its end, compiling included, minus "
        f"{idle} W for the idle card. Left: means over "
        "seeds, bars from the lowest to the highest. Right: single runs (large) and trials "
        f"(small), where that accuracy was measured. Accuracies below {FLOOR} stand at the lower "
        "edge.")


def _alt(run: Run) -> str:
    systems = run.tables["systems"].frame
    front = ", ".join(systems[systems["on the front"]]["system"])
    return ("Two panels of points on a log axis of joules. Left, the named systems; those that "
            f"nothing cheaper equals, from the cheapest on: {front}. Right, every run and trial.")


def _alt_of_job(run: Run) -> str:
    rows = run.tables["job"].frame.to_dict("records")
    return ("Points of accuracy against joules on a log axis, the cheapest first: " + "; ".join(
        f"{row['system']} {row['energy (J)']:,.0f} J and {row['validation accuracy']:.3f}"
        for row in rows) + ".")


FIGURES = (
    Drawing("pareto", pareto, ("points", "systems", "target"), "Accuracy against energy",
            caption=_caption, alt=_alt),
    Drawing("one_job", one_job, ("job", "target"), "Accuracy against energy, of one job",
            caption="Each system in a process of its own with empty caches, in one job with public "
                    "files that were run as they are. Energy of the GPU from the call to the "
                    "model, compiling included. Means over seeds, bars from the lowest to the "
                    "highest. A system that stands in the job twice, as a control, is one point.",
            alt=_alt_of_job, when=lambda systems, target: len(systems) > 0),
)
