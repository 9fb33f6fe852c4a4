"""Every tensor that autograd keeps of a training step, in closed form.

Symbols: B batch, L context, d = d_model, D = d_inner, N = d_state, R = dt_rank, K = d_conv,
V = vocab_size, H heads. analysis.measure.allocations counts what is written down here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from analysis.theory.scan_memory import FLOAT32, PER_CHANNEL, scan_terms
from mambabyte.config import ModelConfig
from mambabyte.ops import FORMS, default_form
from mambabyte.ops.causal_conv import FUSED_TAPS
from mambabyte.ops.conv import cpu as native_conv

Autocast = Literal["fp32", "bf16", "fp16"]
# What the streams of a layer are under each state; "fp32" is no autocast.
STREAM_DTYPE: dict[Autocast, torch.dtype] = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
AUTOCASTS: tuple[Autocast, ...] = tuple(STREAM_DTYPE)
INT64 = 8  # bytes


@dataclass(frozen=True)
class Term:
    """One tensor that autograd keeps: where it is, what it is, how large."""

    layer: int  # -1: embedding, final norm, head and loss
    part: str
    tensor: str
    elements: int
    itemsize: int

    @property
    def bytes(self) -> int:
        return self.elements * self.itemsize


def saved_terms(
    config: ModelConfig, batch: int, length: int, autocast: Autocast = "fp32",
    device: str = "cpu", checkpointing: bool = False,
) -> list[Term]:
    """Every tensor that autograd keeps between forward and backward of ``ByteLM.loss``.

    Parameters are not counted. ``checkpointing`` is torch.utils.checkpoint around every block:
    then a block keeps its input alone. Raises UserError for a form without a closed form.
    """
    form = resolve_form(config, device)
    dtype = STREAM_DTYPE[autocast]
    itemsize = dtype.itemsize
    tokens = batch * length
    d, V = config.d_model, config.vocab_size
    found: list[Term] = []
    for i, letter in enumerate(config.layers):
        if checkpointing:
            found.append(Term(i, "norm", "block input", tokens * d, FLOAT32))
            continue
        readers = 1 if letter == "M" else 3
        rows = [("norm", *t) for t in _norm_terms(config, tokens, device, itemsize, readers)]
        if letter == "M":
            rows += _mamba_terms(config, batch, length, dtype, form, device)
        else:
            rows += _attention_terms(config, batch, length, itemsize, device)
        if config.mlp_hidden:
            rows += [("mlp", *t) for t in _norm_terms(config, tokens, device, itemsize, 1)]
            rows += [("mlp", *t) for t in _mlp_terms(config, tokens, device, itemsize)]
            if itemsize != FLOAT32:
                rows.append(("casts", "weights, cast", 2 * d * config.mlp_hidden, itemsize))
        found += [Term(i, *row) for row in rows]
    head = [("head", *t) for t in _norm_terms(config, tokens, device, itemsize, 1)]
    if config.embed_norm:
        head += [("head", "embedding before its norm", tokens * d, FLOAT32),
                 ("head", "1/rms of the embedding", tokens, FLOAT32)]
    if config.logit_softcap:
        head.append(("head", "tanh of the logits", tokens * V, itemsize))
    if itemsize != FLOAT32:
        head.append(("casts", "weights, cast", V * d, itemsize))
    head += [
        ("head", "log-softmax", tokens * V, FLOAT32),
        # Flattened targets are a copy, but for a batch of one a view of the bytes.
        ("head", "bytes and targets", batch * (length + 1) + (tokens if batch > 1 else 0), INT64),
        ("head", "weight of the mean", 1, FLOAT32),
    ]
    return found + [Term(-1, *row) for row in head]


def resolve_form(config: ModelConfig, device: str) -> str:
    """The scan form that runs there; "auto" on CUDA means the fused kernels."""
    if config.scan_form != "auto":
        return config.scan_form
    return "fused" if device == "cuda" else default_form(device)


def _norm_terms(
    config: ModelConfig, tokens: int, device: str, itemsize: int, readers: int
) -> list[tuple[str, int, int]]:
    """A norm and its output; ``readers`` linear maps each keep a cast of it under autocast."""
    d = config.d_model
    terms = [("input (residual stream)", tokens * d, FLOAT32)]
    if config.norm == "layer":
        terms.append(("mean and 1/std", 2 * tokens, FLOAT32))
    else:
        terms.append(("1/rms", tokens, FLOAT32))
        # Composed of pow, rsqrt and mul there, one kernel on CUDA; the weights multiply this.
        if device == "cpu" and config.norm == "rms":
            terms.append(("normalised input", tokens * d, FLOAT32))
    copies = 1 if itemsize == FLOAT32 else readers
    return [*terms, ("output", copies * tokens * d, itemsize)]


def rms_norm_is_cast() -> bool:
    """Whether CUDA's autocast takes rms_norm to float32: torch 2.11 did not, 2.13 does."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("aten::rms_norm", "AutocastCUDA")


def squares_in_float32(config: ModelConfig, itemsize: int, device: str) -> bool:
    """CUDA's autocast takes ``square`` to float32; the CPU's leaves it in bf16."""
    return config.mlp_activation == "relu2" and itemsize != FLOAT32 and device == "cuda"


