"""A residual stream, what is added to it, and the norm that reads the sum: one pass each way."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mambabyte.ops.build.kernel import multiprocessors
from mambabyte.ops.conv.cuda import ELEMENTS
from mambabyte.ops.fused import cuda

KINDS = ("none", "rms", "layer")
EPS = torch.finfo(torch.float32).eps
_MOST_THREADS = 512  # for more there are too few registers
# Threads a multiprocessor in the backward, with gains or other streams and without; each block
# leaves partial sums.
_RESIDENT = {"true": 512, "false": 1024}


class Streams(NamedTuple):
    """What is added up: ``x_gain (x + y_gain y + z_gain z) + e_gain e``; what is None is left out.

    x, y, z, e (..., C): x, z and e of one dtype, y of another or the same. Gains (C,), float32."""

    x: Tensor
    y: Tensor | None = None
    z: Tensor | None = None
    e: Tensor | None = None
    x_gain: Tensor | None = None
    y_gain: Tensor | None = None
    z_gain: Tensor | None = None
    e_gain: Tensor | None = None


class Norm(NamedTuple):
    """How the sum is normalised over its last axis: "none", by its RMS or as a layer norm does."""

    kind: Literal["none", "rms", "layer"] = "none"
    eps: float | None = None  # None, of an RMS norm, is torch's own: that of float32, or float64
    weight: Tensor | None = None  # (C,), float32
    bias: Tensor | None = None


class Mixed(NamedTuple):
    """What :func:`mix_norm` makes, each (..., C)."""

    total: Tensor  # the sum, in the dtype of x
    normed: Tensor  # the sum normalised; empty where the norm is "none"
    first: Tensor  # x + y_gain y, in the dtype of x; empty unless it was asked for
    e: Tensor | None  # e, for the next layer to read in its place: its gradients add up on the way


def mix_norm(streams: Streams, norm: Norm, dtype: torch.dtype, first: bool = False) -> Mixed:
    """The sum and the sum normalised, in ``dtype``; and with ``first`` what its first two parts
    come to.

    On a GPU one kernel, and in the backward one and another for the gradients of gains and weights,
    bit-equal on repetition; where there is no kernel for the dtypes or C, in torch.
    """
    x, y = streams.x, streams.y
    fits = (y is None or y.dtype == dtype) and dtype in ELEMENTS and cuda.takes(*streams, *norm[2:])
    fits = fits and all(t is None or t.dtype == x.dtype for t in (streams.z, streams.e))
    fits = fits and all(t is None or t.dtype == torch.float32 for t in (*streams[4:], *norm[2:]))
    if not fits or not x.numel() or _plan(x.shape[-1])[1] > _MOST_THREADS:
        return mix_norm_in_torch(streams, norm, dtype, first)
    eps = EPS if norm.eps is None else norm.eps
    whole = streams.z is None and streams.e is None and streams.x_gain is None
    total, normed, part, e = _MixNorm.apply(
        KINDS.index(norm.kind), eps, dtype, first and not whole, *streams, *norm[2:])
    return Mixed(total, normed, total if first and whole else part, e)


def mix_norm_in_torch(
    streams: Streams, norm: Norm, dtype: torch.dtype, first: bool = False
) -> Mixed:
    """:func:`mix_norm` in torch's operators: its definition, in float64 too."""
    x, y, z, e, x_gain, y_gain, z_gain, e_gain = streams
    total = x if y is None else x + (y if y_gain is None else y_gain * y)
    part = total.to(x.dtype) if first else x.new_empty(0)
    if z is not None:
        total = total + (z if z_gain is None else z_gain * z)
    total = total if x_gain is None else x_gain * total
    if e is not None:
        total = total + (e if e_gain is None else e_gain * e)
    total = total.to(x.dtype)
    if norm.kind == "none":
        return Mixed(total, total.new_empty(0, dtype=dtype), part, e)
    wide = total if total.dtype == torch.float64 else total.float()
    shape = wide.shape[-1:]
    weight, bias = (None if t is None else t.to(wide.dtype) for t in (norm.weight, norm.bias))
    if norm.kind == "layer":
        normed = F.layer_norm(wide, shape, weight, bias, norm.eps or 0.0)
    else:
        normed = F.rms_norm(wide, shape, weight, norm.eps)
    return Mixed(total, normed.to(dtype), part, e)


