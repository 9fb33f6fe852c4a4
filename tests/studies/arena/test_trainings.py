"""The trainings: equal parameters, text that is held out, a bound that holds, real noise."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from analysis.studies.arena import PROFILES, SIZES, Parameters
from analysis.studies.arena import compute as arena
from analysis.studies.arena.trainings import clamp
from analysis.studies.arena.trainings.clamp import BoundedMixer, exponents, onset
from analysis.studies.arena.trainings.learning import learn_task
from analysis.studies.arena.trainings.pieces import NOISES, scores
from analysis.studies.arena.trainings.plan import Cell
from analysis.studies.arena.trainings.text import config_of, open_corpus, recipe_of, text_id
from analysis.theory.bounds import log_max
from mambabyte.config import ModelConfig
from mambabyte.errors import UserError
from mambabyte.evaluate import bits_per_byte
from mambabyte.model import ByteLM

SMALL = replace(Parameters(), systems=("M", "A", "MMMA"), budgets=(64, 128), context=8,
                batch_size=2, heldout_windows=2, adamw_rates=(0.01,), tasks=())
CELL = Cell("text", "M", "tiny", "adamw", 0.01, 0, 64)


@pytest.mark.parametrize("size", [s for s in SIZES if s != "tiny"])
def test_systems_of_a_size_have_its_parameters(size):
    counts = {s: config_of(PROFILES["full"], s, size).n_parameters
              for s in PROFILES["full"].systems}
    middle = np.median(list(counts.values()))
    # In the smallest, what an MLP has at the least is a hundredth of a model.
    assert max(abs(n / middle - 1) for n in counts.values()) < (0.03 if size == "0.25M" else 0.01)
    assert config_of(PROFILES["full"], "A/2", size).n_layer == SIZES[size][1] // 2


def test_a_sweep_goes_on_only_with_what_its_trainings_were_made_with(tmp_path):
    arena.same_settings(SMALL, tmp_path / "work")
    arena.same_settings(replace(SMALL, seeds=3, max_seconds=1.0), tmp_path / "work")
    for other, words in ((replace(SMALL, context=16, batch_size=1), "context=8"),
                         (replace(SMALL, systems=("A",)), "parameters of tiny="),
                         (replace(SMALL, device="cuda"), "device='cpu'"),
                         (replace(SMALL, task_systems=("A",)), "task_systems=")):
        with pytest.raises(UserError, match=f"trainings with {words}"):
            arena.same_settings(other, tmp_path / "work")


@pytest.mark.parametrize("text", ["{", "[]", '"cpu"', "\xff"])
def test_settings_that_are_none_are_named(tmp_path, text):
    (tmp_path / "settings").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"settings is no object of JSON.*choose another folder"):
        arena.same_settings(SMALL, tmp_path)


def test_a_row_of_another_sweep_is_refused(tmp_path):
    (tmp_path / "other.json").write_text('{"status": "done", "kind": "text", "seed": 0}')
    with pytest.raises(UserError, match="without budget, optimizer, rate, size, system, which"):
        arena.run(replace(SMALL, work=str(tmp_path)))


def test_another_text_of_the_same_name_is_refused(corpus_file, tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(Path(corpus_file).read_bytes())
    p = replace(SMALL, corpus=str(text), work=str(tmp_path / "work"), systems=("A",),
                parts=("text",))
    first = arena.run(p)
    text.write_bytes(text.read_bytes()[:-4000])
    open_corpus.cache_clear()
    text_id.cache_clear()
    assert len(arena.run(p).cells) == len(first.cells)  # nothing is trained, so nothing is read
    with pytest.raises(UserError, match="trainings with text="):
        arena.run(replace(p, seeds=2))


def test_rates_go_to_the_optimizer_that_a_cell_names():
    adamw = recipe_of(SMALL, CELL)
    muon = recipe_of(SMALL, replace(CELL, optimizer="muon", rate=0.02))
    assert (adamw.optimizer, adamw.lr) == ("adamw", 0.01)
    assert (muon.optimizer, muon.muon_lr, muon.lr) == ("muon", 0.02, pytest.approx(0.002))
    assert adamw.n_steps == 4


def test_what_chooses_is_never_trained_on(corpus_file):
    corpus, text, held = open_corpus(str(corpus_file))
    assert len(text) + len(held) == len(corpus.train)
    assert bytes(text) + bytes(held) == bytes(corpus.train)
    assert len(held) >= 0.01 * len(text)


def test_the_whole_study_in_pieces(corpus_file, tmp_path):
    """A run that ends early and the next one give what one run gives; the second does the rest."""
    p = replace(SMALL, corpus=str(corpus_file), work=str(tmp_path / "work"), systems=("A",))
    said: list[str] = []
    early = replace(p, max_seconds=1e-9)
    assert arena.run(early, said.append).cells.empty
    found = arena.run(p, said.append)
    count = len([line for line in said if ": done in" in line])
    assert count == len(found.cells) + 1  # and what a step costs
    assert found.costs["system"].tolist() == ["A"]
    again = arena.run(p, said.append)
    assert len([line for line in said if ": done in" in line]) == count
    assert again.best["bits_per_byte"].tolist() == found.best["bits_per_byte"].tolist()
    assert set(found.best["budget"]) == {64, 128}


def test_a_task_is_learned():
    """Four facts of two symbols each, which the convolution puts side by side."""
    p = replace(SMALL, task_steps=60, task_batch=16, task_systems=("M",), task_layers=1)
    row = learn_task(p, Cell("memorisation 4", "M", "16", "adamw", 0.03, 0, 60), "cpu")
    (one,) = row["accuracies"]
    assert one["accuracy"] > 0.9 > one["chance"]
    assert row["chosen_by"] == pytest.approx(1 - one["accuracy"], abs=0.05)  # on other samples


def test_the_samples_that_choose_a_rate_are_not_those_of_the_table(monkeypatch):
    found = iter([0.9, 0.5, 0.8, 0.3, 0.7, 0.4])
    monkeypatch.setattr("analysis.studies.arena.trainings.learning._accuracy",
                        lambda *_: next(found))
    p = replace(SMALL, task_steps=1, task_batch=2, task_systems=("M",))
    row = learn_task(p, Cell("selective copy 16", "M", "16", "adamw", 1e-3, 0, 1), "cpu")
    assert [one["accuracy"] for one in row["accuracies"]] == [0.9, 0.8, 0.7]
    assert row["chosen_by"] == pytest.approx(0.6)


def test_a_model_that_learned_nothing_is_asked_no_more_of():
    p = replace(SMALL, task_steps=1, task_batch=2, task_systems=("A",))
    row = learn_task(p, Cell("recall 16", "A", "16", "adamw", 1e-5, 0, 1), "cpu")
    assert [(a["size"], a["trained"], a["steps"]) for a in row["accuracies"]] == [
        (4, True, 1), (8, False, 0), (16, False, 0)]
    assert [a["state_bytes"] for a in row["accuracies"]] == [
        # Keys and values of two layers of 16 channels, float32; the window is the longest sample.
        2 * 2 * 16 * 4 * min(4 * size, 63) for size in (4, 8, 16)]


@pytest.mark.long
def test_attention_recalls_what_it_is_known_to(monkeypatch):
    """From 4 pairs up, solved each: on 16 at once it stays a guesser for thousands of steps."""
    monkeypatch.setattr("analysis.studies.arena.trainings.learning.HEAD", 32)
    p = replace(SMALL, task_batch=32, task_systems=("A", "D"))
    row = learn_task(p, Cell("recall 16", "A", "32", "adamw", 4e-3, 0, 1000), "cpu")
    assert min(a["accuracy"] for a in row["accuracies"]) > 0.98
    assert all(a["trained"] for a in row["accuracies"])


@pytest.fixture(scope="module")
def wide_steps():
    """A layer whose step sizes are far past the bound, free and bounded, of the same weights."""
    made = []
    for kinds in (None, {"M": BoundedMixer}):
        torch.manual_seed(0)
        model = ByteLM(ModelConfig(d_model=16, n_layer=1, d_state=4), kinds)
        with torch.no_grad():
            model.layers[0].mixer.dt_proj.bias.copy_(torch.linspace(4.0, 6.0, 32))
        made.append(model)
    return made


def test_the_bound_holds_whatever_the_weights(wide_steps):
    tokens = torch.randint(0, 256, (2, 3 * clamp.CHUNK))
    free, bounded = (exponents(model, tokens) for model in wide_steps)
    assert free["largest_in_chunk"] > log_max() > bounded["largest_in_chunk"] * (1 - 1e-5)
    assert bounded["largest"] == pytest.approx(log_max() / clamp.CHUNK, rel=1e-3)


def test_the_bound_holds_where_step_sizes_are_bfloat16(wide_steps):
    """Rounded to nearest, half of the channels' bounds would lie above."""
    mixer = wide_steps[1].layers[0].mixer
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        delta = mixer.scan_inputs(torch.randn(1, 4, 16), None)[1]
    assert delta.dtype == torch.bfloat16
    dt = torch.nn.functional.softplus(delta.float() + mixer.dt_bias.float())
    assert (dt * mixer.A_log.exp().amax(-1) <= log_max() / clamp.CHUNK * (1 + 1e-6)).all()


