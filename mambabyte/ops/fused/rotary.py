"""Queries or keys normalised, turned by rotary angles, scaled by a gain a head, in one pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambabyte.ops.conv.cuda import ELEMENTS
from mambabyte.ops.fused import cuda
from mambabyte.ops.fused.norm import EPS

_THREADS = 256


def norm_rotate(
    x: Tensor, table: tuple[Tensor, Tensor], gain: Tensor | None = None, norm: bool = False
) -> Tensor:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864) of x (B, H, L, d), in x's dtype.

    ``table`` is cosine and sine (L, d / 2) of the angles. With ``norm``, x is first divided by its
    RMS over d; ``gain`` (H,) scales the heads last. On a GPU one kernel, and one in the backward;
    for a dtype or width without a kernel, in torch.
    """
    half = x.shape[-1] // 2
    width = next(w for w in (4, 2, 1) if half % w == 0)
    if not cuda.takes(x, gain, *table) or half > 32 * width or not x.numel():
        return norm_rotate_in_torch(x, table, gain, norm)
    cos, sin = (t.float().contiguous() for t in table)
    return _NormRotate.apply(x, cos, sin, gain, norm)


def norm_rotate_in_torch(
    x: Tensor, table: tuple[Tensor, Tensor], gain: Tensor | None = None, norm: bool = False
) -> Tensor:
    """:func:`norm_rotate` in torch's operators: its definition, in float64 too."""
    if norm:
        x = F.rms_norm(x, x.shape[-1:])
    x = rotate(x, table)
    return x if gain is None else x * gain.to(x.dtype)[:, None, None]


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864): x (B, H, L, head_dim), head_dim even."""
    cos, sin = (t.to(x.dtype) for t in table)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def _rows(x: Tensor, width: int) -> Tensor:
    """x (B, H, L, d) with unit stride on its last axis, and all of it on ``width`` elements."""
    odd = x.stride(-1) != 1 or any(s % width for s in x.stride()[:3])
    return x.contiguous() if odd or not cuda.aligned(width, x) else x


def _plan(half: int) -> tuple[int, int]:
    """(channels of a half a thread, threads a row)."""
    width = next(w for w in (4, 2, 1) if half % w == 0)
    return width, 1 << (half // width - 1).bit_length()


class _NormRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, gain: Tensor | None,
                norm: bool) -> Tensor:
        batch, heads, length, both = x.shape
        width, lanes = _plan(both // 2)
        x = _rows(x, width)
        gains = None if gain is None else gain.float().contiguous()
        y = torch.empty(batch, length, heads, both, dtype=x.dtype, device=x.device)
        rows, types = batch * length * heads, f"{ELEMENTS[x.dtype]}, {width}, {lanes}"
        cuda.launch(
            x.device, "rotary_forward", types, -(-rows * lanes // _THREADS), _THREADS, x, cos, sin,
            gains, y, x.stride(0), x.stride(2), x.stride(1), rows, length, heads, both // 2,
            norm, EPS)
        ctx.save_for_backward(x, cos, sin, gains)
        ctx.norm, ctx.types = norm, types
        ctx.gain = None if gain is None else gain.dtype
        return y.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, cos, sin, gains = ctx.saved_tensors
        batch, heads, length, both = x.shape
        width, lanes = _plan(both // 2)
        dy = _rows(dy, width)
        dx = torch.empty(batch, length, heads, both, dtype=x.dtype, device=x.device)
        rows = batch * length * heads
        dots = torch.empty(batch * length, heads, device=x.device) if ctx.gain else None
        cuda.launch(
            x.device, "rotary_backward", ctx.types, -(-rows * lanes // _THREADS), _THREADS, dy, x,
            cos, sin, gains, dx, dots, dy.stride(0), dy.stride(2), dy.stride(1), x.stride(0),
            x.stride(2), x.stride(1), rows, length, heads, both // 2, ctx.norm, EPS)
        d_gain = None if dots is None else dots.sum(0).to(ctx.gain)
        return dx.transpose(1, 2), None, None, d_gain, None
