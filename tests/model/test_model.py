"""Models: exact counts, initial loss, pattern, state, exponents."""

from __future__ import annotations

import argparse
import json
import logging
import math
import pickle
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mambabyte.config import PRESETS, ModelConfig, TrainConfig, get_preset
from mambabyte.config.mixers import SPECS
from mambabyte.errors import UserError
from mambabyte.evaluate import bits_per_byte, score
from mambabyte.model import ByteLM, record_exponents
from mambabyte.model.families.attention import AttentionMixer, rotary_table, rotate
from mambabyte.model.families.mamba import MambaMixer
from mambabyte.ops.compare import relative_rms
from mambabyte.stream import ByteStream

SMALL = ModelConfig(d_model=32, n_layer=4, d_state=4, n_head=4, n_kv_head=2, attention_window=12)


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts_are_exact_by_group(name):
    config = PRESETS[name].model
    with torch.device("meta"):
        model = ByteLM(config)
    groups = dict.fromkeys(config.parameter_groups(), 0)
    for key, p in model.named_parameters():
        parts = key.split(".")
        if parts[0] in ("embedding", "head"):
            group = parts[0]
        elif "norm" in parts[0] or (len(parts) > 2 and "norm" in parts[2]):
            group = "norm"
        elif parts[2] == "mlp":
            group = "mlp"
        elif parts[2].endswith("_gain"):
            group = "residual"
        elif config.layers[int(parts[1])] == "A":
            group = "attention"
        else:
            group = {"conv1d": "ssm_conv"}.get(parts[3], "ssm_" + parts[3])
        groups[group] += p.numel()
    assert groups == config.parameter_groups()
    assert sum(groups.values()) == config.n_parameters


def test_document_sizes():
    config = PRESETS["mamba_byte"].model
    assert config.d_inner == 384
    assert config.dt_rank_value == 12
    assert config.n_parameters == 1_057_152  # "~1.06M total"
    assert PRESETS["hybrid_3_1"].model.layers == "MMMAMMMAM"  # 7 SSM and 2 attention
    assert PRESETS["ssm_1"].model.layers == "MAMAMAMAM"


