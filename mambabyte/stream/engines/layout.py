"""What the C structs of ``ops/stream/model.c`` hold: numbers and parameters, in their order."""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from mambabyte.config import ModelConfig
from mambabyte.model import ByteLM
from mambabyte.model.block import MLP, Block, RMSNorm
from mambabyte.model.families.attention import AttentionMixer, AttentionState, LocalAttentionMixer
from mambabyte.model.families.delta import DeltaState, GatedDeltaNetMixer, HeadNorm, KimiDeltaMixer
from mambabyte.model.families.mamba import MambaMixer, MambaState
from mambabyte.model.families.mamba2 import GatedRMSNorm, Mamba2Mixer, Mamba2State
from mambabyte.model.families.mamba3 import Mamba3Mixer
from mambabyte.model.mixer import Linear, Mixer, mixers
from mambabyte.ops import Mamba3State

_ACTIVATIONS = {"relu2": 0, "gelu": 1, "silu": 2}
# Parameters in the order of the C structs: of the model, of a block, and of each kind of mixer.
MODEL = ("embedding.weight", "head.weight", "norm_f.weight", "norm_f.bias", "head.bias",
          "norm_embedding.weight", "guided.prior.weight", "guided.best.weight",
          "guided.kind.weight", "guided.gate.weight", "guided.gate.bias")  # fmt: skip
BLOCK = ("norm.weight", "norm.bias", "skip_gain", "stream_gain", "embedded_gain", "mixer_gain",
          "mlp_gain", "mlp_norm.weight", "mlp_norm.bias", "mlp.up_proj.weight", "mlp.up_proj.bias",
          "mlp.out_proj.weight", "mlp.out_proj.bias")  # fmt: skip
_MAMBA = ("in_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight",
          "dt_proj.bias", "A_log", "D", "out_proj.weight", "in_proj.bias", "out_proj.bias",
          )  # fmt: skip
_ATTENTION = (*(f"{name}_proj.{what}" for what in ("weight", "bias")
                for name in ("q", "k", "v", "out")), "q_gain")  # fmt: skip
_MAMBA2 = ("in_proj.weight", "conv1d.weight", "conv1d.bias", "dt_bias", "A_log", "D",
           "norm.weight", "out_proj.weight", "in_proj.bias", "out_proj.bias")  # fmt: skip
_MAMBA3 = ("in_proj.weight", "dt_bias", "B_bias", "C_bias", "B_norm.weight", "C_norm.weight", "D",
           "out_proj.weight")  # fmt: skip
_DELTA = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "q_conv1d.weight", "k_conv1d.weight",
          "v_conv1d.weight", "b_proj.weight", "A_log", "dt_bias", "o_norm.weight", "o_proj.weight",
          )  # fmt: skip
_DELTA_GATES = (*_DELTA, "a_proj.weight", "", "g_proj.weight")
_KIMI_GATES = (*_DELTA, "f_proj.0.weight", "f_proj.1.weight", "g_proj.0.weight", "g_proj.1.weight",
               "g_proj.1.bias")  # fmt: skip
OWN = 16  # pointers that a mixer may have
pack_model = struct.Struct("24q5d11q").pack
pack_layer = struct.Struct(f"4q{len(BLOCK) + OWN}q").pack


class Kind(NamedTuple):
    """What the C code has for one kind of mixer."""

    tag: int  # in the C struct ``layer``
    state: type  # of its states
    names: tuple[str, ...]  # its parameters, where that struct has pointers


KINDS: dict[type[Mixer], Kind] = {
    MambaMixer: Kind(0, MambaState, _MAMBA),
    AttentionMixer: Kind(1, AttentionState, _ATTENTION),
    LocalAttentionMixer: Kind(1, AttentionState, _ATTENTION),
    Mamba2Mixer: Kind(2, Mamba2State, _MAMBA2),
    GatedDeltaNetMixer: Kind(3, DeltaState, _DELTA_GATES),
    KimiDeltaMixer: Kind(3, DeltaState, _KIMI_GATES),
    Mamba3Mixer: Kind(4, Mamba3State, _MAMBA3),
}


# What a model may be made of: the engines compute what these do.
_PARTS = {ByteLM, Block, MLP, nn.ModuleList, nn.Sequential, nn.Embedding, nn.Linear, Linear,
          nn.Conv1d, nn.LayerNorm, RMSNorm, GatedRMSNorm, HeadNorm, *KINDS}  # fmt: skip


@functools.cache
def _built(config: ModelConfig) -> dict[str, type]:
    """The class of every part of a model of ``config``."""
    with torch.device("meta"):
        return {name: type(part) for name, part in ByteLM(config).named_modules()}


def is_known(model: ByteLM) -> bool:
    """Whether the engines know all parts of a model: those that its configuration makes, as they
    were made, of registered mixers and without hooks."""
    parts = dict(model.named_modules())
    classes = {name: type(part) for name, part in parts.items()}
    return (_PARTS.issuperset(classes.values()) and classes == _built(model.config)
            and not any(p._forward_hooks or p._forward_pre_hooks for p in parts.values())
            and all(mixer.as_configured(model.config) for mixer in mixers(model, Mixer)))


def parameter_names(config: ModelConfig, kinds: Sequence[Kind]) -> list[str]:
    """Where the C structs ``model`` and ``layer`` have pointers; "" where a layer has nothing."""
    tied = {"head.weight": "embedding.weight", "head.bias": ""} if config.tied_head else {}
    names = [tied.get(name, name) for name in MODEL]
    for i, kind in enumerate(kinds):
        mixer = [name and f"mixer.{name}" for name in kind.names]
        each = [*BLOCK, *mixer, *[""] * (OWN - len(mixer))]
        names += [name and f"layers.{i}.{name}" for name in each]
    return names


def model_numbers(model: ByteLM) -> tuple[float, ...]:
    """The numbers of the C struct ``model``."""
    c = model.config
    tiny = torch.finfo(torch.float32).eps
    eps = model.norm_f.eps if isinstance(model.norm_f.eps, float) else tiny
    delta_heads = c.d_model // c.delta_head_dim
    return (
        c.n_layer, c.d_model, c.vocab_size, c.norm != "layer", c.embed_norm, c.mlp_hidden,
        _ACTIVATIONS[c.mlp_activation], sum(s is not None for s in c.skips), c.residual_mix,
        c.d_inner, c.d_state, c.d_conv, 0 if c.dt_rank == "full" else c.dt_rank_value,
        c.n_head if any(issubclass(kind, AttentionMixer) for kind in model.kinds.values()) else 0,
        c.n_kv_head, c.head_dim, c.qk_norm, max(1, round(c.head_dim // 2 * c.rope_fraction)),
        c.d_inner // c.ssd_head_dim, c.ssd_groups, c.ssd_d_state,
        Mamba3Mixer.pairs(c), delta_heads, c.delta_head_dim * c.delta_expand_v,
        eps, tiny, c.ssd_norm_eps, c.logit_softcap, c.rope_base,
    )  # fmt: skip