def _plan(channels: int) -> tuple[int, int]:
    """(channels a thread, threads)."""
    width = 4 if channels % 4 == 0 else 1
    return width, -(-channels // (32 * width)) * 32


class _MixNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kind: int, eps: float, dtype: torch.dtype, first: bool, *given: Any
    ) -> Any:
        tensors: list[Any] = [None if t is None else t.contiguous() for t in given]
        width, threads = _plan(given[0].shape[-1])
        if not cuda.aligned(width, *tensors):  # a part of a larger tensor
            tensors = [None if t is None else t.clone() for t in tensors]
        x, weight = tensors[0], tensors[8]
        channels = x.shape[-1]
        rows = x.numel() // channels
        alone = all(t is None for t in tensors[1:8])  # the sum is x itself
        out = None if alone else torch.empty_like(x)
        part = torch.empty(x.shape if first else 0, dtype=x.dtype, device=x.device)
        normed = torch.empty(x.shape if kind else 0, dtype=dtype, device=x.device)
        stats = torch.empty(rows if kind else 0, 2, dtype=torch.float32, device=x.device)
        mixed = "false" if all(t is None for t in tensors[2:8]) else "true"
        types = f"{ELEMENTS[x.dtype]}, {ELEMENTS[dtype]}, {width}, {mixed}"
        blocks = min(-(-rows // 2), 16 * multiprocessors(x.device.index))
        cuda.launch(x.device, "norm_forward", types, blocks, threads, *tensors, out,
                    part if first else None, normed, stats, blocks, rows, channels, kind, eps)
        if out is None:
            out = x.view_as(x)
        # Of the streams the backward needs those whose gains want a gradient.
        x_gain, y_gain, z_gain, e_gain = tensors[4:8]
        kept = (x if x_gain is not None else None,
                tensors[1] if x_gain is not None or y_gain is not None else None,
                tensors[2] if x_gain is not None or z_gain is not None else None,
                tensors[3] if e_gain is not None else None)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(out if kind else None, stats, *kept, *tensors[4:8], weight)
        ctx.kind, ctx.types, ctx.dtype, ctx.resident = kind, types, dtype, _RESIDENT[mixed]
        ctx.like = x.shape, x.dtype, x.device
        return out, normed, part, None if given[3] is None else given[3].view_as(given[3])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        cuda.refuse_second_derivative()
        out, stats, x, y, z, e, *gains, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[4:]
        shape, dtype, device = ctx.like
        channels = shape[-1]
        kind = 0 if grads[1] is None else ctx.kind
        if all(t is None for t in grads):
            return (None,) * 14
        given = [None if t is None else t.contiguous() for t in grads]
        streams = [torch.empty(shape, dtype=ctx.dtype if i == 1 else dtype, device=device)
                   if needed else None for i, needed in enumerate(needs[:4])]
        rows = shape.numel() // channels
        threads = _plan(channels)[1]
        blocks = min(-(-rows // 2),
                     max(1, ctx.resident // threads) * multiprocessors(device.index))
        wanted = [n and (kind > 0 or i < 4) for i, n in enumerate(needs[4:])]
        partial = torch.empty(
            sum(wanted), blocks, channels, dtype=torch.float32, device=device)
        parts = iter(partial)
        partials = [next(parts) if n else None for n in wanted]
        cuda.launch(device, "norm_backward", ctx.types, blocks, threads, *given,
                    out, stats, x, y, z, e, *gains, weight, *streams, *partials, blocks, rows,
                    channels, kind)
        sums = torch.empty(sum(wanted), channels, dtype=torch.float32, device=device)
        if len(sums):
            cuda.launch(device, "column_sums", "", -(-channels // 32) * len(sums), 1024, partial,
                        sums, blocks, channels)
        found = iter(sums)
        return None, None, None, None, *streams, *(next(found) if n else None for n in wanted)
