"""The gated delta rule as one PyTorch operator, ``torch.ops.mambabyte.gated_delta_rule``.

It is the chunked form, which keeps nothing but its inputs and runs a second time in the backward
pass: what it would keep else is some ten times as large.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambabyte.ops.delta.chunked import CHUNK, chunked_delta
from mambabyte.ops.library import Tensors, check_tensors, define
from mambabyte.ops.ssd.recompute import gradients_again

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def fused_delta(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The rule as in :func:`mambabyte.ops.gated_delta_rule`, on prepared inputs.

    Shapes: q, k (B, L, H, K) and v (B, L, H, V) of one dtype; log_decay (B, L, H, 1 or K), beta
    (B, L, H) and initial_state (B, H, K, V) in float32, or in float64 beside float64 sequences.
    Returns o (B, L, H, V) and the final state. Raises UserError for shapes, dtypes or devices
    that do not fit.
    """
    o, final_state = _delta(q, k, v, log_decay, beta, initial_state)
    return o, final_state


def _check(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor | None
) -> None:
    batch, length, heads, keys = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    gates = (batch, length, heads)
    gate = 1 if log_decay.ndim == 4 and log_decay.shape[3] == 1 else keys
    check_tensors("q", q, None, _DTYPES, (
        ("k", k, tuple(q.shape), q.dtype), ("v", v, (*gates, v.shape[-1]), q.dtype),
        ("log_decay", log_decay, (*gates, gate), wide), ("beta", beta, gates, wide),
        ("initial_state?", state, (batch, heads, keys, v.shape[-1]), wide)))


def _in_torch(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        wide = beta.dtype
        if state is None:
            state = beta.new_zeros(q.shape[0], *q.shape[2:], v.shape[3])
        o, state = chunked_delta(
            q.to(wide), k.to(wide), v.to(wide), log_decay, beta, state, CHUNK)
        return o.to(v.dtype), state


def _backward(
    do: Tensor, dstate: Tensor | None, *inputs: Tensor | None
) -> tuple[Tensor | None, ...]:
    return gradients_again(_in_torch, (do, dstate), inputs)


def _shapes(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor | None
) -> Tensors:
    return v.new_empty(v.shape), beta.new_empty(q.shape[0], *q.shape[2:], v.shape[3])


_delta = define(
    "gated_delta_rule",
    "Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor beta, Tensor? initial_state",
    "o, final_state",
    forward={"cpu": _in_torch, "cuda": _in_torch},
    backward={"cpu": _backward, "cuda": _backward},
    check=_check, shapes=_shapes, in_torch=_in_torch, cast={"cuda": ("q", "k", "v")},
)
