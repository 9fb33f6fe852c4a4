"""The study of overflow: how far trainings come to the bound, and what it costs to cross it."""

from __future__ import annotations

import math
from dataclasses import replace

import pandas as pd
import pytest
import torch

from analysis.measure import exponents
from analysis.studies.overflow import PROFILES, figures
from analysis.studies.overflow import compute as overflow
from analysis.theory import bounds
from mambabyte.config import PRESETS, ModelConfig, TrainConfig


def test_crossing_the_bound_loses_every_weight(text_file: object) -> None:
    found = exponents.cross_the_bound(str(text_file), 0, (80.0, 120.0)).set_index(
        ["form", "exponent of 32 steps"])
    share = found["weights lost after the step, share"]
    assert share["document_chunked", 80.0] == 0
    assert share["document_chunked", 120.0] == 1
    assert share["chunked", 120.0] == 0
    assert found.loc[("document_chunked", 120.0), "with checks"].startswith("stops: step 1")
    assert found.loc[("chunked", 120.0), "with checks"] == "goes on"


def test_training_is_followed_and_stops_where_it_fails(text_file: object) -> None:
    config = ModelConfig(d_model=16, n_layer=1, scan_form="corrected_cumsum", dt_min=0.2,
                         dt_max=0.8)
    train = TrainConfig(context=48, batch_size=2, n_steps=100, allow_study_form=True)
    frame, ending = exponents.follow_training(config, train, str(text_file), 4, 2)
    assert ending.startswith("step 1: loss nan")
    assert frame["step"].tolist() == [0]
    assert frame["largest exponent in 32 steps"].iloc[0] > bounds.log_max()
    # Lost between two records: the lost batch is recorded by the stable form.
    slow = replace(config, dt_min=0.15, dt_max=0.165, d_state=16)
    frame, ending = exponents.follow_training(
        slow, replace(train, lr=0.05, warmup_fraction=0.0), str(text_file), 60, 50)
    assert ending.startswith("step ")
    assert frame["step"].iloc[-1] == int(ending.split()[1].rstrip(":")) - 1
    assert frame["largest exponent in 32 steps"].iloc[-1] > bounds.log_max()
    assert math.isfinite(frame["loss, nats"].iloc[-1])
    frame, ending = exponents.follow_training(
        replace(config, scan_form="auto"), train, str(text_file), 4, 2)
    assert ending == "trained 4 steps"
    assert frame["step"].tolist() == [0, 2, 4]
    assert exponents.extrapolate(frame, PRESETS["mamba_byte"].train)["layer"].tolist() == [0]


def test_a_training_that_ended_early_has_a_panel_of_the_first_steps() -> None:
    followed = pd.DataFrame([
        {"form": form, "step": step, "layer": 0, "largest exponent in 32 steps": 50.0 + step / 4}
        for form, steps in (("auto", 1000), ("corrected_cumsum", 150))
        for step in range(0, steps + 1, 50)])
    whole, early = figures.exponent_lines(followed).axes
    assert early.lines[0].get_xdata().max() == 250
    # Named at its end only where it reaches the end.
    named = {text.get_text() for text in whole.texts}
    assert "stable (auto)" in named
    assert "corrected_cumsum" not in named
    assert len(figures.exponent_lines(followed[followed["form"] == "auto"]).axes) == 1


def test_less_than_half_a_schedule_is_not_carried_on() -> None:
    recipe = replace(PRESETS["mamba_byte"].train, n_steps=4, warmup_fraction=0.0)

    def ends(share: float) -> str:
        total = sum(exponents.learning_rate(step, recipe) for step in range(4))
        followed = pd.DataFrame({
            "form": "auto", "layer": 0, "learning, sum of rates": [0.0, share * total],
            "largest exponent in 32 steps": [50.0, 60.0]})
        return str(exponents.extrapolate(followed, recipe)["at the end, by a line"].iloc[0])

    assert ends(0.07) == exponents.TOO_SHORT
    assert float(ends(0.5)) == pytest.approx(70.0, abs=0.1)


def test_the_full_profile_uses_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(PROFILES) == {"quick", "full"}
    full = PROFILES["full"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (overflow.settle(full).device, overflow.settle(full).d_model) == ("cpu", 64)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    settled = overflow.settle(full)
    own = PRESETS["mamba_byte"]
    assert (settled.device, settled.d_model, settled.n_layer, settled.batch, settled.context) == (
        "cuda", own.model.d_model, own.model.n_layer, own.train.batch_size, own.train.context)
    assert settled.trained_steps == (4000, 1200, 600)
    # What was asked for stays.
    assert overflow.settle(replace(full, batch=2, trained_steps=(5, 5, 5))).batch == 2
    assert overflow.settle(replace(full, trained_steps=(5, 5, 5))).trained_steps == (5, 5, 5)
    assert overflow.settle(PROFILES["quick"]) == PROFILES["quick"]


def test_a_training_below_the_bound_never_crossed_it(text_file: object) -> None:
    p = overflow.Parameters(corpus=str(text_file), trained_forms=("auto",), trained_steps=(1,))
    _, endings = overflow.follow_forms(p, lambda line: None)
    assert endings[overflow.CROSSED].tolist() == ["never"]
