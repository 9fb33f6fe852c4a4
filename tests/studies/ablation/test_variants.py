"""The second document's choices, one at a time, and its arithmetic."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from analysis.studies.ablation import VARIANTS, documents, get_variant, variants
from mambabyte.config import ModelConfig, TrainConfig

SMALL = ModelConfig(d_model=16, n_layer=2, layer_pattern="MA", n_head=2, n_kv_head=2, d_state=4,
                    attention_window=32)


def groups(name: str) -> dict[bool, set[str]]:
    """The names of the parameters that Muon takes (True) and that AdamW does."""
    variant = get_variant(name)
    model = variants.build(SMALL, variant, seed=0)
    names = {p: n for n, p in model.named_parameters()}
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for group in variants.make_optimizer(model, variant, TrainConfig()).param_groups:
        owned = {names.pop(p) for p in group["params"]}  # KeyError for one that has two
        found[group["muon"]] |= owned
    return found


def test_each_parameter_has_one_group():
    for name in VARIANTS:
        variant = get_variant(name)
        every = {n for n, _ in variants.build(SMALL, variant, seed=0).named_parameters()}
        left_out = every - set().union(*groups(name).values())
        assert left_out == ({"layers.0.mixer.conv1d.weight"} if variant.frozen_taps else set())


def test_muon_takes_a_log_only_when_asked():
    a_log = "layers.0.mixer.A_log"
    assert a_log not in groups("Muon")[True]
    assert a_log in groups("Muon with A_log")[True]
    assert "layers.0.mixer.in_proj.weight" in groups("Muon")[True]
    assert "embedding.weight" not in groups("Muon")[True]


def test_the_published_rates_are_the_scripts():
    variant = get_variant("published")
    model = variants.build(SMALL, variant, seed=0)
    names = {p: n for n, p in model.named_parameters()}
    rate = {names[p]: g["peak_lr"] for g in variants.make_optimizer(
        model, variant, TrainConfig()).param_groups for p in g["params"]}
    assert rate["embedding.weight"] == 0.05
    assert rate["layers.0.mixer.A_log"] == rate["layers.1.mixer.q_proj.weight"] == 0.04
    assert {rate[n] for n in rate if n.endswith(("_gain", ".D", "bias"))} == {0.04}


@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_changes_what_it_says(name):
    variant = get_variant(name)
    model = variants.build(SMALL, variant, seed=0)
    settings = TrainConfig(n_steps=2, context=16, batch_size=2, lr=1e-3)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    batches = [torch.randint(0, 256, (2, 17), generator=torch.Generator().manual_seed(i))
               for i in range(2)]
    losses = variants.train_variant(model, variant, settings, lambda step: (batches[step],))
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
    taps = "layers.0.mixer.conv1d.weight"
    after = dict(model.named_parameters())
    assert torch.equal(before[taps], after[taps]) == variant.frozen_taps
    if variant.bf16_weights:
        assert torch.equal(after["embedding.weight"],
                           after["embedding.weight"].bfloat16().float())


def test_rounded_state_is_rounded_and_nothing_else():
    exact = variants.build(SMALL, get_variant("field"), seed=0).eval()
    rounded = variants.build(SMALL, get_variant("bf16 state"), seed=0).eval()
    tokens = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y, states = exact(tokens)
        z, rounded_states = rounded(tokens)
    h = rounded_states[0].ssm_state
    assert torch.equal(h, h.bfloat16().float())
    assert torch.allclose(states[0].ssm_state, h, rtol=0.05, atol=1e-4)
    assert not torch.equal(y, z)
    assert torch.allclose(y, z, atol=1e-2)


def test_half_life_by_hand():
    model = variants.build(replace(SMALL, dt_init="mamba", dt_min=0.01, dt_max=0.01),
                           get_variant("field"), seed=0)
    with torch.no_grad():
        model.layers[0].mixer.dt_proj.weight.zero_()
    life = variants.memory_half_life(model, torch.zeros(1, 8, dtype=torch.int64))
    assert life == pytest.approx(math.log(2) / 0.01, rel=1e-3)


def test_published_state_becomes_float32():
    table = variants.published_state_dtypes()
    assert table["state"].tolist() == ["bfloat16", "float32", "float32"]


def test_warm_down_by_hand():
    # 200 steps without a cap: factors (200 - s) / 1200, whose sum is 200 * 201 / 2 / 1200.
    assert variants.effective_steps(1.0, iterations=200) == (200, pytest.approx(16.75))
    # A cap of 180 s at 37 s a step: 1, then 143, 106, 69, 32 of 1200 * 37.
    steps, total = variants.effective_steps(37.0, iterations=10**6, cap_seconds=180.0)
    assert steps == 5
    assert total == pytest.approx(1 + (143 + 106 + 69 + 32) / (1200 * 37))


def test_documents_arithmetic():
    ours = documents.document_checks().set_index("key")["ours"]
    assert ours["parameters"] == 1_057_152
    assert ours["tokens"] == 65_536_000
    assert (ours["hybrid_ssm_layers"], ours["hybrid_attention_layers"]) == (7, 2)
    # in 512 x 2048, conv 5 x 1024, B and C 2 x 16 x 1024, dt 1024 x 1024 + 1024, A, D, out.
    ssm = 512 * 2048 + 5 * 1024 + 32 * 1024 + 1024 * 1024 + 1024 + 16 * 1024 + 1024 + 1024 * 512
    attention = 2 * 512 * 512 + 2 * 512 * 256 + 8
    assert ours["ssm_over_attention_parameters"] == pytest.approx(ssm / attention)
