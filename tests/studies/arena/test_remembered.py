"""What a model remembers, and what a rounded state loses, against what can be known by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from analysis.studies.arena.memory import (
    attention_map,
    effective_context,
    gradient_horizon,
    half_lives,
    log_decays,
    stagnation_half_life,
)
from analysis.studies.arena.precision import FORMATS, WAYS, keeper, lost_bits, rounded, stream
from mambabyte.config import ModelConfig
from mambabyte.model import ByteLM, Mixer, mixers

TEXT = np.random.default_rng(0).integers(97, 110, 400).astype(np.uint8)
TOKENS = torch.from_numpy(TEXT[:24].copy()).long()


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return {letter: ByteLM(ModelConfig(
        d_model=16, n_layer=1, layer_pattern=letter, n_head=1, n_kv_head=1, d_state=4,
        ssd_head_dim=16, ssd_d_state=4, delta_head_dim=16, attention_window=64, local_window=4))
        for letter in "MSRDKAL"}


@pytest.mark.parametrize("letter", "MSDK")
def test_a_state_decays_as_its_log_decays_say(models, letter):
    """With nothing written, one step multiplies the state by the exponential of the log-decay of
    that step's input: the inputs that write are the state's difference from that."""
    mixer = mixers(models[letter], Mixer)[0]
    x = torch.randn(1, 1, 16)
    with torch.no_grad():
        _, empty = mixer(x, None)
        kind = type(empty)
        ones = kind(*(torch.zeros_like(t) for t in empty[:-1]), torch.ones_like(empty[-1]))
        _, after = mixer(x, ones)
        decay = mixer.log_decays(x)[0, 0].exp()
    kept = after[-1] - empty[-1]
    decay = decay.view(*decay.shape, *[1] * (kept.ndim - 1 - decay.ndim))
    if letter in "MS":
        torch.testing.assert_close(kept, decay.expand_as(kept), rtol=1e-4, atol=1e-5)
    else:  # the delta rule takes away what stands at the key as well
        assert (kept.abs() <= decay * (1 + math.sqrt(16)) + 1e-5).all()
        assert not torch.allclose(kept, torch.ones_like(kept))


def test_half_lives_are_of_mixers_with_decays_alone(models):
    for letter, model in models.items():
        rows = half_lives(model, TOKENS[None])
        assert len(rows) == (letter in "MSRDK")
        for found in rows:
            assert 0 < found["half_life_5"] <= found["half_life_50"] <= found["half_life_95"]
    (decay,) = log_decays(models["M"], TOKENS[None])
    assert half_lives(models["M"], TOKENS[None])[0]["half_life_50"] == pytest.approx(
        float((math.log(2) / -decay.double()).quantile(0.5)))


def test_effective_context_scores_the_same_bytes_whole_and_in_pieces(models):
    rows = effective_context(models["M"], TEXT[:129])
    found = {r["reset_every"]: r["bits_per_byte"] for r in rows}
    assert list(found) == [32, 64, 128]
    tokens = torch.from_numpy(TEXT[:129].copy()).long()[None]
    with torch.no_grad():
        whole = F.cross_entropy(models["M"](tokens[:, :-1])[0][0], tokens[0, 1:])
    assert found[128] == pytest.approx(float(whole) / math.log(2), rel=1e-5)


@pytest.mark.parametrize("letter", "MSRDKAL")
def test_the_implicit_map_is_causal_and_local_attention_is_local(models, letter):
    shares = attention_map(models[letter], TOKENS, 0)
    assert shares.sum(1).allclose(torch.ones(24), atol=1e-4)
    assert shares.triu(1).abs().max() == 0
    if letter == "L":
        assert shares.tril(-4).abs().max() == 0  # a window of 4 is the byte itself and 3 before it
    elif letter != "A":
        assert (shares.tril(-8) > 0).any()


def test_the_horizon_of_local_attention_is_its_window(models):
    tokens = torch.from_numpy(np.stack([TEXT[i : i + 65] for i in range(8)])).long()
    within = {r["distance"]: r["share_up_to_here"] for r in gradient_horizon(models["L"], tokens)}
    assert within[4] == pytest.approx(1.0)
    assert gradient_horizon(models["A"], tokens)[2]["share_up_to_here"] < 1


@pytest.mark.parametrize("kept", FORMATS)
def test_stochastic_rounding_is_right_on_average_and_lands_on_the_grid(kept):
    torch.manual_seed(0)
    x = torch.randn(64, 16)
    drawn = torch.stack([rounded(x, kept, stochastic=True) for _ in range(400)])
    nearest = rounded(x, kept)
    assert (drawn.mean(0) - x).abs().mean() < 0.2 * (nearest - x).abs().mean()
    if kept != "int8":  # whose grid is the row's
        torch.testing.assert_close(rounded(drawn[0], kept), drawn[0])
    torch.testing.assert_close(rounded(nearest, kept), nearest)


@pytest.mark.parametrize("letter", ["M", "S", "D", "K"])
def test_float32_streams_as_the_model_does_and_int8_loses_more_than_float16(models, letter):
    """Side by side, none touching the others' streams."""
    model, tokens = models[letter], torch.from_numpy(TEXT[:66].reshape(2, 33).copy()).long()
    bits, (*_, last) = stream(model, tokens, [*map(keeper, ("int8", "float32", "float16"))],
                              capture=False)
    with torch.no_grad():
        logits, state = model(tokens[:, :-1])
        nats = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert float(bits[1].mean()) == pytest.approx(float(nats) / math.log(2), rel=1e-4)
    torch.testing.assert_close(last[1], state[-1][-1], rtol=1e-3, atol=1e-4)
    assert (last[1] - last[2]).norm() < (last[1] - last[0]).norm()


def test_bits_lost_are_of_models_whose_state_decays(models):
    assert lost_bits(models["A"], TEXT[:128], "cpu")["precision"] == []
    found = lost_bits(models["M"], TEXT[:130], "cpu")
    assert {(row["kept"], row["way"]) for row in found["precision"]} == set(
        itertools.product(FORMATS, WAYS))
    numbers = {row["half_life_from"]: row["numbers"] for row in found["state_errors"]
               if (row["kept"], row["way"]) == ("int8", "nearest")}
    state = models["M"](torch.zeros(1, 1, dtype=torch.int64))[1]
    assert sum(numbers.values()) == sum(layer[-1].numel() for layer in state)


def test_rounding_to_nearest_stands_still_where_it_is_said_to():
    """A number of half-life h that is rounded to bfloat16 at every step, seven stored bits of
    mantissa: beyond the bound it stays where it began, well below it is gone."""
    bound = stagnation_half_life(7)
    for life, stays in ((4 * bound, True), (bound / 8, False)):
        x = torch.full((1, 1), 1.25)
        for _ in range(round(4 * life)):
            x = rounded(x * 2 ** (-1 / life), "bfloat16")
        assert (x == 1.25).item() is stays
