"""Public configurations of Mamba: expressed exactly, or refused by the entry's name."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.cli import main
from mambabyte.config.public import from_public, to_public
from mambabyte.errors import UserError
from mambabyte.model import ByteLM

TRANSFORMERS = {
    "architectures": ["MambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4, "d_inner": 48,
    "d_model": 24, "eos_token_id": 0, "expand": 2, "fused_add_norm": True, "hidden_act": "silu",
    "hidden_size": 24, "initializer_range": 0.1, "intermediate_size": 48,
    "layer_norm_epsilon": 1e-5, "model_type": "mamba", "n_layer": 2, "num_hidden_layers": 2,
    "pad_token_id": 0, "pad_vocab_size_multiple": 8, "rescale_prenorm_residual": False,
    "residual_in_fp32": True, "rms_norm": True, "ssm_cfg": {}, "state_size": 6,
    "time_step_floor": 1e-4, "time_step_init_scheme": "random", "time_step_max": 0.1,
    "time_step_min": 0.001, "time_step_rank": 3, "time_step_scale": 1.0, "torch_dtype": "float32",
    "transformers_version": "4.39.0.dev0", "use_bias": False, "use_cache": True,
    "use_conv_bias": True, "vocab_size": 280,
}
MAMBA_SSM = {"d_model": 24, "n_layer": 2, "vocab_size": 277, "ssm_cfg": {"d_state": 6},
             "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True,
             "pad_vocab_size_multiple": 8}
SECOND = {"model_type": "mamba2", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 264,
          "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 2, "expand": 2,
          "layer_norm_epsilon": 1e-5, "rms_norm": True, "time_step_limit": [0.0, float("inf")],
          "chunk_size": 256, "tie_word_embeddings": False}


def by_the_book(weights: dict[str, Tensor], tokens: Tensor, eps: float) -> Tensor:
    """Logits of the public Mamba in float64, written from its paper: no code of ours in it."""
    w = {name: value.double() for name, value in weights.items()}

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight

    x = w["embedding.weight"][tokens]
    for i in range(2):
        p = {n.removeprefix(f"layers.{i}."): v for n, v in w.items()}
        u, z = (norm(x, p["norm.weight"]) @ p["mixer.in_proj.weight"].T).chunk(2, -1)
        taps = p["mixer.conv1d.weight"]
        u = F.silu(F.conv1d(F.pad(u.mT, (taps.shape[-1] - 1, 0)), taps, p["mixer.conv1d.bias"],
                            groups=len(taps)).mT)
        A = -p["mixer.A_log"].exp()
        rank, states = p["mixer.dt_proj.weight"].shape[1], A.shape[1]
        dt, B, C = (u @ p["mixer.x_proj.weight"].T).split([rank, states, states], -1)
        dt = F.softplus(dt @ p["mixer.dt_proj.weight"].T + p["mixer.dt_proj.bias"])
        h, ys = torch.zeros(len(x), *A.shape, dtype=torch.float64), []
        for t in range(x.shape[1]):
            h = (dt[:, t, :, None] * A).exp() * h + (dt * u)[:, t, :, None] * B[:, t, None]
            ys.append((h * C[:, t, None]).sum(-1) + p["mixer.D"] * u[:, t])
        x = x + (torch.stack(ys, 1) * F.silu(z)) @ p["mixer.out_proj.weight"].T
    return norm(x, w["norm_f.weight"]) @ w["embedding.weight"].T


@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_the_same_weights_give_the_same_logits(eps: float) -> None:
    config = from_public({**TRANSFORMERS, "layer_norm_epsilon": eps})
    model = ByteLM(config)
    with torch.no_grad():  # small numbers, where the norm's epsilon counts most
        model.embedding.weight.mul_(0.03)
        model.norm_f.weight.uniform_(0.5, 1.5)
    tokens = torch.randint(0, 280, (2, 11))
    expected = by_the_book(model.state_dict(), tokens, eps)
    found = model(tokens)[0].double()
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    other = by_the_book(model.state_dict(), tokens, 1.2e-7)
    assert (other - expected).abs().max() > 0.01 * expected.abs().max()  # what it was before


def test_both_libraries_say_one_model() -> None:
    one, other = from_public({**TRANSFORMERS, "time_step_rank": "auto"}), from_public(MAMBA_SSM)
    assert one.vocab_size == other.vocab_size == 280  # 277 and padding
    assert one.parameter_groups() == other.parameter_groups()
    assert (other.norm, other.norm_eps, other.d_state, other.tied_head) == ("rms", 1e-5, 6, True)
    assert from_public({**MAMBA_SSM, "rms_norm": False}).norm == "layer"


def test_mamba2() -> None:
    config = from_public(SECOND)
    assert (config.layers, config.ssd_head_dim, config.ssd_d_state, config.ssd_groups) == (
        "SS", 16, 8, 2)
    assert not config.tied_head
    inner = {"layer": "Mamba2", "headdim": 16, "d_state": 8, "ngroups": 2}
    same = from_public({"d_model": 32, "n_layer": 2, "vocab_size": 264, "ssm_cfg": inner,
                        "tie_embeddings": False})
    assert same.parameter_groups() == config.parameter_groups()
    assert ByteLM(config)(torch.zeros(1, 3).long())[0].shape == (1, 3, 264)


def test_mamba3() -> None:
    inner = {"layer": "Mamba3", "headdim": 16, "d_state": 8, "ngroups": 3, "rope_fraction": 1.0,
             "is_mimo": False, "mimo_rank": 4, "chunk_size": 64}
    config = from_public({**MAMBA_SSM, "ssm_cfg": inner})
    assert (config.layers, config.ssd_d_state, config.ssd_groups, config.ssd_rope_fraction) == (
        "RR", 8, 3, 1.0)
    assert from_public(to_public(config, "mamba_ssm")) == config
    plain = from_public({**MAMBA_SSM, "ssm_cfg": {"layer": "Mamba3", "headdim": 16}})
    assert (plain.ssd_d_state, plain.ssd_groups, plain.ssd_rope_fraction) == (128, 1, 0.5)
    with pytest.raises(UserError, match="transformers has models all of Mamba"):
        to_public(config, "transformers")


@pytest.mark.parametrize(("base", "change", "message"), [
    (TRANSFORMERS, {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    (TRANSFORMERS, {"time_step_scale": 2.0}, "time_step_scale 2.0"),
    (TRANSFORMERS, {"time_step_floor": 0.01}, "time_step_floor 0.01"),
    (TRANSFORMERS, {"intermediate_size": 50}, "intermediate_size 50"),
    (TRANSFORMERS, {"hidden_sise": 50}, "hidden_sise .did you mean hidden_size"),
    (MAMBA_SSM, {"attn_layer_idx": [1]}, r"attn_layer_idx \[1\]"),
    (MAMBA_SSM, {"d_intermediate": 64}, "d_intermediate 64"),
    (MAMBA_SSM, {"ssm_cfg": {"layer": "Mamba4"}}, "layer 'Mamba4'"),
    (MAMBA_SSM, {"ssm_cfg": {"layer": "Mamba3", "is_mimo": True}}, "is_mimo True"),
    (MAMBA_SSM, {"ssm_cfg": {"layer": "Mamba3", "is_outproj_norm": True}}, "is_outproj_norm True"),
    (MAMBA_SSM, {"ssm_cfg": {"layer": "Mamba3", "d_conv": 4}}, "says d_conv"),
    (MAMBA_SSM, {"ssm_cfg": {"layer": "Mamba2", "rope_fraction": 0.5}}, "says rope_fraction"),
    (MAMBA_SSM, {"ssm_cfg": 3}, "ssm_cfg is 3"), (MAMBA_SSM, {"d_model": "wide"}, "d_model is"),
    (SECOND, {"time_step_limit": [0.0, 0.1]}, "time_step_limit"),
    (SECOND, {"rms_norm": False}, "rms_norm False"), (SECOND, {"num_heads": 5}, "num_heads 5"),
    (MAMBA_SSM, {"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}}, "norm_before_gate"),
])
def test_what_is_not_here_is_refused_by_its_name(
    base: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        from_public({**base, **change})


def test_what_only_starts_weights_is_asked_of_those_that_start() -> None:
    late = {**TRANSFORMERS, "time_step_scale": 2.0, "time_step_floor": 0.01}
    with pytest.raises(UserError, match="time_step_scale"):
        from_public(late)
    assert from_public(late, trained=True) == from_public(TRANSFORMERS)


def test_epsilons_biases_and_heads_are_those_of_the_library() -> None:
    one = from_public({**SECOND, "layer_norm_epsilon": 1e-3, "use_bias": True})
    assert (one.norm_eps, one.ssd_norm_eps, one.ssm_bias) == (1e-3, 1e-3, True)
    del (other := dict(SECOND))["tie_word_embeddings"]
    assert not from_public(other).tied_head  # in transformers; mamba_ssm ties
    assert from_public({"d_model": 32, "n_layer": 2, "vocab_size": 264,
                        "ssm_cfg": {"layer": "Mamba2", "headdim": 16}}).tied_head


def test_the_configurations_of_published_models() -> None:
    """Of 130 million parameters from mamba_ssm, and of 7 billion from transformers."""
    small = {"d_model": 768, "n_layer": 24, "vocab_size": 50277, "rms_norm": True,
             "residual_in_fp32": True, "fused_add_norm": True}
    first = from_public({**small, "ssm_cfg": {}, "pad_vocab_size_multiple": 8}, trained=True)
    assert first.n_parameters == 129_135_360
    second = from_public({
        **small, "ssm_cfg": {"layer": "Mamba2"}, "pad_vocab_size_multiple": 16,
        "d_intermediate": 0, "attn_layer_idx": [], "attn_cfg": {}, "tie_embeddings": True},
        trained=True)
    assert (second.vocab_size, second.n_parameters) == (50288, 128_989_632)
    large = from_public({
        "architectures": ["Mamba2ForCausalLM"], "chunk_size": 256, "conv_kernel": 4, "expand": 2,
        "head_dim": 64, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 8192,
        "layer_norm_epsilon": 1e-5, "model_type": "mamba2", "n_groups": 8, "num_heads": 128,
        "norm_before_gate": True, "num_hidden_layers": 64, "rms_norm": True, "state_size": 128,
        "tie_word_embeddings": False, "time_step_limit": [0.0, float("inf")],
        "time_step_rank": 256, "vocab_size": 32768}, trained=True)
    assert 7.2e9 < large.n_parameters < 7.3e9


def test_a_missing_size_is_one_clear_line() -> None:
    for name in MAMBA_SSM.keys() & {"d_model", "n_layer", "vocab_size"}:
        with pytest.raises(UserError, match=f"does not say {name}"):
            from_public({k: v for k, v in MAMBA_SSM.items() if k != name})


def test_memory_answers_for_a_public_model(tmp_path, capsys) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TRANSFORMERS))
    assert main(["memory", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["d_state"] == 6
    path.write_text(json.dumps({**TRANSFORMERS, "hidden_act": "gelu"}))
    assert main(["memory", str(path)]) == 2
    assert "hidden_act 'gelu'" in capsys.readouterr().err
