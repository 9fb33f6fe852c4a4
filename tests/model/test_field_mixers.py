"""The field's mixers as layers: streaming, sizes, costs, roles."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from analysis.measure.allocations import measure_peak, measure_saved
from analysis.theory.flops import CONVOLUTION, count_flops, flops_per_byte, flops_table
from analysis.theory.kept_tensors import AUTOCASTS, saved_terms
from analysis.theory.step_memory import budget, state_bytes
from mambabyte.config import ModelConfig, TrainConfig
from mambabyte.errors import UserError
from mambabyte.model import MIXERS, ByteLM
from mambabyte.model.mixer import Step
from mambabyte.ops.compare import relative_rms
from mambabyte.ops.delta import cuda as kernels
from mambabyte.train.optim import make_optimizer, roles

BASE = ModelConfig(d_model=32, n_layer=2, norm="rms", ssd_head_dim=16, ssd_d_state=8,
                   delta_head_dim=8, n_head=2, n_kv_head=2)
CONFIGS = {
    "Mamba-2": replace(BASE, layer_pattern="S"),
    "Mamba-2, groups": replace(BASE, layer_pattern="S", ssd_groups=2, expand=1),
    "Mamba-3, groups": replace(BASE, layer_pattern="R", ssd_groups=2, expand=1, norm="layer",
                               ssd_rope_fraction=1.0),
    "Gated DeltaNet": replace(BASE, layer_pattern="D"),
    "Gated DeltaNet, wide": replace(BASE, layer_pattern="D", delta_expand_v=2, d_conv=1),
    "KDA": replace(BASE, layer_pattern="K"),
    "KDA, wide": replace(BASE, layer_pattern="K", delta_expand_v=2, norm="layer"),
    "local attention": replace(BASE, layer_pattern="L", local_window=12),
    "hybrid": replace(BASE, layer_pattern="SDKRMAL", n_layer=7, mlp_ratio=1.0, local_window=8),
}
by_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@by_config
def test_streaming_equals_parallel(config):
    model = ByteLM(config).double()
    tokens = torch.randint(0, 256, (2, 75))
    whole, last = model(tokens)
    parts, state = [], None
    for start, end in ((0, 40), (40, 41), (41, 42), (42, 75)):
        logits, state = model(tokens[:, start:end], state)
        parts.append(logits)
    assert relative_rms(torch.cat(parts, 1), whole) < 1e-12
    for one, two in zip(state, last, strict=True):
        for a, b in zip(one, two, strict=True):
            if isinstance(a, torch.Tensor) and a.numel():
                assert relative_rms(a, b) < 1e-12


@by_config
def test_nothing_sees_what_comes_later(config):
    model = ByteLM(config).double()
    tokens = torch.randint(0, 256, (1, 50))
    other = tokens.clone()
    other[:, 37:] = 0
    assert torch.allclose(model(tokens)[0][:, :37], model(other)[0][:, :37], atol=1e-12, rtol=0)


@by_config
def test_parameters_are_those_of_the_closed_form(config):
    model = ByteLM(config)
    for letter, layer in zip(config.layers, model.layers, strict=True):
        found = {name: tuple(p.shape) for name, p in layer.mixer.named_parameters()}
        assert found == MIXERS[letter].shapes(config)
    assert sum(p.numel() for p in model.parameters()) == config.n_parameters


def test_names_are_those_of_the_public_mamba2_checkpoints():
    # state-spaces/mamba2-130m: d_model 768, 24 heads of 64 channels, 128 states.
    config = ModelConfig(d_model=768, n_layer=1, layer_pattern="S", ssd_d_state=128)
    assert MIXERS["S"].shapes(config) == {
        "in_proj.weight": (3352, 768), "conv1d.weight": (1792, 1, 4), "conv1d.bias": (1792,),
        "dt_bias": (24,), "A_log": (24,), "D": (24,), "norm.weight": (1536,),
        "out_proj.weight": (768, 1536)}


def test_a_hook_on_a_norm_of_mamba3_is_heard() -> None:
    """Its norms are otherwise part of what makes the scan's inputs."""
    model, tokens = ByteLM(replace(BASE, layer_pattern="R")), torch.randint(256, (1, 9))
    plain, _ = model(tokens)
    norm = model.layers[0].mixer.B_norm
    with norm.register_forward_hook(lambda module, args, made: made):
        torch.testing.assert_close(model(tokens)[0], plain)
    with norm.register_forward_hook(lambda module, args, made: 2 * made):
        assert not torch.allclose(model(tokens)[0], plain, rtol=0, atol=1e-5)


def test_names_are_those_of_the_public_mamba3_module():
    # mamba_ssm's Mamba3(d_model=768), of one input and output: 128 states, half of them turn.
    config = ModelConfig(d_model=768, n_layer=1, layer_pattern="R", ssd_d_state=128)
    assert MIXERS["R"].shapes(config) == {
        "in_proj.weight": (2 * 1536 + 2 * 128 + 3 * 24 + 32, 768), "dt_bias": (24,),
        "B_bias": (24, 1, 128), "C_bias": (24, 1, 128), "D": (24,), "B_norm.weight": (128,),
        "C_norm.weight": (128,), "out_proj.weight": (768, 1536)}


