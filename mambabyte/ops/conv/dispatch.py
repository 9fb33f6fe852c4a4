"""Depthwise causal convolution with a carried tail: the same function at every length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mambabyte.errors import UserError
from mambabyte.ops.arguments import FLOATS, ages_of, autocasts, check_flag, check_tensors
from mambabyte.ops.conv import cpu
from mambabyte.ops.conv.operator import (
    DTYPES,
    TAPS,
    fused_causal_conv,
    torch_causal_conv,
)
from mambabyte.ops.scan.operator import fused_available

FUSED_TAPS = TAPS


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None = None, silu: bool = False,
    document_starts: Tensor | Sequence[int] | None = None, ages: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``y_t = bias + sum_k weight_k x_{t-K+1+k}``, where positions before x come from ``tail``.

    Shapes: x (B, L, D); weight (D, K); bias (D,); tail (B, K-1, D), zero when None, the last
    inputs of what came before; ``silu`` applies SiLU to y. Returns y (B, L, D) and the tail to
    carry on with, in x's dtype. On a GPU one kernel does it all in this layout, on a CPU a function
    in C; torch's convolution, which wants (B, D, L), is what there is without them. Gradients flow
    to all inputs and through both results.

    ``document_starts`` says where documents begin that lie one behind another in a row: before its
    first input each finds zeros; see ``document_ages`` of mambabyte.ops.arguments; ``ages`` say the
    same. The tail that comes back has the inputs of the last, with zeros before them.

    Raises UserError for shapes that do not fit.
    """
    check_flag("silu", silu)
    for name, tensor, dims in (("x", x, 3), ("weight", weight, 2)):
        check_tensors(name, tensor, None, FLOATS)
        if tensor.ndim != dims or 0 in tensor.shape[1:]:
            raise UserError(f"{name} has shape {tuple(tensor.shape)}: expected x (batch, length, "
                            "channels) and weight (channels, taps), none but the batch of 0")
    batch, _, channels = x.shape
    check_tensors("x", x, None, FLOATS, (
        ("weight", weight, (channels, weight.shape[1]), None),
        ("bias?", bias, (channels,), None),
        ("tail?", tail, (batch, weight.shape[1] - 1, channels), None),
    ))  # fmt: skip
    ages = ages_of(document_starts, ages, x)
    if fits(x, weight, bias):
        return fused_causal_conv(x, weight, bias, tail, silu, ages)
    if autocasts(x.device):
        return torch_causal_conv(x, weight, bias, tail, silu, ages)
    # torch's convolution takes one dtype: the widest that is given.
    wide = torch.promote_types(x.dtype, weight.dtype)
    wide = wide if bias is None else torch.promote_types(wide, bias.dtype)
    y, last = torch_causal_conv(
        x.to(wide), weight.to(wide), None if bias is None else bias.to(wide), tail, silu, ages)
    return y.to(x.dtype), last.to(x.dtype)


def fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a kernel of ours takes these; on the CPU under autocast, torch's own does."""
    device, dtype = x.device.type, x.dtype
    if _only_torch or dtype not in DTYPES.get(device, ()) or weight.shape[-1] not in TAPS:
        return False
    if device == "cuda":
        return fused_available(x.device)[0]
    return (weight.dtype == dtype and (bias is None or bias.dtype == dtype)
            and not torch.is_autocast_enabled("cpu") and cpu.available(dtype))


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
