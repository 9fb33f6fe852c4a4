"""The residual block around a sequence mixer, its norms and its MLP."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mambabyte.config import ModelConfig
from mambabyte.model.mixer import LayerState, Mixer


class MLP(nn.Module):
    """Two linear maps around an activation; "relu2" is the square of a ReLU (So et al. 2021,
    arXiv:2109.08668)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.mlp_activation
        self.up_proj = nn.Linear(config.d_model, config.mlp_hidden, bias=False)
        self.out_proj = nn.Linear(config.mlp_hidden, config.d_model, bias=False)
        if config.zero_init_out:
            nn.init.zeros_(self.out_proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_model) -> (..., d_model)."""
        x = self.up_proj(x)
        if self.activation == "relu2":
            return self.out_proj(F.relu(x).square())
        return self.out_proj(F.gelu(x) if self.activation == "gelu" else F.silu(x))


def make_norm(config: ModelConfig) -> nn.Module:
    """The norm that ``config`` names, over d_model channels."""
    eps = config.norm_eps
    if config.norm == "layer":
        return nn.LayerNorm(config.d_model, 1e-5 if eps is None else eps)
    return nn.RMSNorm(config.d_model, eps=eps, elementwise_affine=config.norm == "rms")


class Block(nn.Module):
    """Pre-norm residual block: ``x + mixer(norm(x))``, then the same around an MLP if any."""

    def __init__(self, config: ModelConfig, mixer: type[Mixer]) -> None:
        super().__init__()
        self.norm = make_norm(config)
        self.mixer = mixer(config)
        self.mlp_norm = make_norm(config) if config.mlp_hidden else None
        self.mlp = MLP(config) if config.mlp_hidden else None

    def forward(self, x: Tensor, state: LayerState | None) -> tuple[Tensor, LayerState]:
        """x (B, L, d_model) after the mixer's ``state``: the same shape, and its next state."""
        y, state = self.mixer(self.norm(x), state)
        x = x + y
        if self.mlp is not None and self.mlp_norm is not None:
            x = x + self.mlp(self.mlp_norm(x))
        return x, state
