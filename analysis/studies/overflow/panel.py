"""Decay and chunk size by slider: exponent, bound, first bad position, errors."""

from __future__ import annotations

import math
from typing import Any

from analysis.measure.scans import runnable
from analysis.studies.overflow import PRECISIONS, Grid, Kind, Precision, figures
from analysis.studies.overflow.error_map import Cell, cell
from analysis.theory.forms import ANY_CHUNK


def panel(p: Grid) -> Any:
    """Sliders for decay and chunk size: exponent, bound, first bad position, errors, and a plot."""
    from ipywidgets import Dropdown, FloatLogSlider, IntSlider, interactive

    return interactive(
        lambda form, decay, chunk, precision, kind: _show_cell(
            p, form, decay, chunk, precision, kind),
        form=Dropdown(options=runnable(ANY_CHUNK), value="corrected_cumsum"),
        decay=FloatLogSlider(value=1.6, min=-2, max=1.3, step=0.01, description="nats a step",
                             continuous_update=False),
        chunk=IntSlider(value=32, min=1, max=p.length, description="chunk",
                        continuous_update=False),
        precision=Dropdown(options=PRECISIONS),
        kind=Dropdown(options=("constant", "data-dependent")))


def _show_cell(
    p: Grid, form: str, decay: float, chunk: int, precision: Precision, kind: Kind
) -> Cell:
    from IPython.display import display

    found = cell(p, form, decay, chunk, precision, kind)
    bound = f"{found.bound:.1f} steps" if math.isfinite(found.bound) else "none"
    bad = "none" if found.first_bad is None else f"{found.first_bad}"
    print(f"largest exponent of a chunk: {found.exponent:.1f} nats; bound of the chunk: {bound}\n"
          f"first position off by more than 1 %: {bad}\n"
          f"value error {found.row['value error']:.2g} ({found.row['value']}), "
          f"gradient error {found.row['gradient error']:.2g} ({found.row['gradient']})")
    display(figures.error_by_position(found.positions, chunk))
    return found