def _mlp_terms(
    config: ModelConfig, tokens: int, device: str, itemsize: int
) -> list[tuple[str, int, int]]:
    hidden = tokens * config.mlp_hidden
    terms = [("hidden, before and after activation", 2 * hidden, itemsize)]
    if squares_in_float32(config, itemsize, device):
        terms.append(("hidden in float32, for its square", hidden, FLOAT32))
    return terms


def convolves_in_one_kernel(config: ModelConfig, device: str, itemsize: int) -> bool:
    """Whether the convolution is this package's own, not torch's: see ops.causal_conv."""
    if device == "cuda":
        return config.d_conv in FUSED_TAPS
    return (itemsize == FLOAT32 and config.d_conv in native_conv.TAPS
            and native_conv.available(torch.float32))


def low_rank_width(config: ModelConfig, device: str) -> int:
    """Columns of x_proj's output before B and C."""
    rank = 0 if config.dt_rank == "full" else config.dt_rank_value
    return rank + (-rank % 8 if device == "cuda" else 0)  # zeros that put B and C on 16 bytes


def _mamba_terms(
    config: ModelConfig, batch: int, length: int, dtype: torch.dtype, form: str, device: str
) -> list[tuple[str, str, int, int]]:
    d, D, N, itemsize = config.d_model, config.d_inner, config.d_state, dtype.itemsize
    tokens = batch * length
    full_rank = config.dt_rank == "full"
    rank = low_rank_width(config, device)
    fused, half = form == "fused", itemsize != FLOAT32
    terms = [
        ("scan input", "u", tokens * D, itemsize if fused else FLOAT32),
        ("scan input", "exp(A_log) and A", 2 * D * N, FLOAT32),
        ("projection", "input of out_proj", tokens * D, itemsize),
    ]
    one_kernel = convolves_in_one_kernel(config, device, itemsize)
    if one_kernel:  # reads u where in_proj left it, writes (B, L, D)
        copies = 0 if fused or not half else 1
    else:
        terms += [
            ("conv", "input, padded", batch * (length + config.d_conv - 1) * D, itemsize),
            ("conv", "output", tokens * D, itemsize),
        ]
        # torch's convolution leaves (B, D, L) in memory and each linear map copies u; for a
        # batch of one the CPU leaves it in (L, D) order and the copies are u itself.
        copies = 2 if full_rank else 1
        if batch == 1 and device == "cpu":
            copies = 0 if fused or not half else 1
    terms.append(("projection", "u, copied for x_proj and dt_proj", copies * tokens * D, itemsize))
    # z, B, C and the low-rank step are views: each keeps the whole output that it was cut from.
    if rank or fused or (form != "chunked" and not half):
        terms.append(("projection", "output of x_proj", tokens * (rank + 2 * N), itemsize))
    if fused or not half or one_kernel:
        terms.append(("gate", "output of in_proj (u and z)", tokens * 2 * D, itemsize))
    if fused:
        terms.append(("scan input", "delta", tokens * D, itemsize))
    else:
        terms += [
            ("scan input", "softplus input and output", 2 * tokens * D, FLOAT32),
            ("gate", "y and silu(z)", 2 * tokens * D, FLOAT32),
        ]
        if half:
            terms.append(("gate", "z in float32", tokens * D, FLOAT32))
        if half and form != "chunked":
            terms.append(("scan input", "B and C in float32", 2 * tokens * N, FLOAT32))
    small = D * (rank + 2 * N) + D * (rank or D)  # x_proj and dt_proj, as they are used
    if half:
        taps = 0 if one_kernel else D * config.d_conv
        terms.append(("casts", "weights, cast", 2 * D * d + taps + small + D * d, itemsize))
    elif rank and rank != config.dt_rank_value:
        terms.append(("casts", "small weights, padded", small, itemsize))
    chunk = config.scan_chunk or FORMS[form].chunk
    for name, elements, size in scan_terms(
            form, batch, length, D, N, chunk, device, dtype):
        terms.append(("scan input" if name in PER_CHANNEL else "scan", name, elements, size))
    return terms


def _attention_terms(
    config: ModelConfig, batch: int, length: int, itemsize: int, device: str
) -> list[tuple[str, str, int, int]]:
    d, kv = config.d_model, config.n_kv_head * config.head_dim
    tokens = batch * length
    terms = [
        ("attention", "q and k, rotated", tokens * (d + kv), itemsize),
        ("attention", "v", tokens * kv, itemsize),
        ("attention", "output", tokens * d, itemsize),
        ("attention", "log-sum-exp", tokens * config.n_head, FLOAT32),
        ("attention", "cos and sin", 4 * length * (config.head_dim // 2), itemsize),
        ("projection", "input of out_proj", tokens * d, itemsize),
    ]
    if config.qk_norm:
        # The CPU computes the norm, and keeps its input, in float32 in any case.
        wide = device == "cpu" or rms_norm_is_cast()
        terms.append(("attention", "q and k before their norm", tokens * (d + kv),
                      FLOAT32 if wide else itemsize))
        heads = config.n_head + config.n_kv_head
        terms.append(("attention", "1/rms of q and k", tokens * heads, FLOAT32))
    if length > config.attention_window:
        terms.append(("attention", "window mask", length * length, itemsize))
    if itemsize != FLOAT32:
        terms.append(("casts", "weights, cast", 2 * d * d + 2 * d * kv, itemsize))
    return terms
