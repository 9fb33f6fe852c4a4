"""Figure of the claims study: how many statements got which verdict."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis import plots
from analysis.studies.drawing import Drawing

# Verdict -> colour and hatching: the hatching says what the colour says.
VERDICTS = {
    "holds": (plots.GREEN, ""),
    "holds with a caveat": (plots.SKY, "//"),
    "does not hold": (plots.VERMILION, "xx"),
    "inconsistent with another statement": (plots.ORANGE, ".."),
    "not decidable here": (plots.MUTED, ""),
}


def verdict_bars(counts: pd.DataFrame) -> Figure:
    """Stacked bars of verdicts, one bar a kind of claim and document."""
    rows = counts.iloc[::-1].reset_index(drop=True)
    figure, axes = plots.new_figure(size=(8.4, 0.36 * len(rows) + 1.8))
    y = np.arange(len(rows))
    left = np.zeros(len(rows))
    for name, (colour, hatch) in VERDICTS.items():
        width = rows[name].to_numpy(dtype=float)
        axes.barh(y, width, left=left, color=colour, hatch=hatch, edgecolor="white", label=name,
                  linewidth=0.6)
        left = left + width
    for i, total in enumerate(left):
        axes.text(total + left.max() * 0.01, i, f"{total:.0f}", va="center", fontsize=9.5,
                  color=plots.INK)
    axes.set_yticks(y, [f"{d} document, {k}" for d, k in
                        zip(rows["document"], rows["kind"], strict=True)])
    axes.set_xlim(0, left.max() * 1.08)
    axes.grid(axis="y", visible=False)
    plots.label_axes(axes, "number of claims", "kind of claim, share of the ledger")
    axes.set_ylabel("")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


FIGURES = (
    Drawing("verdicts", verdict_bars, ("counts",), "Verdicts by document and kind of claim",
            caption="How many statements of each kind got which verdict.",
            alt="Stacked horizontal bars, one a document and kind of claim, divided by verdict."),
)
