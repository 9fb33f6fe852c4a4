"""What several families share: the step sizes that they begin with, and which convolution runs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mambabyte.config import ModelConfig
from mambabyte.model.mixer import FLOAT32
from mambabyte.ops.conv import cpu as native_conv
from mambabyte.ops.conv.dispatch import FUSED_TAPS


def inverse_softplus(y: Tensor) -> Tensor:
    """x of softplus(x) = y, for y > 0; accurate for small y too."""
    return y + torch.log(-torch.expm1(-y))


def first_dt_bias(config: ModelConfig, size: int) -> Tensor:
    """Bias (size,) in front of the softplus that makes the step sizes of an untrained layer, which
    are log-uniform between ``dt_min`` and ``dt_max`` (Gu & Dao 2023, arXiv:2312.00752, section
    3.6)."""
    low, high = math.log(config.dt_min), math.log(config.dt_max)
    return inverse_softplus(torch.exp(torch.rand(size) * (high - low) + low))


def convolves_in_one_kernel(config: ModelConfig, device: str, itemsize: int) -> bool:
    """Whether the convolution is this package's own, not torch's: see ops.conv.dispatch."""
    if device == "cuda":
        return config.d_conv in FUSED_TAPS
    return (itemsize == FLOAT32 and config.d_conv in FUSED_TAPS
            and native_conv.available(torch.float32))