def test_a_bound_that_is_not_reached_changes_nothing():
    tokens = torch.randint(0, 256, (2, 12))
    logits = []
    for kinds in (None, {"M": BoundedMixer}):
        torch.manual_seed(0)
        model = ByteLM(ModelConfig(d_model=16, n_layer=1, d_state=4), kinds)
        logits.append(model(tokens)[0])
    torch.testing.assert_close(*logits)


def test_the_onset_is_seen_and_predicted_by_a_line():
    learned = np.arange(101.0)
    rows = [{"step": s, "learned": float(s), "largest_in_chunk": 40.0 + s}
            for s in range(0, 101, 10)]
    assert onset(rows, learned) == {"onset_seen": 50, "onset_predicted": 49}
    flat = [row | {"largest_in_chunk": 40.0} for row in rows]
    assert onset(flat, learned) == {"onset_seen": None, "onset_predicted": None}


def test_noise_touches_its_share_and_what_it_says():
    text = "Some plain words of a text, and a few more of them. " * 200
    noisy = {name: noise(text, np.random.default_rng(0)) for name, noise in NOISES.items()}
    assert noisy["none"] == text
    assert noisy["case"].lower() == text.lower() != noisy["case"]
    assert noisy["spacing"].replace(" ", "") == text.replace(" ", "")
    changed = sum(a != b for a, b in zip(noisy["typos"], text, strict=True)) / len(text)
    assert 0.02 < changed < 0.05


def test_bytes_are_scored_as_everywhere_else():
    torch.manual_seed(0)
    model = ByteLM(ModelConfig(d_model=16, n_layer=1, d_state=4))
    text = bytes(np.random.default_rng(0).integers(97, 110, 50).astype(np.uint8))
    clean = scores(model, text, None)[0]
    # There from a start byte on; here the first symbol is one of equals.
    from_start = 50 * bits_per_byte(model, text)
    with torch.no_grad():
        tokens = torch.tensor(list(text))[None]
        nats = torch.nn.functional.cross_entropy(model(tokens[:, :-1])[0][0], tokens[0, 1:],
                                                 reduction="sum")
    assert 50 * clean["bits_per_raw_byte"] == pytest.approx(8 + float(nats) / math.log(2), rel=1e-5)
    assert from_start == pytest.approx(50 * clean["bits_per_raw_byte"], rel=0.2)
