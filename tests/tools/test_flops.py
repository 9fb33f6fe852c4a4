"""Closed-form operations against torch's counter, against sums by hand, and matched sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from analysis.theory.flops import (
    CONVOLUTION,
    FORMULA,
    MATMUL,
    count_flops,
    flops_per_byte,
    flops_table,
    layer_flops_crossover,
)
from analysis.theory.matching import GPU_WIDTHS, match_parameters, match_patterns, systems_table
from mambabyte.config import ModelConfig, get_preset
from mambabyte.errors import UserError
from mambabyte.model import AttentionMixer, ByteLM
from mambabyte.model.families.attention import mean_keys

SMALL = ModelConfig(d_model=32, n_layer=3, layer_pattern="MA", n_head=4, n_kv_head=2, d_state=8,
                    attention_window=64)
CONFIGS = {
    "hybrid with grouped heads": SMALL,
    "pure SSM": replace(SMALL, layer_pattern="M", norm="rms"),
    "attention with MLP": replace(SMALL, layer_pattern="A", mlp_ratio=2.0),
    "beyond the window": replace(SMALL, layer_pattern="A", attention_window=8),
    "full-rank dt": replace(SMALL, dt_rank="full", mlp_ratio=1.5),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_formula_equals_the_counter_for_matrix_products(name):
    table = count_flops(CONFIGS[name], length=33, batch=2)
    products = table[table["counted"] == MATMUL]
    assert set(products["pass"]) == {"forward", "backward"}
    assert (products["formula_over_counter"] == 1.0).all()


def test_counter_takes_a_depthwise_backward_for_a_dense_one():
    # Input gradient K, weight gradient K times d_inner: (1 + d_inner) / 2 of what it takes.
    table = count_flops(SMALL, length=16).set_index(["counted", "pass"])
    ratios = table["formula_over_counter"]
    assert ratios[CONVOLUTION, "forward"] == 1.0
    assert ratios[CONVOLUTION, "backward"] == pytest.approx(2 / (1 + SMALL.d_inner))


def test_a_wrong_formula_would_show():
    # A counter of another model is not matched: the test above can fail.
    table = count_flops(SMALL, length=16)
    other = flops_table(replace(SMALL, d_model=40), 16, causal=False)
    mine = other[other["counted_by"] == MATMUL]["forward_flops_per_byte"].sum() * 16
    assert mine != table["counter_flops"].iloc[0]


def test_scan_by_hand():
    config = ModelConfig(d_model=16, n_layer=1, d_state=4)
    scan = flops_table(config, 10).set_index("module").loc["SSM scan"]
    assert scan["counted_by"] == FORMULA
    assert scan["forward_flops_per_byte"] == 32 * (4 * 6 + 8)
    assert scan["backward_flops_per_byte"] == 32 * (4 * 14 + 16)
    assert scan["exp_per_byte"] == 32 * (4 + 3)


@pytest.mark.parametrize(("changes", "expected"), [
    # Two norms and two additions a layer with an MLP, one of each without; one norm at the end.
    ({}, (3 * 8 + 2) * 16), ({"norm": "rms"}, (3 * 4 + 2) * 16),
    ({"mlp_ratio": 2.0}, (5 * 8 + 4) * 16 + 2 * 2 * 32), ({"embed_norm": True}, (4 * 8 + 2) * 16),
    ({"block_scales": True}, (3 * 8 + 2 * 2) * 16),
    ({"residual_mix": True}, (3 * 8 + 2 + 3 * 2) * 16)])
def test_elementwise_operations_by_hand(changes, expected):
    config = ModelConfig(d_model=16, n_layer=2, layer_pattern="A", n_head=2, n_kv_head=2, **changes)
    row = flops_table(config, 10).set_index("module").loc["elementwise"]
    mixer, exp = AttentionMixer.elementwise(config)
    assert row["forward_flops_per_byte"] == expected + 2 * mixer + 5 * 256
    assert row["exp_per_byte"] == 2 * exp + 256
    assert row["counted_by"] == FORMULA


def test_mean_keys():
    assert mean_keys(1, 99) == 1
    assert mean_keys(4, 99) == 2.5  # 1, 2, 3, 4
    assert mean_keys(4, 2) == 1.75  # 1, 2, 2, 2
    assert mean_keys(4, 5, causal=False) == 4
    assert mean_keys(4, 2, causal=False) == 3  # 2 queries see 2, then 2 see 4, masked
    assert mean_keys(5, 2, causal=False) == 4  # and a block of 2 for the fifth
    with pytest.raises(UserError, match="at least 1"):
        mean_keys(0, 1)


def test_ssm_cost_does_not_grow_with_length_and_attention_does():
    ssm, attention = (replace(SMALL, layer_pattern=p, attention_window=2**30) for p in "MA")
    assert flops_per_byte(ssm, 64) == flops_per_byte(ssm, 65536)
    assert flops_per_byte(attention, 65536) > 10 * flops_per_byte(attention, 64)


def test_crossover_is_where_it_says():
    config = replace(get_preset("mamba_byte").model, attention_window=2**30)
    at = layer_flops_crossover(config)
    assert layer_flops_crossover(config, AttentionMixer) is None  # never below itself
    cost = {}
    for length in (at - 1, at):
        for letter in "MA":
            table = flops_table(replace(config, layer_pattern=letter, n_layer=1), length)
            own = table[~table["module"].isin(["head", "elementwise"])]
            cost[letter, length] = (own["forward_flops_per_byte"].sum()
                                    + own["backward_flops_per_byte"].sum())
    assert cost["A", at - 1] <= cost["M", at - 1]
    assert cost["A", at] > cost["M", at]


@pytest.mark.parametrize("by", ["mlp", "d_model"])
def test_matched_sizes_are_those_of_the_real_models(by):
    base = replace(SMALL, mlp_ratio=0.0 if by == "mlp" else 1.0, d_model=64)
    systems = match_patterns(base, ("M", "MA", "A"), by=by)
    # One MLP column is n_layer * 2 * d_model parameters; a d_model step is far coarser.
    slack = 64 * 3 if by == "mlp" else 0.15 * systems["M"].target
    for matched in systems.values():
        assert sum(p.numel() for p in ByteLM(matched.config).parameters()) \
            == matched.config.n_parameters
        assert abs(matched.config.n_parameters - matched.target) <= slack
    assert systems["M"].mismatch == 0 or by == "d_model"


def test_a_gpu_gets_widths_that_its_matrix_products_like():
    base = replace(SMALL, d_model=64, n_layer=6)
    for multiple in (1, GPU_WIDTHS):
        systems = match_patterns(base, ("M", "MA", "A"), multiple=multiple)
        widths = [m.config.mlp_hidden for m in systems.values()]
        assert all(w % multiple == 0 for w in widths), multiple
        assert widths[-1] > widths[-2] > 0
        assert max(abs(m.mismatch) for m in systems.values()) < 0.03
    assert any(m.config.mlp_hidden % 8 for m in match_patterns(base, ("M", "MA", "A")).values())


def test_matching_picks_the_nearest_width():
    for target in (20_000, 20_100, 20_155, 40_001):
        best = match_parameters(replace(SMALL, layer_pattern="A"), target)
        width = best.config.mlp_hidden
        for other in (width - 1, width + 1):
            if other >= 0:
                worse = replace(best.config, mlp_ratio=other / SMALL.d_model)
                assert abs(worse.n_parameters - target) >= abs(best.config.n_parameters - target)


def test_a_pattern_just_above_the_target_has_no_mlp():
    bare = replace(SMALL, mlp_ratio=0.0).n_parameters
    assert match_parameters(SMALL, round(bare / 1.009)).config.mlp_ratio == 0
    with pytest.raises(UserError, match="without an MLP"):
        match_parameters(SMALL, round(bare / 1.02))


def test_matching_refuses_what_it_cannot_reach():
    with pytest.raises(UserError, match="without an MLP"):
        match_parameters(SMALL, 10)
    with pytest.raises(UserError, match="choose mlp or d_model"):
        match_parameters(SMALL, 10**6, by="depth")
    with pytest.raises(UserError, match="no layer patterns"):
        match_patterns(SMALL, ())


def test_systems_table_has_a_row_a_pattern():
    table = systems_table(match_patterns(SMALL, ("M", "A")), 64)
    assert table["pattern"].tolist() == ["M", "A"]
    assert table["mismatch_percent"].abs().max() < 1
    assert (table["full_cache_bytes"] >= table["state_bytes"]).all()
