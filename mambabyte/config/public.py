"""The public configurations of Mamba, Mamba-2 and Mamba-3, of mamba_ssm and of transformers, and
ours.

Every entry is one of five: a field of ours; what is so here in any case, and refused otherwise; how
weights start, which is refused where it is not ours and weights are yet to be drawn; a number that
follows from others, and is checked; or nothing that the model computes. An entry that is none of
these is refused by its name, so that no checkpoint loads into another model.

Configurations of three kinds are told by what only they have: ``model_type`` (transformers),
``num_layers`` (the byte-level MambaByte of github.com/jxiw/MambaByte), and else mamba_ssm's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, Literal

from mambabyte.config.checks import shown
from mambabyte.config.model import ModelConfig
from mambabyte.errors import UserError, nearest

Layout = Literal["transformers", "mamba_ssm", "mambabyte"]

_SHARED = {
    "hidden_size": "d_model", "d_model": "d_model", "num_hidden_layers": "n_layer",
    "n_layer": "n_layer", "num_layers": "n_layer", "conv_kernel": "d_conv", "d_conv": "d_conv",
    "expand": "expand", "layer_norm_epsilon": "norm_eps", "norm_epsilon": "norm_eps",
    "norm_eps": "norm_eps", "time_step_rank": "dt_rank", "dt_rank": "dt_rank",
    "time_step_min": "dt_min", "dt_min": "dt_min", "time_step_max": "dt_max", "dt_max": "dt_max",
    "initializer_range": "embed_std", "tie_word_embeddings": "tied_head",
    "tie_embeddings": "tied_head", "vocab_size": "vocab_size", "use_bias": "ssm_bias",
    "bias": "ssm_bias",
}
_FIELDS = {
    "mamba": {**_SHARED, "state_size": "d_state", "d_state": "d_state"},
    "mamba2": {**_SHARED, "state_size": "ssd_d_state", "d_state": "ssd_d_state",
               "head_dim": "ssd_head_dim", "headdim": "ssd_head_dim", "n_groups": "ssd_groups",
               "ngroups": "ssd_groups"},
    # Without a convolution and without biases.
    "mamba3": {**{name: ours for name, ours in _SHARED.items()
                  if ours not in ("d_conv", "ssm_bias", "dt_rank")},
               "d_state": "ssd_d_state", "headdim": "ssd_head_dim", "ngroups": "ssd_groups",
               "rope_fraction": "ssd_rope_fraction"},
}
# What is left out has the value that it has there, which is not ours.
_DEFAULTS = {"norm": "rms", "norm_eps": 1e-5, "ssd_d_state": 128}
_DEFAULTS_OF_TRANSFORMERS = {
    "mamba": {**_DEFAULTS, "embed_std": 0.1},
    "mamba2": {**_DEFAULTS, "embed_std": 0.1, "ssd_groups": 8, "tied_head": False}}
_DEFAULTS_OF_MAMBABYTE = {**_DEFAULTS, "norm": "layer", "tied_head": False}
_NO_LIMIT: tuple[Any, ...] = ([0.0, math.inf], [0.0, "Infinity"], [0.0, "inf"],
                              [0.0, {"__float__": "Infinity"}], None)
_AS_HERE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"), "activation": ("silu", "swish"), "d_intermediate": (0, None),
    "attn_layer_idx": ([], None), "attn_cfg": ({}, None), "D_has_hdim": (False,),
    "rmsnorm": (True,), "norm_before_gate": (False,), "d_ssm": (None,),
    "time_step_limit": _NO_LIMIT, "dt_limit": _NO_LIMIT,
    "layer": (None, "Mamba1", "Mamba2", "Mamba3"), "model_type": (None, "mamba", "mamba2"),
}
# Of Mamba-3 one input and one output a head, and no norm before the output's projection.
_MAMBA3 = {"is_mimo": (False,), "is_outproj_norm": (False,), "A_floor": (1e-4,),
           "dropout": (0, None)}
_LETTERS = {"mamba": "M", "mamba2": "S", "mamba3": "R"}
# How weights start: of no number once they are there.
_START: dict[str, tuple[Any, ...]] = {
    "time_step_scale": (1.0,), "dt_scale": (1.0,), "time_step_init_scheme": ("random",),
    "dt_init": ("random",), "rescale_prenorm_residual": (False,), "conv_init": (None,),
    "A_init_range": ([1, 16],),
}
# A convolution without biases is one whose biases are 0, and the residual stream is float32 here.
_OF_NO_NUMBER = {
    "architectures", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "torch_dtype",
    "dtype", "transformers_version", "fused_add_norm", "chunk_size", "use_mem_eff_path",
    "use_fast_path", "use_mambapy", "use_associative_scan", "_name_or_path", "use_conv_bias",
    "conv_bias", "residual_in_fp32", "disable_optimizations", "is_generating", "device",
    "layer_types", "_attn_implementation_autoset", "return_dict", "tokenizer_class",
}
_DERIVED = {"rms_norm", "pad_vocab_size_multiple", "intermediate_size", "d_inner", "num_heads",
            "time_step_floor", "dt_init_floor"}


def is_public(values: Mapping[str, Any]) -> bool:
    """Whether ``values`` is such a configuration, and no recipe or checkpoint of ours."""
    return "layer_pattern" not in values and bool(
        {"model_type", "hidden_size", "d_model"} & values.keys())


def from_public(values: Mapping[str, Any], trained: bool = False) -> ModelConfig:
    """The model that a config.json of mamba_ssm, transformers or MambaByte describes.

    ``values`` has its entries; ``trained`` is whether its weights are there, so that how they
    would start does not matter. Raises UserError, by the entry's name, for what this package does
    not have: other activations, attention among the layers, limits of the step size.
    """
    inner = values.get("ssm_cfg") or {}
    if not isinstance(inner, Mapping):
        raise UserError(f"ssm_cfg is {shown(inner)}: expected named values")
    given: dict[str, Any] = {name: list(value) if isinstance(value, tuple) else value
             for name, value in {**values, **inner}.items() if name != "ssm_cfg"}
    kind = _kind(given)
    named = _FIELDS[kind]
    defaults = _defaults(given, kind)
    ours: dict[str, Any] = {
        **defaults, "layer_pattern": _LETTERS[kind], **{
            named[name]: value for name, value in given.items() if name in named}}
    fixed = _AS_HERE if trained else {**_AS_HERE, **_START}
    known = {*named, *_AS_HERE, *_START, *_OF_NO_NUMBER, *_DERIVED}
    if kind == "mamba3":
        fixed, known = {**fixed, **_MAMBA3}, {*known, *_MAMBA3, "mimo_rank"}
    if "model_type" in given:  # transformers gates before the norm whatever this entry says
        fixed = {name: values for name, values in fixed.items() if name != "norm_before_gate"}
    for name, value in given.items():
        if name not in known:
            raise UserError(f"the public configuration says {name}{nearest(name, known)}, which "
                            "this package does not have")
        if name in fixed and value not in fixed[name]:
            raise UserError(f"the public configuration has {name} {shown(value)}: this package "
                            f"has {shown(fixed[name][0])} alone")
    for name in ("d_model", "n_layer", "vocab_size"):
        if name not in ours:
            raise UserError(f"the public configuration does not say {name}: expected it")
    if "model_type" in given:
        # There the epsilon is that of both norms; mamba_ssm's gated norm always has 1e-5.
        ours["ssd_norm_eps"] = ours["norm_eps"] if kind == "mamba2" else 1e-5
        if kind == "mamba2" and given.get("rms_norm", True) is not True:
            raise UserError("the public configuration has rms_norm False: Mamba-2's gated norm is "
                            "always there in this package")
    elif given.get("rms_norm", True) is not True:
        ours["norm"] = "layer"
    ours["vocab_size"] = padded_vocabulary(values)
    config = ModelConfig(**ours)
    _check_derived(given, config, trained)
    return config


def _kind(given: Mapping[str, Any]) -> str:
    said = (given.get("model_type"), str(given.get("layer")).lower())
    return next((kind for kind in ("mamba2", "mamba3") if kind in said), "mamba")


def _defaults(given: Mapping[str, Any], kind: str) -> dict[str, Any]:
    if "model_type" in given:
        return _DEFAULTS_OF_TRANSFORMERS[kind]
    return _DEFAULTS_OF_MAMBABYTE if "num_layers" in given else _DEFAULTS


def padded_vocabulary(values: Mapping[str, Any]) -> Any:
    """The rows of the embedding that a public configuration says: mamba_ssm pads them, to a
    multiple of 8 where nothing is said; in transformers they are ``vocab_size``."""
    said = values.get("vocab_size")
    unpadded = "model_type" in values or "num_layers" in values
    multiple = values.get("pad_vocab_size_multiple", 8)
    if unpadded or type(said) is not int or type(multiple) is not int or multiple < 1:
        return said
    return -(-said // multiple) * multiple


def _check_derived(given: Mapping[str, Any], config: ModelConfig, trained: bool) -> None:
    """UserError where a number is not what follows from the others."""
    follows = {"intermediate_size": config.d_inner, "d_inner": config.d_inner,
               "num_heads": config.d_inner // config.ssd_head_dim}
    for name, value in follows.items():
        if given.get(name, value) != value:
            raise UserError(f"the public configuration has {name} {shown(given[name])}: expected "
                            f"{value}, which follows from the others")
    for name in ("time_step_floor", "dt_init_floor"):
        value = given.get(name, 0)
        if not trained and not (isinstance(value, (int, float)) and value <= config.dt_min):
            raise UserError(f"the public configuration has {name} {shown(value)}, above the "
                            f"smallest step size, {config.dt_min}: this package has no floor")


# Fields that a trained model of one mixer does not compute with: how weights start, what other
# mixers have, and how a scan is run.
_OF_OTHERS = {"dt_init", "dt_min", "dt_max", "embed_std", "zero_init_out", "scan_form",
              "scan_chunk", "n_head", "n_kv_head", "qk_norm", "qk_gain", "rope_base",
              "rope_fraction", "attention_window", "local_window", "delta_head_dim",
              "delta_expand_v", "mlp_activation"}
_OF_ONE = {"M": {"ssd_head_dim", "ssd_d_state", "ssd_groups", "ssd_norm_eps", "ssd_rope_fraction"},
           "S": {"d_state", "dt_rank", "ssd_rope_fraction"},
           "R": {"d_state", "dt_rank", "d_conv", "ssm_bias", "ssd_norm_eps"}}


def to_public(config: ModelConfig, layout: Layout) -> dict[str, Any]:
    """The entries of the config.json by which ``layout``'s library builds the model of ``config``;
    "mambabyte" is this one, which has every model.

    Raises UserError, by the field's name, where that library has no such model: patterns of
    several mixers, MLPs, another norm. What is written is read again and compared, so that no
    field is lost in silence.
    """
    if layout == "mambabyte":
        return asdict(config)
    letters = set(config.layers)
    if letters not in ({"M"}, {"S"}, {"R"}) or (letters == {"R"} and layout == "transformers"):
        also = "" if layout == "transformers" else ", or all of Mamba-3 (R)"
        raise UserError(f"layer_pattern is {shown(config.layer_pattern)}: {layout} has models all "
                        f"of Mamba (M) or all of Mamba-2 (S){also}")
    eps = _norm_eps(config)
    public = (_of_transformers if layout == "transformers" else _of_mamba_ssm)(config, eps)
    found, wanted = _computed(from_public(public, trained=True)), _computed(config)
    for name, value in wanted.items():
        if found[name] != value:
            raise UserError(f"{name} is {shown(value)}: {layout} has {shown(found[name])} alone in "
                            "such a model; it stays a checkpoint of this package")
    return public


def _norm_eps(config: ModelConfig) -> float:
    """The epsilon of the norms in float32, torch's own where the configuration says none."""
    if config.norm_eps is not None:
        return config.norm_eps
    return 1e-5 if config.norm == "layer" else 2.0**-23


