"""Form, chunk and length by choice: the error of each gradient at every boundary."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd

from analysis.measure.scans import runnable
from analysis.measure.threads import threads
from analysis.studies.gradients import Parameters, figures
from analysis.studies.gradients.boundary import boundary_frame
from analysis.theory.forms import ANY_CHUNK
from mambabyte.errors import UserError

CHUNKS, LENGTHS = (8, 16, 32, 64), (32, 64, 96)  # steps; the most boundaries take about a second
ROUNDING = 1e-9  # relative; a right form is below it in float64
MOST_CHANNELS, MOST_STATES = 8, 16
GRADIENTS = ("d u", "d delta", "d B", "d A", "d initial state")


def panel(p: Parameters) -> Any:
    """Choices of form, chunk, length and gradient: its error at every boundary, on the CPU."""
    from ipywidgets import Dropdown, SelectionSlider, interactive

    small = replace(p, device="cpu", channels=min(p.channels, MOST_CHANNELS),
                    states=min(p.states, MOST_STATES))
    return interactive(
        lambda form, chunk, length, gradient: _show_errors(small, form, chunk, length, gradient),
        form=Dropdown(options=runnable(ANY_CHUNK), value="document_chunked"),
        chunk=SelectionSlider(options=CHUNKS, value=16, continuous_update=False),
        length=SelectionSlider(options=LENGTHS, value=64, continuous_update=False),
        gradient=Dropdown(options=GRADIENTS))


def _show_errors(
    p: Parameters, form: str, chunk: int, length: int, gradient: str
) -> pd.DataFrame | None:
    from IPython.display import display

    try:
        asked = replace(p, forms=(form,), chunk=chunk, length=length)
    except UserError as error:  # no boundary
        print(error)
        return None
    with threads(1):
        found = boundary_frame(asked)
    worst = found[found["gradient"] == gradient].groupby(["form", "precision"])[
        "relative error"].max()
    single, double = worst[form, "float32"], worst[form, "float64"]
    print(f"largest error of {gradient} against the recurrence in float64: {single:.2g} in "
          f"float32, {double:.2g} in float64; {worst['truncated', 'float64']:.2g} where the carry "
          "is cut\n" + ("float64 mends it: it is the precision" if double < ROUNDING
                        else "float64 does not mend it: the formula is another"))
    display(figures.boundary_lines(found, gradient))
    return found
