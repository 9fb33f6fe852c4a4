"""The public configurations of Mamba and Mamba-2, of mamba_ssm and of transformers, as ours.

Every entry is one of four: a field of ours; what is so here in any case, and refused otherwise;
a number that follows from others, and is checked; or nothing that the model computes. An entry
that is none of these is refused by its name, so that no checkpoint loads into another model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mambabyte.config.checks import shown
from mambabyte.config.model import ModelConfig
from mambabyte.errors import UserError, nearest

_SHARED = {
    "hidden_size": "d_model", "d_model": "d_model", "num_hidden_layers": "n_layer",
    "n_layer": "n_layer", "conv_kernel": "d_conv", "d_conv": "d_conv", "expand": "expand",
    "layer_norm_epsilon": "norm_eps", "norm_epsilon": "norm_eps", "time_step_rank": "dt_rank",
    "dt_rank": "dt_rank", "time_step_min": "dt_min", "dt_min": "dt_min", "time_step_max": "dt_max",
    "dt_max": "dt_max", "initializer_range": "embed_std", "tie_word_embeddings": "tied_head",
    "tie_embeddings": "tied_head", "vocab_size": "vocab_size",
}
_FIELDS = {
    "mamba": {**_SHARED, "state_size": "d_state", "d_state": "d_state"},
    "mamba2": {**_SHARED, "state_size": "ssd_d_state", "d_state": "ssd_d_state",
               "head_dim": "ssd_head_dim", "headdim": "ssd_head_dim", "n_groups": "ssd_groups",
               "ngroups": "ssd_groups"},
}
# What is left out has the value that it has there, which is not ours.
_DEFAULTS = {"norm": "rms", "norm_eps": 1e-5, "ssd_d_state": 128}
_DEFAULTS_OF_TRANSFORMERS = {**_DEFAULTS, "embed_std": 0.1, "ssd_groups": 8}
_AS_HERE: dict[str, tuple[Any, ...]] = {
    "use_bias": (False,), "bias": (False,), "use_conv_bias": (True,), "conv_bias": (True,),
    "hidden_act": ("silu", "swish"), "activation": ("silu", "swish"), "residual_in_fp32": (True,),
    "time_step_scale": (1.0,), "dt_scale": (1.0,), "time_step_init_scheme": ("random",),
    "dt_init": ("random",), "rescale_prenorm_residual": (False,), "d_intermediate": (0, None),
    "attn_layer_idx": ([], None), "attn_cfg": ({}, None), "D_has_hdim": (False,),
    "rmsnorm": (True,), "norm_before_gate": (False,), "d_ssm": (None,), "conv_init": (None,),
    "time_step_limit": ([0.0, math.inf], [0.0, "Infinity"], [0.0, "inf"], None),
    "dt_limit": ([0.0, math.inf], [0.0, "Infinity"], [0.0, "inf"], None),
    "A_init_range": ([1, 16],), "layer": (None, "Mamba1", "Mamba2"),
    "model_type": (None, "mamba", "mamba2"),
}
_OF_NO_NUMBER = {
    "architectures", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "torch_dtype",
    "dtype", "transformers_version", "fused_add_norm", "chunk_size", "use_mem_eff_path",
    "use_fast_path", "use_mambapy", "use_associative_scan", "_name_or_path",
}


def is_public(values: Mapping[str, Any]) -> bool:
    """Whether ``values`` is such a configuration, and no recipe of ours."""
    return bool({"model_type", "hidden_size", "d_model"} & values.keys())


def from_public(values: Mapping[str, Any]) -> ModelConfig:
    """The model that a config.json of mamba_ssm or transformers describes.

    ``values`` has its entries. Raises UserError, by the entry's name, for what this package does
    not have: biases, other activations, attention among the layers, limits of the step size.
    """
    inner = values.get("ssm_cfg") or {}
    if not isinstance(inner, Mapping):
        raise UserError(f"ssm_cfg is {shown(inner)}: expected named values")
    given: dict[str, Any] = {name: list(value) if isinstance(value, tuple) else value
             for name, value in {**values, **inner}.items() if name != "ssm_cfg"}
    second = "mamba2" in (given.get("model_type"), str(given.get("layer")).lower())
    kind = "mamba2" if second else "mamba"
    fields = _FIELDS[kind]
    defaults = _DEFAULTS_OF_TRANSFORMERS if "model_type" in given else _DEFAULTS
    ours: dict[str, Any] = {**defaults, "layer_pattern": "S" if second else "M", **{
        fields[name]: value for name, value in given.items() if name in fields}}
    derived = {"rms_norm", "pad_vocab_size_multiple", "intermediate_size", "d_inner", "num_heads",
               "time_step_floor", "dt_init_floor"}
    known = {*fields, *_AS_HERE, *_OF_NO_NUMBER, *derived}
    for name, value in given.items():
        if name not in known:
            raise UserError(f"the public configuration says {name}{nearest(name, known)}, which "
                            "this package does not have")
        if name in _AS_HERE and value not in _AS_HERE[name]:
            raise UserError(f"the public configuration has {name} {shown(value)}: this package "
                            f"has {shown(_AS_HERE[name][0])} alone")
    for name in ("d_model", "n_layer", "vocab_size"):
        if name not in ours:
            raise UserError(f"the public configuration does not say {name}: expected it")
    if given.get("rms_norm", True) is not True:
        if second and "model_type" in given:
            raise UserError("the public configuration has rms_norm False: Mamba-2's gated norm is "
                            "always there in this package")
        ours["norm"] = "layer"
    if second and "layer_norm_epsilon" in given and given["layer_norm_epsilon"] != 1e-5:
        raise UserError(f"the public configuration has layer_norm_epsilon "
                        f"{shown(given['layer_norm_epsilon'])}: Mamba-2's gated norm has 1e-05 "
                        "alone in this package")
    multiple = given.get("pad_vocab_size_multiple", 8 if "ssm_cfg" in values else 1)
    if isinstance(multiple, int) and isinstance(ours.get("vocab_size"), int) and multiple > 0:
        ours["vocab_size"] = -(-ours["vocab_size"] // multiple) * multiple
    config = ModelConfig(**ours)
    follows = {"intermediate_size": config.d_inner, "d_inner": config.d_inner,
               "num_heads": config.d_inner // config.ssd_head_dim}
    for name, value in follows.items():
        if given.get(name, value) != value:
            raise UserError(f"the public configuration has {name} {shown(given[name])}: expected "
                            f"{value}, which follows from the others")
    for name in ("time_step_floor", "dt_init_floor"):
        if not given.get(name, 0) <= config.dt_min:
            raise UserError(f"the public configuration has {name} {shown(given[name])}, above the "
                            f"smallest step size, {config.dt_min}: this package has no floor")
    return config
