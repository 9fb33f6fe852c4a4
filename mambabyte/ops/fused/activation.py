"""The activation of an MLP: one pass each way."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambabyte.ops.conv.cuda import ELEMENTS
from mambabyte.ops.fused import cuda

KINDS = ("relu2", "gelu", "silu")
_THREADS = 256


def activate(x: Tensor, kind: str) -> Tensor:
    """x of any shape by "relu2", the square of a ReLU (So et al. 2021, arXiv:2109.08668), "gelu" or
    "silu", in x's dtype. On a GPU one kernel, and one in the backward; elsewhere in torch."""
    if not cuda.takes(x) or not x.numel():
        return activate_in_torch(x, kind)
    return _Activation.apply(x, KINDS.index(kind))


def activate_in_torch(x: Tensor, kind: str) -> Tensor:
    """:func:`activate` in torch's operators: its definition."""
    if kind == "relu2":
        return F.relu(x).square()
    return F.gelu(x) if kind == "gelu" else F.silu(x)


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: int) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        ctx.save_for_backward(x)
        ctx.kind = kind
        _pointwise("activation_forward", kind, x, y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        cuda.refuse_second_derivative()
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        _pointwise("activation_backward", ctx.kind, dy.contiguous(), x, dx)
        return dx, None


def _pointwise(name: str, kind: int, *tensors: Tensor) -> None:
    x, count = tensors[0], tensors[0].numel()
    width = 16 // x.element_size()
    if count % width or not cuda.aligned(width, *tensors):
        width = 1
    blocks = -(-count // (width * _THREADS))
    types = f"{ELEMENTS[x.dtype]}, {width}, {kind}"
    cuda.launch(x.device, name, types, blocks, _THREADS, *tensors, count)
