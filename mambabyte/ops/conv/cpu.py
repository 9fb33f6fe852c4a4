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
from typing import NamedTuple

import torch
from torch import Tensor

from mambabyte.errors import UserError
from mambabyte.ops.arguments import address
from mambabyte.ops.build import c as native_build
from mambabyte.ops.library import constant_in_graphs

__all__ = ["available", "backward", "forward"]

SOURCE = Path(__file__).with_name("conv.c")
_pack = struct.Struct("21q").pack


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


@constant_in_graphs
def available(dtype: torch.dtype) -> bool:
    """Whether this runs here, for float32 or float64; the scan's own fallback says why not."""
    return not isinstance(_load(dtype == torch.float64), str)


def _call(function: str, x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None,
          silu: bool, ages: Tensor | None, y: Tensor | None, dy: Tensor | None,
          *outputs: Tensor | None) -> None:
    batch, length, channels = x.shape
    library = _load(x.dtype == torch.float64)
    if isinstance(library, str):
        raise UserError(f"the native convolution is not available: {library}")
    strides = (0, 0) if dy is None else dy.stride()[:2]
    getattr(library, function)(_pack(
        batch, length, channels, weight.shape[1], silu, torch.get_num_threads(),
        *x.stride()[:2], *strides,
        *(address(t) for t in (x, tail, weight, bias, y, dy, *outputs)),
        *(0,) * (4 - len(outputs)), address(ages)))


def _unit(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _packed(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def of_document(tail: Tensor, ages: Tensor | None) -> Tensor:
    """The last inputs (B, K-1, D), or their gradients, with zeros for those that are older than the
    last document."""
    if ages is None:
        return tail
    behind = torch.arange(tail.shape[1] - 1, -1, -1, device=tail.device)  # the last step
    return tail.masked_fill((behind > ages[:, -1:])[..., None], 0)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, silu: bool,
    ages: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y (B, L, D) and the tail to carry on with (B, K-1, D); arguments as in ``operator.py``, which
    has checked them. Raises UserError where there is no library."""
    x, y = _unit(x), _empty_like(x)
    length, before = x.shape[1], weight.shape[1] - 1
    weight, bias, tail, ages = _packed(weight, bias, tail, ages)  # type: ignore[assignment]
    _call("forward", x, weight, bias, tail, silu, ages, y, None)
    if length >= before:
        last = x[:, length - before :].clone(memory_format=torch.contiguous_format)
        return y, of_document(last, ages)
    if tail is None:
        tail = x.new_zeros(x.shape[0], before, x.shape[2])
    return y, of_document(torch.cat([tail[:, length:], x], dim=1), ages)


def backward(
    dy: Tensor, dlast: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None,
    tail: Tensor | None, silu: bool, ages: Tensor | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of :func:`forward`'s x, weight, bias and tail, None for one that is None; ``dy`` is
    y's (B, L, D), ``dlast`` that of the tail it returned, or None."""
    x, dx = _unit(x), _empty_like(x)
    weight, bias, tail, ages = _packed(weight, bias, tail, ages)  # type: ignore[assignment]
    dweight = torch.zeros_like(weight)
    dtail, dbias = (None if t is None else torch.zeros_like(t) for t in (tail, bias))
    _call("backward", x, weight, bias, tail, silu, ages, None, _unit(dy), dx, dtail, dweight,
          dbias)
    if dlast is not None:
        dlast = of_document(dlast, ages)
        length, before = x.shape[1], weight.shape[1] - 1
        own = min(length, before)  # rows of the next tail that are x's; the others are the tail's
        dx[:, length - own :] += dlast[:, before - own :]
        if dtail is not None and own < before:
            dtail[:, own:] += dlast[:, : before - own]
    return dx, dweight, dbias, dtail