@by_config
def test_state_bytes_are_those_of_a_stream(config):
    model = ByteLM(config)
    _, state = model(torch.randint(0, 256, (1, 19)))
    counted = sum(4 * t.numel() for layer in state for t in layer if isinstance(t, torch.Tensor))
    assert counted == sum(state_bytes(config, 19).values())
    for letter, layer in zip(config.layers, state, strict=True):
        shapes = {name: tuple(t.shape[1:]) for name, t in layer._asdict().items()
                  if isinstance(t, torch.Tensor)}
        assert shapes == MIXERS[letter].state_shapes(config, 19)

def test_names_of_how_a_mixer_runs():
    config = ModelConfig(d_model=192, layer_pattern="SDK", n_layer=3)  # heads of 64
    names = {letter: MIXERS[letter].kernel_name(config, 100, "cuda") for letter in "SDK"}
    assert all(name.endswith(", kernels for bf16") for name in names.values()), names
    narrow = replace(config, ssd_head_dim=32)
    assert MIXERS["S"].kernel_name(narrow, 100, "cuda") == "Mamba-2, torch"
    assert MIXERS["D"].kernel_name(config, 100) == "Gated DeltaNet, torch"


@pytest.mark.parametrize("letter", "DK")
def test_what_the_rules_kernels_keep_is_counted(letter):
    config = replace(BASE, layer_pattern=letter, d_model=128, delta_head_dim=64)
    q = torch.empty(3, 70, 2, 64, dtype=torch.bfloat16)
    gate = torch.empty(3, 70, 2, 64 if letter == "K" else 1)
    kept = sum(t.nbytes for t in kernels.Kept.empty(q, gate, True))
    found = [t for t in MIXERS[letter].kept(config, Step(3, 70, torch.bfloat16, "cuda"))
             if t.part == "rule"]
    assert kept == sum(t.elements * t.itemsize for t in found)
    other = MIXERS[letter].kept(config, Step(3, 70, torch.float16, "cuda"))
    assert not [t for t in other if t.part == "rule"]



@by_config
@pytest.mark.parametrize("autocast", AUTOCASTS)
@pytest.mark.parametrize(("batch", "length"), [(1, 32), (3, 45)])
def test_kept_bytes_are_exact(config, autocast, batch, length):
    predicted = sum(t.bytes for t in saved_terms(config, batch, length, autocast))
    assert predicted == measure_saved(config, batch, length, autocast)


@pytest.mark.parametrize(("letter", "autocast"), [
    ("S", "fp32"), ("D", "fp32"), ("K", "bf16"), *(
        pytest.param(letter, autocast, marks=pytest.mark.long) for letter, autocast in (
            ("S", "bf16"), ("D", "bf16"), ("K", "fp32"), ("R", "fp32"), ("R", "bf16")))])
def test_peak_of_a_step(letter, autocast):
    # What the backward pass takes for itself is a fit here, not a sum of tensors: 8 %, not 5.
    config = replace(BASE, layer_pattern=letter, d_model=128, ssd_head_dim=32, delta_head_dim=32)
    step = budget(config, 2, 256, autocast)
    assert "backward" in step.worst_moment
    measured = measure_peak(config, 2, 256, autocast)
    assert (step.peak - step.weights - step.optimizer) / measured == pytest.approx(1, abs=0.08)


@by_config
def test_operations_are_those_of_the_counter(config):
    table = count_flops(config, length=33, batch=2)
    forward = table[table["counted"] != CONVOLUTION]
    assert (forward["formula_over_counter"] == 1.0).all()
    convolutions = table[(table["counted"] == CONVOLUTION) & (table["pass"] == "forward")]
    assert (convolutions["formula_over_counter"] == 1.0).all()


def test_scans_by_hand():
    config = replace(BASE, n_layer=1, layer_pattern="S")
    scan = flops_table(config, 10).set_index("module").loc["Mamba-2 scan"]
    # 4 heads of 16 channels by 8 states: 5 a number of the state; dt x and skip 3 a channel;
    # bias, softplus and rate 3 a head.
    assert scan["forward_flops_per_byte"] == 4 * 16 * 8 * 5 + 64 * 3 + 4 * 3
    assert scan["exp_per_byte"] == 12
    scan = flops_table(replace(config, layer_pattern="R"), 10).set_index("module").loc[
        "Mamba-3 scan"]
    # The same state; skip and own part 2 a channel; of each head 5 a state, 15 for each of 2 pairs
    # that turn, 10 of gates.
    assert scan["forward_flops_per_byte"] == 4 * 16 * 8 * 5 + 64 * 2 + 4 * (8 * 5 + 2 * 15 + 10)
    assert scan["exp_per_byte"] == 4 * (7 + 2 * 2) + 2
    for letter, gates in (("D", 4), ("K", 32)):
        config = replace(BASE, n_layer=1, layer_pattern=letter)
        rows = flops_table(config, 10).set_index("module")
        rule = rows.loc[f"{MIXERS[letter].about} rule"]
        # 4 heads of 8 by 8: 7 a number of the state, 2 a value channel, 3 a gate.
        assert rule["forward_flops_per_byte"] == 4 * 64 * 7 + 32 * 2 + gates * 3
        assert rule["exp_per_byte"] == 3 * gates + 4


