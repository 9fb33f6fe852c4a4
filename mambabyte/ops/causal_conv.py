"""Depthwise causal convolution with a carried tail: the same function at every length."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor

from mambabyte.ops.conv.cpu import TAPS, available, native_causal_conv
from mambabyte.ops.conv.cuda import fused_causal_conv
from mambabyte.ops.scan.operator import fused_available

FUSED_TAPS = range(2, 9)
FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None = None,
    silu: bool = False,
) -> tuple[Tensor, Tensor]:
    """``y_t = bias + sum_k weight_k x_{t-K+1+k}``, where positions before x come from ``tail``.

    Shapes: x (B, L, D); weight (D, K); bias (D,); tail (B, K-1, D), zero when None, the last
    inputs of what came before; ``silu`` applies SiLU to y. Returns y (B, L, D) and the tail to
    carry on with. On a GPU one kernel does it all in this layout, on a CPU a function in C;
    torch's convolution, which wants (B, D, L), is what there is without them.
    """
    batch, length, channels = x.shape
    taps = weight.shape[1]
    fits = x.is_cuda and x.dtype in FUSED_DTYPES and taps in FUSED_TAPS
    if fits and fused_available(x.device)[0]:
        return fused_causal_conv(x, weight, bias, tail, silu)
    if _native(x, weight, bias):
        y = native_causal_conv(x, weight, bias, None if tail is None else tail.to(x.dtype), silu)
        if length < taps - 1:
            before = x.new_zeros(batch, taps - 1, channels) if tail is None else tail.to(x.dtype)
            return y, torch.cat([before[:, length:], x], dim=1)
        return y, x[:, length - taps + 1 :].clone()
    if tail is None:
        tail = x.new_zeros(batch, taps - 1, channels)
    padded = torch.cat([tail.to(x.dtype), x], dim=1)  # (B, K-1+L, D)
    y = F.conv1d(padded.transpose(1, 2), weight.unsqueeze(1), bias, groups=channels)
    y = y.transpose(1, 2)
    # A copy: a view would keep the whole padded sequence alive as long as the tail.
    return F.silu(y) if silu else y, padded[:, length:].clone()


def _native(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the convolution in C takes these; under autocast and torch.func, torch's own does."""
    return (x.device.type == "cpu" and weight.dtype == x.dtype
            and (bias is None or bias.dtype == x.dtype) and weight.shape[1] in TAPS
            and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()
            and torch._C._functorch.peek_interpreter_stack() is None
            and type(x) in (Tensor, FakeTensor) and not _only_torch and available(x.dtype))


_only_torch = False


@contextmanager
def torch_convolution() -> Iterator[None]:
    """On the CPU, use torch's convolution: a counter of operations knows no other."""
    global _only_torch
    before, _only_torch = _only_torch, True
    try:
        yield
    finally:
        _only_torch = before
