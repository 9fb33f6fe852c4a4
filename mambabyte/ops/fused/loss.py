"""Cross-entropy of logits that may be capped and added to another model's, in two passes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambabyte.ops.conv.cuda import ELEMENTS
from mambabyte.ops.fused import cuda

NOT_PREDICTED = -1  # a target: the first byte of a document, which none before it announces
_THREADS = 256


def cross_entropy(
    logits: Tensor, targets: Tensor, cap: float = 0.0, gate: Tensor | None = None,
    offset: Tensor | None = None, predictions: Tensor | None = None,
) -> Tensor:
    """The mean over rows of ``log sum exp u - u[target]``, a float32 scalar, with ``u = cap
    tanh(logits / cap) + gate offset``.

    With ``predictions``, a number, it is the sum over rows whose target is not NOT_PREDICTED,
    divided by that.

    logits (N, V); targets (N,) int64; cap 0 is none; gate (N, 1) and offset (N, V), which takes no
    gradient, go together. On a GPU no copy of the logits in float32 is made: a kernel and a sum,
    and one kernel in the backward, bit-equal on repetition. Elsewhere in torch.
    """
    half = offset is None or offset.dtype == torch.float16
    if not half or not cuda.takes(logits, gate, offset) or not logits.numel():
        return cross_entropy_in_torch(logits, targets, cap, gate, offset, predictions)
    mean: Tensor = _CrossEntropy.apply(logits, targets, cap, gate, offset)
    return mean if predictions is None else mean * (len(targets) / predictions)


def cross_entropy_in_torch(
    logits: Tensor, targets: Tensor, cap: float = 0.0, gate: Tensor | None = None,
    offset: Tensor | None = None, predictions: Tensor | None = None,
) -> Tensor:
    """:func:`cross_entropy` in torch's operators: its definition, in float64 too."""
    u = cap * torch.tanh(logits / cap) if cap else logits
    u = u if u.dtype == torch.float64 else u.float()
    if gate is not None and offset is not None:
        u = u + gate.to(u.dtype) * offset.to(u.dtype)
    if predictions is None:
        return F.cross_entropy(u, targets)
    nats = F.cross_entropy(u, targets, ignore_index=NOT_PREDICTED, reduction="sum")
    return nats / predictions


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, cap: float, gate: Tensor | None,
                offset: Tensor | None) -> Tensor:
        logits, targets = logits.contiguous(), targets.contiguous()
        gate, offset = (None if t is None else t.contiguous() for t in (gate, offset))
        rows, symbols = logits.shape
        losses, normaliser = torch.empty(
            2, rows, dtype=torch.float32, device=logits.device)
        mean = torch.empty((), dtype=torch.float32, device=logits.device)
        of_gate = logits.dtype if gate is None else gate.dtype
        ctx.types = f"{ELEMENTS[logits.dtype]}, {ELEMENTS[of_gate]}"
        cuda.launch(logits.device, "loss_forward", ctx.types, -(-rows * 32 // _THREADS), _THREADS,
                    logits, targets, gate, offset, losses, normaliser, rows, symbols, cap)
        cuda.launch(logits.device, "loss_mean", "", 1, 1024, losses, mean, rows)
        ctx.save_for_backward(logits, targets, gate, offset, normaliser)
        ctx.cap = cap
        return mean

    @staticmethod
    def backward(ctx: Any, d_mean: Tensor) -> Any:
        cuda.refuse_second_derivative()
        logits, targets, gate, offset, normaliser = ctx.saved_tensors
        rows, symbols = logits.shape
        d_logits = torch.empty_like(logits)
        d_gate = None if gate is None else torch.empty_like(gate)
        cuda.launch(logits.device, "loss_backward", ctx.types, -(-rows * 32 // _THREADS), _THREADS,
                    d_mean.float().contiguous(), logits, targets, gate, offset, normaliser,
                    d_logits, d_gate, rows, symbols, ctx.cap)
        return d_logits, None, None, d_gate, None
