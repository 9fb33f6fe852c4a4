"""Queries, keys and values of one projection: normalised, turned and scaled in one pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambabyte.ops.conv.cuda import ELEMENTS
from mambabyte.ops.fused import cuda
from mambabyte.ops.fused.norm import EPS

_THREADS = 256
Table = tuple[Tensor, Tensor]  # cosine and sine (L, d / 2) of the angles


def rotate_qkv(
    qkv: Tensor, heads: tuple[int, int], table: Table, gain: Tensor | None = None,
    norm: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, H, L, d), keys and values (B, G, L, d) of qkv (B, L, (H + 2 G) d), in its dtype.

    ``heads`` is (H, G). Queries and keys get rotary positions (Su et al. 2021, arXiv:2104.09864),
    with ``norm`` after a division by their RMS over d; ``gain`` (H,) scales the heads of queries
    last. On a GPU one kernel, and one in the backward, whose results lie as qkv does; for a dtype
    or width without a kernel, in torch.
    """
    half = table[0].shape[-1]
    if not cuda.takes(qkv, gain, *table) or half > 32 * _width(half) or not qkv.numel():
        return rotate_qkv_in_torch(qkv, heads, table, gain, norm)
    cos, sin = (t.float().contiguous() for t in table)
    found: tuple[Tensor, Tensor, Tensor] = _RotateQkv.apply(qkv, heads, cos, sin, gain, norm)
    return found


def rotate_qkv_in_torch(
    qkv: Tensor, heads: tuple[int, int], table: Table, gain: Tensor | None = None,
    norm: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`rotate_qkv` in torch's operators: its definition, in float64 too."""
    queries, keys = heads
    rows = qkv.unflatten(-1, (queries + 2 * keys, -1)).transpose(1, 2)
    q, k, v = rows.split([queries, keys, keys], dim=1)
    if norm:
        q, k = (F.rms_norm(x, x.shape[-1:]) for x in (q, k))
    q, k = rotate(q, table).to(v.dtype), rotate(k, table).to(v.dtype)
    return q if gain is None else q * gain.to(q.dtype)[:, None, None], k, v


def rotary_table(
    position: int, length: int, half: int, base: float, fraction: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosine and sine (length, half) of the rotary angles from ``position`` on, in float64."""
    # float64 for the angles alone: at position 1e6 float32 would be off by 0.06 radians.
    turning = max(1, round(half * fraction))
    rate = base ** (-torch.arange(half, device=device, dtype=torch.float64) / turning)
    rate[turning:] = 0
    steps = torch.arange(position, position + length, device=device, dtype=torch.float64)
    angle = torch.outer(steps, rate)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, table: Table) -> Tensor:
    """Rotary positions alone: x (B, H, L, d), d even."""
    cos, sin = (t.to(x.dtype) for t in table)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def _width(half: int) -> int:
    """Channels of a half a thread."""
    return next(w for w in (4, 2, 1) if half % w == 0)


def _plan(dtype: torch.dtype, half: int, rows: int) -> tuple[str, int]:
    """(types, blocks): threads that share a row are a power of two."""
    lanes = 1 << (half // _width(half) - 1).bit_length()
    return f"{ELEMENTS[dtype]}, {_width(half)}, {lanes}", -(-rows * lanes // _THREADS)


class _RotateQkv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: tuple[int, int], cos: Tensor, sin: Tensor,
                gain: Tensor | None, norm: bool) -> tuple[Tensor, Tensor, Tensor]:
        (batch, length, _), (queries, keys) = qkv.shape, heads
        half = cos.shape[1]
        qkv = qkv.contiguous()
        qkv = qkv if cuda.aligned(_width(half), qkv) else qkv.clone()
        gains = None if gain is None else gain.float().contiguous()
        y = torch.empty(batch, length, queries + keys, 2 * half, dtype=qkv.dtype, device=qkv.device)
        types, blocks = _plan(qkv.dtype, half, y.numel() // (2 * half))
        cuda.launch(qkv.device, "rotary_forward", types, blocks, _THREADS, qkv, cos, sin, gains, y,
                    batch * length, length, queries, keys, half, norm, EPS)
        ctx.save_for_backward(qkv, cos, sin, gains)
        ctx.heads, ctx.norm = heads, norm
        ctx.gain = None if gain is None else gain.dtype
        q, k = y.transpose(1, 2).split([queries, keys], dim=1)
        v = qkv.unflatten(-1, (-1, 2 * half))[:, :, queries + keys :].transpose(1, 2)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        cuda.refuse_second_derivative()
        qkv, cos, sin, gains = ctx.saved_tensors
        (batch, length, _), (queries, keys) = qkv.shape, ctx.heads
        half = cos.shape[1]
        d_qkv = torch.empty_like(qkv)
        dots = None if not ctx.gain else torch.empty(
            batch * length, queries, dtype=torch.float32, device=qkv.device)
        types, blocks = _plan(qkv.dtype, half, qkv.numel() // (2 * half))
        upstream: list[Any] = []
        for grad in (_rows(grad, _width(half)) for grad in grads):
            upstream += [grad, *grad.stride()[:3]]
        cuda.launch(qkv.device, "rotary_backward", types, blocks, _THREADS, *upstream, qkv, cos,
                    sin, gains, d_qkv, dots, batch * length, length, queries, keys, half, ctx.norm,
                    EPS)
        d_gain = None if dots is None else dots.sum(0).to(ctx.gain)
        return d_qkv, None, None, None, d_gain, None


def _rows(x: Tensor, width: int) -> Tensor:
    """x (B, H, L, d) with unit stride on its last axis, and all of it on ``width`` elements."""
    odd = x.stride(-1) != 1 or any(s % width for s in x.stride()[:3])
    return x.contiguous() if odd or not cuda.aligned(width, x) else x
