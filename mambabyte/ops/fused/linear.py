"""A linear map with a bias, whose gradient torch sums at a third of the memory's speed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambabyte.ops.arguments import autocasts
from mambabyte.ops.build.kernel import multiprocessors
from mambabyte.ops.conv.cuda import ELEMENTS
from mambabyte.ops.fused import cuda

_WIDTH = 4  # columns a thread
_RESIDENT = 2048  # threads a multiprocessor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: x (..., I), weight (O, I), bias (O,) -> (..., O). On a GPU, where all three are
    of one dtype, the gradient of the bias is one pass of a kernel and a sum in a fixed order."""
    fits = bias is not None and torch.is_grad_enabled() and bias.requires_grad
    if not fits or not cuda.takes(x, weight, bias) or not x.numel():
        return F.linear(x, weight, bias)
    assert bias is not None
    cast = autocasts(x.device) and torch.get_autocast_dtype(x.device.type) != x.dtype
    if cast or not x.dtype == weight.dtype == bias.dtype or len(bias) % _WIDTH or (
            len(bias) > 1024 * _WIDTH):
        return F.linear(x, weight, bias)
    found: Tensor = _Linear.apply(x, weight, bias)
    return found


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1]).contiguous()
        rows = rows if cuda.aligned(_WIDTH, rows) else rows.clone()
        dx, d_weight, _ = ctx.needs_input_grad
        return (
            (rows @ weight).view_as(x) if dx else None,
            rows.t() @ x.reshape(-1, x.shape[-1]) if d_weight else None,
            # of the gradient of a gradient torch has to know each operation
            rows.sum(0) if torch.is_grad_enabled() else bias_gradient(rows),
        )


def bias_gradient(rows: Tensor) -> Tensor:
    """Sums over the rows of (N, O), a contiguous tensor on a GPU, in its dtype."""
    count, columns = rows.shape
    threads = -(-columns // (32 * _WIDTH)) * 32
    wanted = max(1, _RESIDENT // threads) * multiprocessors(rows.device.index)
    steps = max(8, -(-count // wanted))
    blocks = -(-count // steps)
    partial, sums = (torch.empty(n, columns, dtype=torch.float32, device=rows.device)
                     for n in (blocks, 1))
    cuda.launch(rows.device, "linear_bias", f"{ELEMENTS[rows.dtype]}, {_WIDTH}", blocks, threads,
                rows, partial, count, columns, steps)
    cuda.launch(rows.device, "column_sums", "", -(-columns // 32), 1024, partial, sums, blocks,
                columns)
    return sums[0].to(rows.dtype)
