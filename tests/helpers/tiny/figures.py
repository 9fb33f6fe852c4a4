"""One line over a table. A parameter "words" takes the place of all that is said about it."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from analysis import plots
from analysis.studies.drawing import Drawing


def line(frame: pd.DataFrame) -> Figure:
    figure, axes = plots.new_figure()
    axes.plot(frame["length, bytes"], frame["time, ms"])
    plots.label_axes(axes, "length, bytes", "time, ms")
    return figure


FIGURES = (
    Drawing("times", line, ("lengths",),
            title=lambda run: str(run.parameters.get("words", "Time over length")),
            caption=lambda run: str(run.parameters.get("words", "It grows.")),
            alt=lambda run: str(run.parameters.get("words", "A rising line."))),
)
