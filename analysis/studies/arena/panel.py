"""What a model remembers, on models that are trained here in about a minute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pandas as pd
import torch

from analysis.plots import new_figure
from analysis.studies.arena import PROFILES, Parameters
from analysis.studies.arena.figures import draw_map
from analysis.studies.arena.memory import MAP_BYTES, attention_map, half_lives
from analysis.studies.arena.trainings.plan import Cell
from analysis.studies.arena.trainings.text import open_corpus, train
from mambabyte.model import ByteLM

Models = dict[str, ByteLM]


def trained(p: Parameters, report: Callable[[str], None] = print) -> Models:
    """A model of each system, on the text and the CPU, by the recipe of the profile "memory"."""
    small = replace(PROFILES["memory"], corpus=p.corpus)
    found = {}
    for system in small.systems:
        report(f"training {system} on {small.budgets[0]:,} bytes of {p.corpus}")
        cell = Cell("memory", system, small.size, "adamw", small.adamw_rates[0], 0,
                    small.budgets[0])
        learned, row = train(small, cell, "cpu")
        report(f"{system}: {row['valid_bits']:.2f} bits per byte")
        found[system] = learned.model.eval()
    return found


def panel(p: Parameters, models: Models | None = None) -> Any:
    """The implicit attention of a system's layer on some validation text, and its half-lives."""
    from ipywidgets import Dropdown, IntSlider, interactive

    known = models or trained(p)
    layers = min(model.config.n_layer for model in known.values())
    return interactive(
        lambda system, layer, start: _show(known[system], layer, start, p.corpus),
        system=Dropdown(options=tuple(known)),
        layer=IntSlider(0, min=0, max=layers - 1),
        start=IntSlider(0, min=0, max=2000, step=20, description="first byte"))


def _show(model: ByteLM, layer: int, start: int, corpus: str) -> pd.DataFrame:
    from IPython.display import display

    text = open_corpus(corpus)[0].valid
    start = min(start, len(text) - MAP_BYTES)
    shown = torch.from_numpy(text[start : start + MAP_BYTES].copy()).long()
    print(bytes(shown.tolist()).decode(errors="replace"))
    shares = attention_map(model, shown, layer)
    figure, ax = new_figure(size=(4.6, 4.4))
    draw_map(ax, shares.masked_fill(torch.ones_like(shares).triu(1) > 0, float("nan")).numpy())
    display(figure)
    lives = pd.DataFrame(row for row in half_lives(model, shown[None]) if row["layer"] == layer)
    if lives.empty:
        print("attention keeps bytes, and forgets none of those in its window")
    else:
        display(lives)
    return lives