def _computed(config: ModelConfig) -> dict[str, Any]:
    """What a trained model of one kind of mixer computes with, by field."""
    left_out = _OF_OTHERS | _OF_ONE[config.layers[0]]
    found = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in left_out}
    full = config.dt_rank == "full"
    return found | {"layer_pattern": config.layers, "norm_eps": _norm_eps(config)} | (
        {"dt_rank": "full" if full else config.dt_rank_value} if "dt_rank" in found else {})


def _of_transformers(config: ModelConfig, eps: float) -> dict[str, Any]:
    second = config.layers[0] == "S"
    kind = {
        "architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2",
        "state_size": config.ssd_d_state, "head_dim": config.ssd_head_dim,
        "num_heads": config.d_inner // config.ssd_head_dim, "n_groups": config.ssd_groups,
    } if second else {
        "architectures": ["MambaForCausalLM"], "model_type": "mamba",
        "state_size": config.d_state, "intermediate_size": config.d_inner,
        "time_step_rank": config.dt_rank_value,
    }
    return {
        **kind, "hidden_size": config.d_model, "num_hidden_layers": config.n_layer,
        "vocab_size": config.vocab_size, "conv_kernel": config.d_conv, "expand": config.expand,
        "use_bias": config.ssm_bias, "use_conv_bias": True, "hidden_act": "silu",
        "layer_norm_epsilon": eps, "residual_in_fp32": True,
        "initializer_range": config.embed_std, "time_step_min": config.dt_min,
        "time_step_max": config.dt_max, "tie_word_embeddings": config.tied_head,
        # Bytes have no symbols of a tokenizer: 0 would end a text at a zero byte.
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }


def _of_mamba_ssm(config: ModelConfig, eps: float) -> dict[str, Any]:
    inner: dict[str, Any] = {"d_state": config.ssd_d_state, "headdim": config.ssd_head_dim,
                             "ngroups": config.ssd_groups, "expand": config.expand}
    taps = {"d_conv": config.d_conv, "bias": config.ssm_bias}
    if config.layers[0] == "R":
        inner |= {"layer": "Mamba3", "rope_fraction": config.ssd_rope_fraction}
    elif config.layers[0] == "S":
        inner |= {"layer": "Mamba2", **taps}
    else:
        inner = {"layer": "Mamba1", "d_state": config.d_state, "dt_rank": config.dt_rank_value,
                 "expand": config.expand, **taps}
    return {
        "d_model": config.d_model, "n_layer": config.n_layer, "d_intermediate": 0,
        "vocab_size": config.vocab_size, "pad_vocab_size_multiple": 1,
        "ssm_cfg": inner,
        "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": config.norm == "rms",
        "residual_in_fp32": True, "fused_add_norm": True, "tie_embeddings": config.tied_head,
    }
