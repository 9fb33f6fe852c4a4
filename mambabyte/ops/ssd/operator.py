"""SSD as one PyTorch operator, ``torch.ops.mambabyte.ssd``, on prepared inputs.

On a GPU it is the kernels of ``ssd.cu`` where they fit (bf16, heads of 64 channels, 16 to 128
states), which keep the states between chunks of 64 steps. Everywhere else it is the chunked form,
which keeps nothing and runs a second time in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambabyte.ops.arguments import FLOATS, check_tensors, without_autocast
from mambabyte.ops.library import Tensors, define, wants_gradient
from mambabyte.ops.scan.operator import fused_available
from mambabyte.ops.ssd import cuda as kernels
from mambabyte.ops.ssd.chunked import CHUNK, chunked_ssd
from mambabyte.ops.ssd.recompute import gradients_again


def fused_ssd(
    x: Tensor, step: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``h = exp(log_decay) h + step x B^T`` and ``y = h C + D x``, step after step.

    Shapes: x (B, L, H, P) and B, C (B, L, G, N) of one dtype; step and log_decay (B, L, H), D (H,)
    and initial_state (B, H, P, N) in float32, or in float64 beside float64 sequences. Under
    autocast on a GPU the sequences are cast. Returns y (B, L, H, P) and the final state. Raises
    UserError for shapes, dtypes or devices that do not fit.
    """
    tensors = (x, step, log_decay, B, C, D, initial_state)
    y, final_state, _ = _ssd(*tensors, wants_gradient(*tensors))
    return y, final_state


def _check(
    x: Tensor, step: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    state: Tensor | None,
) -> None:  # fmt: skip
    batch, length, heads, channels = x.shape
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    gates, groups = (batch, length, heads), (batch, length, *B.shape[2:])
    check_tensors("x", x, None, FLOATS, (
        ("step", step, gates, wide), ("log_decay", log_decay, gates, wide),
        ("B", B, groups, x.dtype), ("C", C, groups, x.dtype), ("D?", D, (heads,), wide),
        ("initial_state?", state, (batch, heads, channels, B.shape[3]), wide)))


def _in_torch(
    x: Tensor, step: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    with without_autocast(x.device):
        u = x.to(step.dtype)
        if state is None:
            state = u.new_zeros(*u.shape[:1], *u.shape[2:], B.shape[3])
        y, state = chunked_ssd(
            u, step, log_decay, B.to(u.dtype), C.to(u.dtype), state, CHUNK)
        return (y if D is None else y + D[:, None] * u).to(x.dtype), state


def has_kernel(x: Tensor, B: Tensor) -> bool:
    """Whether the GPU's kernels take these: heads of 64 channels in bf16, 16 to 128 states."""
    return (x.is_cuda and x.dtype == torch.bfloat16 and x.shape[3] == kernels.CHANNELS
            and B.shape[3] in kernels.STATES and fused_available(x.device)[0])


def _forward(*args: Any) -> Tensors:
    return (*_in_torch(*args[:-1]), args[0].new_empty(0))


def _forward_cuda(*args: Any) -> Tensors:
    return kernels.forward(*args) if has_kernel(args[0], args[3]) else _forward(*args)


def _backward(
    dy: Tensor, dstate: Tensor | None, *args: Any
) -> tuple[Tensor | None, ...]:
    return gradients_again(_in_torch, (dy, dstate), args[:-1])


def _backward_cuda(
    dy: Tensor, dstate: Tensor | None, *args: Any
) -> tuple[Tensor | None, ...]:
    if has_kernel(args[0], args[3]):
        if not args[-1].numel():  # nothing was kept
            again = (*args[:-1], True)
            args = (*args[:-1], kernels.forward(*again)[2])
        return kernels.backward(dy, dstate, *args)
    return _backward(dy, dstate, *args)


def _shapes(
    x: Tensor, step: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    state: Tensor | None, save: bool,
) -> Tensors:  # fmt: skip
    batch, length, heads, channels = x.shape
    last = step.new_empty(batch, heads, channels, B.shape[3])
    if not (save and has_kernel(x, B)):
        return torch.empty_like(x, memory_format=torch.contiguous_format), last, x.new_empty(0)
    chunks = -(-length // kernels.CHUNK)
    return x.new_empty(x.shape), last, x.new_empty(batch, chunks, heads, channels, B.shape[3])


_SEQUENCES = ("x", "B", "C")
_ssd = define(
    "ssd",
    "Tensor x, Tensor step, Tensor log_decay, Tensor B, Tensor C, Tensor? D, Tensor? initial_state",
    "y, final_state", kept="carries",
    forward={"cpu": _forward, "cuda": _forward_cuda},
    backward={"cpu": _backward, "cuda": _backward_cuda},
    check=_check, shapes=_shapes, in_torch=_in_torch, cast={"cuda": _SEQUENCES},
)