@pytest.mark.parametrize("letter", "SRDK")
def test_cost_of_a_byte_does_not_grow_with_the_length(letter):
    config = replace(BASE, layer_pattern=letter)
    assert flops_per_byte(config, 64) == flops_per_byte(config, 65536)
    assert MIXERS[letter].state_bytes(config, 1) == MIXERS[letter].state_bytes(config, 10**6)


def test_roles():
    found = roles(ByteLM(CONFIGS["hybrid"]))
    of = {letter: {name.removeprefix(f"layers.{i}.mixer."): role for name, role in found.items()
                   if name.startswith(f"layers.{i}.mixer.")} for i, letter in enumerate("SDKR")}
    assert of["S"] == {
        "dt_bias": "free", "A_log": "free", "D": "free", "in_proj.weight": "muon",
        "conv1d.weight": "decay", "conv1d.bias": "free", "norm.weight": "free",
        "out_proj.weight": "muon"}
    # Biases of B and C are no maps, and what starts at 1 is not pulled to 0.
    assert of["R"] == {
        "dt_bias": "free", "B_bias": "free", "C_bias": "free", "D": "free",
        "in_proj.weight": "muon", "B_norm.weight": "free", "C_norm.weight": "free",
        "out_proj.weight": "muon"}
    # What makes a gate is for AdamW: a row moves the gate of a head, or spreads over all channels.
    assert {n for n, role in of["D"].items() if role == "decay"} == {
        "q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight", "a_proj.weight", "b_proj.weight"}
    assert {n for n, role in of["K"].items() if role == "decay"} == {
        "q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight", "f_proj.1.weight",
        "b_proj.weight"}
    for letter in "DK":
        assert {of[letter][n] for n in ("A_log", "dt_bias", "o_norm.weight")} == {"free"}
        assert {of[letter][f"{n}_proj.weight"] for n in "qkvo"} == {"muon"}


@by_config
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_learns(config, optimizer):
    model = ByteLM(config)
    adam = make_optimizer(model, TrainConfig(optimizer=optimizer, lr=1e-2))
    tokens = (torch.arange(40) % 5).repeat(2, 1)
    losses = []
    for _ in range(12):
        loss = model.loss(tokens)
        adam.zero_grad(set_to_none=True)
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any()
                   for p in model.parameters())
        adam.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("letter", "SRDK")
def test_exponent_and_definition(letter):
    config = replace(BASE, layer_pattern=letter)
    mixer = MIXERS[letter](config)
    x = torch.randn(2, 50, 32)
    if letter == "S":
        inputs = mixer.scan_inputs(x, None)[0]
        log_decay = inputs["A"] * F.softplus(inputs["dt"] + inputs["dt_bias"])
    elif letter == "R":
        inputs = mixer.scan_inputs(x)[0]
        rate = mixer.in_proj(x)[..., -10:-6]  # behind it a mix a head and two angles
        log_decay = -F.softplus(rate) * inputs["dt"]
    else:
        log_decay = mixer.log_decay(x)
    log_decay = log_decay.detach()
    wanted = max(float(-log_decay[:, a:b].sum(1).min()) for a, b in ((0, 20), (20, 40), (40, 50)))
    assert mixer.exponent(x, None, 20) == pytest.approx(wanted, rel=1e-6)
    for pairs in mixer.against_definition(x).values():
        assert pairs
        assert all(relative_rms(a, b) < 1e-5 for a, b in pairs)


@pytest.mark.parametrize(("change", "message"), [
    ({"layer_pattern": "S", "ssd_head_dim": 24}, "d_inner 64 does not split into heads"),
    ({"layer_pattern": "S", "ssd_head_dim": 24}, "give ssd_head_dim 16, for one"),
    ({"layer_pattern": "A", "n_head": 2, "n_kv_head": 6}, "give n_kv_head 2, for one"),
    ({"layer_pattern": "A", "n_head": 5}, "give n_head 4, for one"),
    ({"layer_pattern": "S", "ssd_groups": 3}, "4 heads of Mamba-2 do not split"),
    ({"layer_pattern": "R", "ssd_groups": 3}, "4 heads of Mamba-3 do not split"),
    ({"layer_pattern": "R", "ssd_d_state": 7}, "ssd_d_state 7 with ssd_rope_fraction 0.5 has 1"),
    ({"layer_pattern": "R", "ssd_d_state": 2}, "has 0 pairs"),
    ({"layer_pattern": "D", "delta_head_dim": 24}, "d_model 32 does not split"),
    ({"layer_pattern": "K", "delta_head_dim": 0}, "delta_head_dim is 0"),
])
def test_configurations_that_do_not_fit(change, message):
    with pytest.raises(UserError, match=message):
        replace(BASE, **change)
