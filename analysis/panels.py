"""Panels of sliders for the notebooks, where a slider says more than a table.

A panel stands beside a static result and calls the study's own functions. It needs the optional
package ipywidgets and somebody to move it: a batch run, which has a run folder, shows none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from analysis import memory as memory_study
from analysis import overflow as overflow_study
from analysis.footprint import DEVICES_GB
from analysis.plots import memory as memory_figures
from analysis.plots import overflow as overflow_figures
from analysis.scans import ANY_CHUNK, runnable
from mambabyte.config import ModelConfig, get_preset

MISSING = "(pip install ipywidgets, and run this cell again, for a panel of sliders)"


def show(panel: Callable[..., Any], *arguments: Any, run_dir: str) -> None:
    """Display ``panel(*arguments)``; nothing in a batch run, a line where ipywidgets is missing.

    ``run_dir`` is the notebook's parameter: who runs a notebook in batch names a folder.
    """
    if run_dir:
        return
    try:
        import ipywidgets  # noqa: F401
    except ImportError:
        print(MISSING)
        return
    from IPython.display import display

    display(panel(*arguments))


def overflow(p: overflow_study.Parameters) -> Any:
    """Sliders for decay and chunk size: exponent, bound, first bad position, errors, and a plot."""
    from ipywidgets import Dropdown, FloatLogSlider, IntSlider, interactive

    return interactive(
        lambda form, decay, chunk, precision, kind: _overflow_cell(
            p, form, decay, chunk, precision, kind),
        form=Dropdown(options=runnable(ANY_CHUNK), value="corrected_cumsum"),
        decay=FloatLogSlider(value=1.6, min=-2, max=1.3, step=0.01, description="nats a step",
                             continuous_update=False),
        chunk=IntSlider(value=32, min=1, max=p.length, description="chunk",
                        continuous_update=False),
        precision=Dropdown(options=overflow_study.PRECISIONS),
        kind=Dropdown(options=("constant", "data-dependent")))


def _overflow_cell(
    p: overflow_study.Parameters, form: str, decay: float, chunk: int, precision: str, kind: str
) -> overflow_study.Cell:
    from IPython.display import display

    found = overflow_study.cell(p, form, decay, chunk, precision, kind)
    bound = f"{found.bound:.1f} steps" if math.isfinite(found.bound) else "none"
    bad = "none" if found.first_bad is None else f"{found.first_bad}"
    print(f"largest exponent of a chunk: {found.exponent:.1f} nats; bound of the chunk: {bound}\n"
          f"first position off by more than 1 %: {bad}\n"
          f"value error {found.row['value error']:.2g} ({found.row['value']}), "
          f"gradient error {found.row['gradient error']:.2g} ({found.row['gradient']})")
    display(overflow_figures.error_by_position(found.positions, chunk))
    return found


def memory(p: memory_study.Parameters, preset: str = "mamba_byte") -> Any:
    """Sliders for batch and context: predicted bytes by group of every form, and what holds them.
    """
    from ipywidgets import Dropdown, SelectionSlider, interactive

    model = get_preset(preset).model
    powers = [2**n for n in range(17)]
    return interactive(
        lambda batch, context, pattern: _memory_step(p, model, batch, context, pattern),
        batch=SelectionSlider(options=powers[:11], value=64, continuous_update=False),
        context=SelectionSlider(options=powers[6:], value=2048, continuous_update=False),
        pattern=Dropdown(options=("M", "MMMA", "MA", "A"), value=model.layer_pattern))


def _memory_step(
    p: memory_study.Parameters, model: ModelConfig, batch: int, context: int, pattern: str
) -> Any:
    from IPython.display import display

    budgets = memory_study.budgets_at(
        replace(model, layer_pattern=pattern), batch, context,
        p.forms if "M" in pattern else p.forms[:1])  # attention has no scan
    display(memory_figures.budget_bars(budgets, f"{batch} x {context}", DEVICES_GB))
    display(memory_study.smallest_devices(budgets))
    return budgets
