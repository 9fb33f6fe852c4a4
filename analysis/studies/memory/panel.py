"""Batch and context by slider: predicted bytes by group of every form, and what holds them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from analysis.studies.memory import Parameters, figures
from analysis.studies.memory.closed_form import budgets_at, smallest_devices
from analysis.theory.fit import DEVICES_GB
from mambabyte.config import SPECS, ModelConfig, get_preset
from mambabyte.config.mixers import uses_scan_form


def panel(p: Parameters, preset: str = "mamba_byte") -> Any:
    """Sliders for batch and context: predicted bytes by group of every form, and what holds them.
    """
    from ipywidgets import Dropdown, SelectionSlider, interactive

    model = get_preset(preset).model
    powers = [2**n for n in range(17)]
    return interactive(
        lambda batch, context, pattern: _show_step(p, model, batch, context, pattern),
        batch=SelectionSlider(options=powers[:11], value=64, continuous_update=False),
        context=SelectionSlider(options=powers[6:], value=2048, continuous_update=False),
        pattern=Dropdown(options=(*SPECS, "MMMA", "MA"), value=model.layer_pattern))


def _show_step(
    p: Parameters, model: ModelConfig, batch: int, context: int, pattern: str
) -> Any:
    from IPython.display import display

    budgets = budgets_at(
        replace(model, layer_pattern=pattern), batch, context,
        p.forms if uses_scan_form(pattern) else p.forms[:1])  # attention has no scan
    display(figures.budget_bars(budgets, f"{batch} x {context}", DEVICES_GB))
    display(smallest_devices(budgets))
    return budgets
