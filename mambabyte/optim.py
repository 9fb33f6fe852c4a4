"""AdamW groups and the learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from mambabyte.config import TrainConfig


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices, but not to A_log, which is a decay rate.

    One-dimensional parameters (norms, biases, D) are left alone. The embedding, which is the
    head too, and the convolution's taps decay, as in the recipe.
    """
    return parameter.ndim >= 2 and not name.endswith("A_log")


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with decay on the parameters that ``decays`` names. Raises if one is in no group."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if decays(n, p)], "weight_decay": config.weight_decay},
        {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
    ]
    on_cuda = bool(named) and named[0][1].is_cuda
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=1e-8, fused=on_cuda)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up over ``warmup_fraction`` of the steps, then a cosine to zero.

    ``step`` counts from 0. The first step of the published schedule has rate 0 and does nothing;
    here it has 1/warmup of the peak.
    """
    warmup = max(1, int(config.warmup_fraction * config.n_steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.n_steps - warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