def test_initial_loss_is_near_ln_256_on_text():
    text = "".join(m.__doc__ for m in (re, json, argparse, logging, pickle)).encode()
    tokens = torch.tensor(list(text[: len(text) // 512 * 512])).view(-1, 512)
    tokens = tokens[:: len(tokens) // 8][:8]
    with torch.no_grad():
        loss = ByteLM(PRESETS["mamba_byte"].model).loss(tokens).item()
    assert loss == pytest.approx(math.log(256), abs=0.1)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("pattern", ["M", "A", "MMMA", "MA"])
@pytest.mark.parametrize("mlp", [0.0, 2.0])
def test_pieces_equal_the_whole(pattern, norm, mlp):
    config = replace(SMALL, layer_pattern=pattern, norm=norm, mlp_ratio=mlp)
    model = ByteLM(config)
    tokens = torch.randint(0, 256, (2, 40))  # longer than the attention window
    whole, _ = model(tokens)
    state, parts = None, []
    for piece in tokens.split([1, 1, 17, 3, 18], dim=1):
        logits, state = model(piece, state)
        parts.append(logits)
    assert relative_rms(torch.cat(parts, 1), whole) < 1e-5


def test_attention_window_is_a_window():
    config = replace(SMALL, n_layer=1, layer_pattern="A")
    model = ByteLM(config)
    a = torch.randint(0, 256, (1, 30))
    b = a.clone()
    b[0, 5] = (b[0, 5] + 1) % 256
    logits_a, logits_b = model(a)[0], model(b)[0]
    changed = (logits_a != logits_b).any(-1)[0].nonzero().flatten().tolist()
    assert changed == list(range(5, 5 + config.attention_window))


def test_the_epsilon_of_the_norms_is_torchs_unless_given():
    for norm, default in (("layer", 1e-5), ("rms", None), ("rms_plain", None)):
        config = replace(SMALL, norm=norm)
        assert ByteLM(config).norm_f.eps == default
        assert ByteLM(replace(config, norm_eps=1e-3)).blocks[0].norm.eps == 1e-3
    with pytest.raises(UserError, match="norm_eps is -1"):
        replace(SMALL, norm_eps=-1.0)


@pytest.mark.parametrize("pattern", ["M", "A", "MA"])
def test_causality(pattern):
    model = ByteLM(replace(SMALL, layer_pattern=pattern))
    tokens = torch.randint(0, 256, (1, 20))
    other = tokens.clone()
    other[0, 10:] = (other[0, 10:] + 1) % 256
    assert torch.equal(model(tokens)[0][:, :10], model(other)[0][:, :10])


def test_grouped_heads_equal_repeated_heads():
    torch.manual_seed(3)
    grouped = AttentionMixer(replace(SMALL, layer_pattern="A"))
    full = AttentionMixer(replace(SMALL, layer_pattern="A", n_kv_head=4))
    with torch.no_grad():
        full.q_proj.weight.copy_(grouped.q_proj.weight)
        full.out_proj.weight.copy_(grouped.out_proj.weight)
        for name in ("k_proj", "v_proj"):
            heads = getattr(grouped, name).weight.unflatten(0, (2, 8))
            getattr(full, name).weight.copy_(heads.repeat_interleave(2, 0).flatten(0, 1))
    x = torch.randn(2, 9, 32)
    assert relative_rms(grouped(x, None)[0], full(x, None)[0]) < 1e-6


def test_rotation_depends_on_distance_only():
    q, k = torch.randn(1, 1, 1, 8).double(), torch.randn(1, 1, 1, 8).double()

    def product(i, j):
        tables = [rotary_table(p, 1, 4, 1e4, 1.0, q.device) for p in (i, j)]
        return (rotate(q, tables[0]) * rotate(k, tables[1])).sum().item()

    assert product(7, 3) == pytest.approx(product(1_000_004, 1_000_000), rel=1e-9)
    assert product(7, 3) != pytest.approx(product(7, 4), rel=1e-3)


def test_truncated_rotation_leaves_the_slow_half_alone():
    x = torch.randn(1, 1, 5, 8)
    turned = rotate(x, rotary_table(3, 5, 4, 1024.0, 0.5, x.device))
    assert torch.equal(turned[..., 2:4], x[..., 2:4])
    assert torch.equal(turned[..., 6:8], x[..., 6:8])
    assert not torch.allclose(turned[..., :2], x[..., :2])
    angle = 3 / 32  # second of two frequencies: 1024^(-1/2)
    expected = x[0, 0, 0, 1] * math.cos(angle) - x[0, 0, 0, 5] * math.sin(angle)
    assert turned[0, 0, 0, 1].item() == pytest.approx(expected.item(), rel=1e-5)


def test_state_stays_constant_in_size():
    for pattern in ("M", "MA"):
        model = ByteLM(replace(SMALL, layer_pattern=pattern))
        state, sizes = None, []
        for _ in range(3 * SMALL.attention_window):
            _, state = model(torch.randint(0, 256, (1, 1)), state)
            sizes.append(sum(t.numel() for s in state for t in s if isinstance(t, torch.Tensor)))
        assert len(set(sizes[SMALL.attention_window :])) == 1


def test_the_exponent_is_the_largest_cumulated_log_decay():
    model = ByteLM(replace(SMALL, layer_pattern="M", n_layer=2))
    tokens = torch.randint(0, 256, (2, 70))
    captured = {}
    for i, layer in enumerate(model.layers):
        mixer: MambaMixer = layer.mixer
        mixer.register_forward_pre_hook(
            lambda m, a, i=i: captured.__setitem__(
                i, F.softplus(m.scan_inputs(a[0], None)[1] + m.dt_proj.bias)))
    with record_exponents(model, chunk=32) as exponents:
        model(tokens)
    for i, layer in enumerate(model.layers):
        log_decay = captured[i].unsqueeze(-1) * layer.mixer.A_log.exp()
        expected = max(log_decay[:, s : s + 32].sum(1).max().item() for s in (0, 32, 64))
        assert exponents[i] == pytest.approx(expected, rel=1e-5)


def test_dt_initialisation_is_log_uniform():
    bias = torch.cat([MambaMixer(PRESETS["mamba_byte"].model).dt_proj.bias for _ in range(8)])
    dt = F.softplus(bias.double()).detach().numpy()
    assert 0.99e-3 < dt.min() < 2e-3
    assert 0.05 < dt.max() < 0.101
    assert np.log(dt).mean() == pytest.approx(np.log(1e-2), abs=0.1)


def test_overfits_a_tiny_corpus():
    model = ByteLM(replace(SMALL, layer_pattern="M", n_layer=2))
    text = b"the quick brown fox jumps over the lazy dog. " * 3
    tokens = torch.tensor(list(text))[None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        loss = model.loss(tokens)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [({"layer_pattern": "MXA"}, r"at least one, each of M \(selective SSM\), A \(causal att"),
     ({"layer_pattern": ""}, "at least one, each of M"),
     ({"n_head": 5, "layer_pattern": "A"}, "does not split into 5 heads"),
     ({"n_head": 6, "n_kv_head": 4, "layer_pattern": "A"}, "not a multiple"),
     ({"d_model": 0}, "d_model is 0"),
     ({"scan_form": "quick"}, "scan_form is .quick.: expected one of auto"),
     ({"dt_min": 0.0}, "dt_min"), ({"dt_rank": 0}, "dt_rank is 0")],
)
def test_bad_configurations(change, message):
    with pytest.raises(UserError, match=message):
        ModelConfig(**change)


def test_bad_recipes_and_presets():
    with pytest.raises(UserError, match="context is 0"):
        TrainConfig(context=0)
    with pytest.raises(UserError, match="lr is nan"):
        TrainConfig(lr=math.nan)
    with pytest.raises(UserError, match="'mamba' is unknown: choose one of quick_start,"):
        get_preset("mamba")


def test_a_layer_with_other_scan_inputs_has_them_in_every_call():
    """Bytes one by one too, which the fused step would read without them."""

    class Louder(MambaMixer):
        def scan_inputs(self, x, conv_state):
            u, delta, B, C, z, conv_state = super().scan_inputs(x, conv_state)
            return u, delta, B, 3 * C, z, conv_state

    layer, x = Louder(SMALL), torch.randn(2, 5, SMALL.d_model)
    with torch.no_grad():
        whole, state = layer(x, None)[0], None
        for t in range(x.shape[1]):
            y, state = layer(x[:, t : t + 1], state)
            assert relative_rms(y, whole[:, t : t + 1]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_tokens_may_be_any_integers(dtype: torch.dtype) -> None:
    model = ByteLM(ModelConfig(d_model=16, n_layer=2, layer_pattern="MA", d_state=2, n_head=2,
                               n_kv_head=2))
    tokens = torch.randint(0, 256, (2, 9))
    assert torch.equal(model(tokens.to(dtype))[0], model(tokens)[0])
    grads = []
    for given in (tokens, tokens.to(dtype)):
        model.zero_grad()
        model.loss(given).backward()
        grads.append(model.embedding.weight.grad.clone())
    assert torch.equal(*grads)


@pytest.mark.parametrize(("tokens", "message"), [
    (torch.rand(1, 3), "expected integers"), (torch.ones(1, 3).bool(), "expected integers"),
    (torch.tensor([1, 2]), r"shape \(2,\)"), (torch.zeros(2, 0).long(), r"shape \(2, 0\)"),
    (torch.tensor([[1, 300]]), "from 1 to 300: the model has 256 symbols"),
    (torch.tensor([[-1, 3]]), "from -1 to 3")])
def test_tokens_that_are_none_are_one_clear_line(tokens: torch.Tensor, message: str) -> None:
    model = ByteLM(ModelConfig(d_model=8, n_layer=1, d_state=2))
    for use in (model, model.loss):
        with pytest.raises(UserError, match=message):
            use(tokens)


def test_an_empty_batch_has_no_loss() -> None:
    model = ByteLM(ModelConfig(d_model=8, n_layer=1, d_state=2))
    assert model(torch.zeros(0, 5).long())[0].shape == (0, 5, 256)
    for tokens in (torch.zeros(0, 5), torch.zeros(2, 1)):
        with pytest.raises(UserError, match="tokens have"):
            model.loss(tokens.long())


@pytest.mark.parametrize("letter", SPECS)
def test_shapes_are_found_on_the_meta_device(letter: str) -> None:
    config = ModelConfig(d_model=16, n_layer=1, layer_pattern=letter, d_state=2, n_head=2,
                         n_kv_head=2, ssd_head_dim=16, ssd_d_state=4, delta_head_dim=8)
    with torch.device("meta"):
        model = ByteLM(config)
        model.loss(torch.zeros(2, 5, dtype=torch.long)).backward()
    assert model.embedding.weight.grad.shape == (256, 16)
    for use in (ByteStream, lambda model: score(model, b"abc"),
                lambda model: bits_per_byte(model, b"abc")):
        with pytest.raises(UserError, match="on the device meta"):
            use(model)


@pytest.mark.parametrize("letter", "MSRDKAL")
def test_what_is_no_text_and_no_state_is_one_line(letter):
    shape = {"d_model": 32, "n_layer": 2, "ssd_head_dim": 16, "ssd_d_state": 16,
             "delta_head_dim": 16, "n_head": 2, "n_kv_head": 2}
    model = ByteLM(ModelConfig(layer_pattern=letter, **shape))
    tokens = torch.randint(256, (2, 20))
    _, state = model(tokens)
    nested = torch.nested.nested_tensor([tokens[0], tokens[1]], layout=torch.jagged)
    for wrong in (tokens.tolist(), b"abc", "abc", None, tokens.numpy(), tokens.to_sparse(), nested,
                  tokens.to("meta")):
        for call in (model, model.loss):
            with pytest.raises(UserError, match="tokens are"):
                call(wrong)
    other = ByteLM(ModelConfig(layer_pattern="M" if letter != "M" else "S", **shape))
    wide = ByteLM(ModelConfig(layer_pattern=letter, **shape | {"d_model": 64}))
    wrong_states = [3, "abc", (), {}, state[:1], [*state, state[0]], ["a", "b"],
                    model(tokens[:1])[1], other(tokens)[1], wide(tokens)[1]]
    for wrong in wrong_states:
        with pytest.raises(UserError):
            model(tokens, wrong)
    again, _ = model(tokens, tuple(state))
    assert torch.equal(again, model(tokens, state)[0])
