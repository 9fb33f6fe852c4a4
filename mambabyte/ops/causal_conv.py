"""Depthwise causal convolution with a carried tail: the same function at every length."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor, tail: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``y_t = bias + sum_k weight_k x_{t-K+1+k}``, where positions before x come from ``tail``.

    Shapes: x (B, L, D); weight (D, K); bias (D,); tail (B, K-1, D), zero when None, the last
    inputs of what came before. Returns y (B, L, D) and the tail to carry on with.
    """
    batch, length, channels = x.shape
    taps = weight.shape[1]
    if tail is None:
        tail = x.new_zeros(batch, taps - 1, channels)
    padded = torch.cat([tail.to(x.dtype), x], dim=1)  # (B, K-1+L, D)
    y = F.conv1d(padded.transpose(1, 2), weight.unsqueeze(1), bias, groups=channels)
    return y.transpose(1, 2), padded[:, length:]
