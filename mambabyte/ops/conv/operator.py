"""The causal depthwise convolution with SiLU as one operator, ``torch.ops.mambabyte.causal_conv``.

In the model's own layout (batch, length, channels), on the CPU (``cpu.py``) and on NVIDIA GPUs
(``cuda.py``): it replaces a transpose, ``conv1d``, a transpose back and SiLU.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambabyte.errors import UserError
from mambabyte.ops.arguments import check_tensors
from mambabyte.ops.conv.cpu import of_document
from mambabyte.ops.library import Tensors, define

__all__ = ["DTYPES", "TAPS", "fused_causal_conv", "torch_causal_conv"]

TAPS = range(2, 9)
DTYPES = {
    "cuda": (torch.bfloat16, torch.float16, torch.float32),
    "cpu": (torch.float32, torch.float64),
}


def fused_causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, tail: Tensor | None = None,
    silu: bool = True, ages: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``silu(bias + sum_k weight_k x_{t-K+1+k})``; positions before x come from ``tail``.

    Shapes: x (B, L, D) of any strides; weight (D, K), K from 2 to 8; bias (D,); tail (B, K-1, D),
    zero when None; ages (B, L) as of ``document_ages``. x is float32, on a GPU bfloat16 or float16
    too, on the CPU float64 too; weight and bias are taken in float32, beside a float64 x in
    float64. Returns y (B, L, D) and the tail to carry on with, both in x's dtype.
    Gradients flow to all inputs and through both results, in a fixed order of sums: bit-equal on
    repetition and for any number of threads.

    Raises UserError for shapes, dtypes or devices that do not fit.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return _conv(x, _in(wide, weight), _in(wide, bias), _in(x.dtype, tail), ages, silu)


def _in(dtype: torch.dtype, tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def torch_causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, silu: bool,
    ages: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same with torch's convolution, which wants (B, D, L); any number of taps."""
    length, taps = x.shape[1], weight.shape[1]
    if tail is None:
        tail = x.new_zeros(x.shape[0], taps - 1, x.shape[2])
    padded = torch.cat([tail.to(x.dtype), x], dim=1)  # (B, K-1+L, D)
    if ages is None:
        y = F.conv1d(padded.transpose(1, 2), weight.unsqueeze(1), bias, groups=x.shape[2])
        y = y.transpose(1, 2)
    else:  # tap by tap, each where its input is of the step's own document
        y = x.new_zeros(()) if bias is None else bias
        for back in range(taps):
            here = padded[:, taps - 1 - back : taps - 1 - back + length]
            here = here.masked_fill((ages < back)[..., None], 0) if back else here
            y = y + weight[:, taps - 1 - back] * here
    # A copy: a view would keep the whole padded sequence alive as long as the tail.
    return F.silu(y) if silu else y, of_document(padded[:, length:].clone(), ages)


# -------------------------------------------------------------------------------------- operator


@functools.cache
def _kernels(device_type: str) -> ModuleType:
    """The module with forward and backward; loaded only where it is needed."""
    if device_type == "cpu":
        from mambabyte.ops.conv import cpu

        return cpu
    from mambabyte.ops.conv import cuda

    return cuda


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, ages: Tensor | None,
    silu: bool,
) -> None:
    if x.ndim != 3 or not x.shape[1] * x.shape[2]:
        raise UserError(f"x has shape {tuple(x.shape)}: expected (batch, length, channels), the "
                        "last two at least 1")
    batch, _, channels = x.shape
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.shape[1] not in TAPS:
        shape = tuple(weight.shape) if isinstance(weight, Tensor) else None
        raise UserError(f"weight has shape {shape}: expected ({channels}, K), K {TAPS[0]} to "
                        f"{TAPS[-1]}")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    check_tensors("x", x, None, DTYPES[x.device.type], (
        ("weight", weight, (channels, weight.shape[1]), wide),
        ("bias?", bias, (channels,), wide),
        ("tail?", tail, (batch, weight.shape[1] - 1, channels), x.dtype),
        ("ages?", ages, x.shape[:2], torch.uint8),
    ))  # fmt: skip


def _check_backward(
    dy: Tensor, dlast: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None,
    tail: Tensor | None, ages: Tensor | None, silu: bool,
) -> None:  # fmt: skip
    _check(x, weight, bias, tail, ages, silu)
    batch, _, channels = x.shape
    check_tensors("x", x, None, DTYPES[x.device.type], (
        ("dy", dy, x.shape, x.dtype),
        ("dlast?", dlast, (batch, weight.shape[1] - 1, channels), x.dtype),
    ))  # fmt: skip


def _shapes(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, ages: Tensor | None,
    silu: bool,
) -> Tensors:
    batch, _, channels = x.shape
    return x.new_empty(x.shape), x.new_empty(batch, weight.shape[1] - 1, channels)


def _forward_on(device_type: str) -> Any:
    def forward(*args: Any) -> Tensors:
        *inputs, ages, silu = args
        return _kernels(device_type).forward(*inputs, silu, ages=ages)

    return forward


def _backward_on(device_type: str) -> Any:
    def backward(*args: Any) -> tuple[Tensor | None, ...]:
        *inputs, ages, silu = args
        return *_kernels(device_type).backward(*inputs, silu, ages=ages), None

    return backward


def _in_torch(*args: Any) -> tuple[Tensor, Tensor]:
    x, weight, bias, tail, ages, silu = args
    return torch_causal_conv(x, weight, bias, tail, silu, ages)


_conv = define(
    "causal_conv",
    "Tensor x, Tensor weight, Tensor? bias, Tensor? tail, Tensor? ages",
    "y, last",
    flags="bool silu",
    forward={device: _forward_on(device) for device in DTYPES},
    backward={device: _backward_on(device) for device in DTYPES},
    check=_check,
    check_backward=_check_backward,
    shapes=_shapes,
    in_torch=_in_torch,
    cast={"cuda": ("x", "tail")},
)
