"""Figures over several records. Each ratio is within one job; nothing is divided across jobs."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from analysis import plots

AHEAD, BEHIND, LEVEL = "ahead", "behind", "level"
LOOKS = {AHEAD: (plots.BLUE, "o"), LEVEL: (plots.MUTED, "s"), BEHIND: (plots.VERMILION, "X")}


def both_sides(sides: pd.DataFrame) -> Figure:
    """A row a comparison: ours over theirs on a log axis, less is better, with both numbers.

    ``sides``: columns "comparison", "cost", "ours", "theirs", "ratio", "outcome".
    """
    groups = list(dict.fromkeys(sides["comparison"]))
    figure, axes = plots.new_figure(size=(7.2, 0.31 * len(sides) + 0.36 * len(groups) + 1.1))
    y, ticks, names = 0.0, [], []
    low, high = sides["ratio"].min() / 1.15, sides["ratio"].max() * 1.15
    for group in groups:
        # Over the names too: its row has no other.
        axes.annotate(group, (1.0, y), xycoords=("axes fraction", "data"), va="center", ha="right",
                      fontsize=9.5, fontweight="bold", color=plots.INK, in_layout=False,
                      annotation_clip=False,
                      bbox={"facecolor": plots.PAPER, "edgecolor": "none", "pad": 0.6})
        y += 1.0
        for row in sides[sides["comparison"] == group].to_dict("records"):
            colour, marker = LOOKS[row["outcome"]]
            axes.plot([1.0, row["ratio"]], [y, y], color=colour, linewidth=2.2, marker="",
                      linestyle="-", solid_capstyle="butt")
            axes.plot(row["ratio"], y, color=colour, marker=marker, markersize=7,
                      linestyle="none")
            ticks.append(y)
            names.append(f"{row['cost']}\n{plain(row['ours'])} / {plain(row['theirs'])}")
            y += 1.0
        y += 0.15
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(y - 0.5, -0.6)
    axes.set_xticks([t for t in (0.1, 0.2, 0.5, 1, 2, 5) if low <= t <= high])
    axes.xaxis.set_minor_locator(plots.mpl.ticker.NullLocator())
    plots.tick_with(axes.xaxis, "{:g}".format)
    axes.set_yticks(ticks, names, linespacing=1.05)
    axes.tick_params(left=False)
    axes.tick_params(axis="y", labelsize=9)
    axes.grid(axis="y", visible=False)
    axes.axvline(1.0, color=plots.INK, linewidth=1.1)
    plots.label_axes(axes, "ours over theirs, ratio (left of 1: ahead)", "form")
    axes.set_ylabel("")
    figure.legend(handles=[
        plots.mpl.lines.Line2D([], [], color=c, marker=m, linestyle="none", markersize=7, label=n)
        for n, (c, m) in LOOKS.items() if n in set(sides["outcome"])],
        loc="outside lower center", ncols=3)
    return figure


def step_costs(steps: pd.DataFrame) -> Figure:
    """Joules a megabyte of a training step, a panel a job, a row a system.

    ``steps``: columns "job", "system", "step, ms", "J/MB".
    """
    jobs, systems = (list(dict.fromkeys(steps[c])) for c in ("job", "system"))
    figure, grid = plots.new_figure(1, len(jobs), size=(10.0, 0.34 * len(systems) + 1.2),
                                    sharey=True, squeeze=False)
    for axes, job in zip(grid[0], jobs, strict=True):
        for i, (system, look) in enumerate(plots.looks(systems).items()):
            for one in steps[(steps["job"] == job) & (steps["system"] == system)].to_dict(
                    "records"):
                axes.plot([0, one["J/MB"]], [i, i], color=look["color"], linewidth=1.4, marker="",
                          linestyle="-", alpha=0.5)
                axes.plot(one["J/MB"], i, color=look["color"], marker=look["marker"],
                          markersize=8)
                axes.annotate(f"{one['J/MB']:.0f}", (one["J/MB"], i), xytext=(8, 0),
                              textcoords="offset points", va="center", fontsize=9.5)
        axes.set_xlim(0, 1.15 * steps["J/MB"].max())
        axes.set_yticks(range(len(systems)), systems)
        axes.set_ylim(len(systems) - 0.5, -0.6)
        axes.grid(axis="y", visible=False)
        plots.label_axes(axes, "joules a megabyte (gross)", "layer pattern", job)
        axes.set_ylabel("")
    return figure


def plain(value: float) -> str:
    """Four digits at most, in plain numbers."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
