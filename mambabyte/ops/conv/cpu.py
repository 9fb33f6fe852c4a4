"""The depthwise causal convolution with SiLU on the CPU in C, forward and backward.

torch's convolution wants (B, D, L), is general, and has a slow backward for depthwise weights: with
the scan in C it was two fifths of a training step. This one works in the model's own layout.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from mambabyte.ops.build import c as native_build

__all__ = ["available", "native_causal_conv"]

SOURCE = Path(__file__).with_name("conv.c")
TAPS = range(2, 9)
DTYPES = (torch.float32, torch.float64)
_pack = struct.Struct("20q").pack


class _Library(NamedTuple):
    forward: Callable[[bytes], int]
    backward: Callable[[bytes], int]


@functools.cache
def _load(double: bool) -> _Library | str:
    library = native_build.load(SOURCE, ("-DSCAN_DOUBLE",) if double else ())
    if isinstance(library, str):
        return library
    functions = (library.conv_forward, library.conv_backward)
    for function in functions:
        function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int
    return _Library(*functions)


def available(dtype: torch.dtype) -> bool:
    """Whether this runs here; the scan's own fallback says why not."""
    return dtype in DTYPES and not isinstance(_load(dtype == torch.float64), str)


def native_causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, silu: bool
) -> Tensor:
    """``silu(bias + sum_k weight_k x_{t-K+1+k})``; positions before x come from ``tail``.

    Shapes: x (B, L, D) float32 or float64 on the CPU; weight (D, K), K in ``TAPS``; bias (D,); tail
    (B, K-1, D), zero when None. Returns y (B, L, D). Gradients flow to all inputs; they are
    bit-equal on repetition and for any number of threads. Shapes are the caller's business.
    """
    return _Conv.apply(x, weight, bias, tail, silu)


def _call(function: str, x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None,
          silu: bool, y: Tensor | None, dy: Tensor | None, *outputs: Tensor | None) -> None:
    if isinstance(x, FakeTensor):  # shapes alone are asked for
        return
    batch, length, channels = x.shape
    library = _load(x.dtype == torch.float64)
    if isinstance(library, str):
        raise RuntimeError(f"the native convolution is not available: {library}")
    strides = (0, 0) if dy is None else dy.stride()[:2]
    getattr(library, function)(_pack(
        batch, length, channels, weight.shape[1], silu, torch.get_num_threads(),
        *x.stride()[:2], *strides,
        *(0 if t is None else t.data_ptr() for t in (x, tail, weight, bias, y, dy, *outputs)),
        *(0,) * (4 - len(outputs))))


def _unit(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None,
                silu: bool) -> Tensor:
        x, weight = _unit(x), weight.contiguous()
        bias, tail = (None if t is None else t.contiguous() for t in (bias, tail))
        y = x.new_empty(x.shape)
        if y.numel():
            _call("forward", x, weight, bias, tail, silu, y, None)
        ctx.save_for_backward(x, weight, bias, tail)
        ctx.silu = silu
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, tail = ctx.saved_tensors
        dx, dweight = x.new_empty(x.shape), torch.zeros_like(weight)
        dtail, dbias = (None if t is None else torch.zeros_like(t) for t in (tail, bias))
        if dx.numel():
            _call("backward", x, weight, bias, tail, ctx.silu, None, _unit(dy), dx, dtail,
                  dweight, dbias)
        return dx, dweight, dbias, dtail, None
