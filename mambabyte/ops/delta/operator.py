"""The gated delta rule as one PyTorch operator, ``torch.ops.mambabyte.gated_delta_rule``.

On a GPU it is the kernels of ``delta.cu`` where they fit (bf16, heads of 64 key and 64 value
channels), which keep five or eight tensors of the size of ``v``. Everywhere else it is the chunked
form, which keeps nothing but its inputs and runs a second time in the backward pass: what it would
keep else is some ten times as large.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from mambabyte.ops.arguments import FLOATS, check_tensors, without_autocast
from mambabyte.ops.delta import cuda as kernels
from mambabyte.ops.delta.chunked import CHUNK, chunked_delta
from mambabyte.ops.library import Tensors, define, wants_gradient
from mambabyte.ops.scan.operator import fused_available
from mambabyte.ops.ssd.decay import without_past
from mambabyte.ops.ssd.recompute import gradients_again


def fused_delta(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor,
    initial_state: Tensor | None = None, ages: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The rule as in :func:`mambabyte.ops.gated_delta_rule`, on prepared inputs.

    Shapes: q, k (B, L, H, K) and v (B, L, H, V) of one dtype; log_decay (B, L, H, 1 or K), beta
    (B, L, H) and initial_state (B, H, K, V) in float32, or in float64 beside float64 sequences;
    ages (B, L) as of ``document_ages``. Returns o (B, L, H, V) and the final state. Raises
    UserError for shapes, dtypes or devices that do not fit.
    """
    tensors = (q, k, v, log_decay, beta, initial_state, ages)
    o, final_state, *_ = _delta(*tensors, wants_gradient(*tensors))
    return o, final_state


def _check(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor | None,
    ages: Tensor | None,
) -> None:  # fmt: skip
    batch, length, heads, keys = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    gates = (batch, length, heads)
    gate = 1 if log_decay.ndim == 4 and log_decay.shape[3] == 1 else keys
    check_tensors("q", q, None, FLOATS, (
        ("k", k, tuple(q.shape), q.dtype), ("v", v, (*gates, v.shape[-1]), q.dtype),
        ("log_decay", log_decay, (*gates, gate), wide), ("beta", beta, gates, wide),
        ("initial_state?", state, (batch, heads, keys, v.shape[-1]), wide),
        ("ages?", ages, (batch, length), torch.uint8)))


def _in_torch(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor | None,
    ages: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    with without_autocast(q.device):
        wide = beta.dtype
        if state is None:
            state = beta.new_zeros(q.shape[0], *q.shape[2:], v.shape[3])
        o, state = chunked_delta(
            q.to(wide), k.to(wide), v.to(wide), without_past(log_decay, ages), beta, state, CHUNK)
        return o.to(v.dtype), state


def has_kernel(q: Tensor, v: Tensor) -> bool:
    """Whether the GPU's kernels take these: bf16, heads of 64 key and 64 value channels."""
    return (q.is_cuda and q.dtype == torch.bfloat16
            and q.shape[3] == v.shape[3] == kernels.CHANNELS and fused_available(q.device)[0])


def _forward(*args: Any) -> Tensors:
    return (*_in_torch(*args[:-1]), *kernels.Kept.nothing(args[0]))


def _forward_cuda(*args: Any) -> Tensors:
    return kernels.forward(*args) if has_kernel(args[0], args[2]) else _forward(*args)


def _backward(
    do: Tensor, dstate: Tensor | None, *args: Any
) -> tuple[Tensor | None, ...]:
    *inputs, ages = args[:_INPUTS]
    again = functools.partial(_in_torch, ages=ages)
    return *gradients_again(again, (do, dstate), inputs), None


def _backward_cuda(
    do: Tensor, dstate: Tensor | None, *args: Any
) -> tuple[Tensor | None, ...]:
    if not has_kernel(args[0], args[2]):
        return _backward(do, dstate, *args)
    if not args[_INPUTS].numel():  # nothing was kept
        again = (*args[:_INPUTS], True)
        args = (*args[:_INPUTS], *kernels.forward(*again)[2:])
    return *kernels.backward(do, dstate, *args), None


def _shapes(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor | None,
    ages: Tensor | None, save: bool,
) -> Tensors:  # fmt: skip
    last = beta.new_empty(q.shape[0], *q.shape[2:], v.shape[3])
    kept = (kernels.Kept.empty(q, log_decay, save) if save and has_kernel(q, v)
            else kernels.Kept.nothing(q))
    return v.new_empty(v.shape), last, *kept


_INPUTS = 7
_delta = define(
    "gated_delta_rule",
    "Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor beta, Tensor? initial_state, "
    "Tensor? ages",
    "o, final_state", kept=", ".join(kernels.Kept._fields),
    forward={"cpu": _forward, "cuda": _forward_cuda},
    backward={"cpu": _backward, "cuda": _backward_cuda},
    check=_check, shapes=_shapes, in_torch=_in_torch, cast={"cuda": ("q", "k", "v")},
)
