"""The residual block around a sequence mixer, its norms and its MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambabyte.config import ModelConfig
from mambabyte.model.mixer import LayerState, Mixer, linear
from mambabyte.ops.fused.activation import activate_in_torch


class RMSNorm(nn.RMSNorm):
    """Takes its gains in the type of what it normalises, such as a residual stream in bf16."""

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


class MLP(nn.Module):
    """Two linear maps around an activation; "relu2" is the square of a ReLU (So et al. 2021,
    arXiv:2109.08668)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.mlp_activation
        self.up_proj = linear(config, config.d_model, config.mlp_hidden)
        self.out_proj = linear(config, config.mlp_hidden, config.d_model)
        if config.zero_init_out:
            nn.init.zeros_(self.out_proj.weight)

    def forward(
        self, x: Tensor, activate: Callable[[Tensor, str], Tensor] = activate_in_torch
    ) -> Tensor:
        """x (..., d_model) -> (..., d_model); ``activate(hidden, name)`` is the activation."""
        return cast(Tensor, self.out_proj(activate(self.up_proj(x), self.activation)))


def make_norm(config: ModelConfig) -> nn.Module:
    """The norm that ``config`` names, over d_model channels."""
    eps = config.norm_eps
    if config.norm == "layer":
        return nn.LayerNorm(config.d_model, 1e-5 if eps is None else eps)
    return RMSNorm(config.d_model, eps=eps, elementwise_affine=config.norm == "rms")


def _gain(config: ModelConfig, start: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.full((config.d_model,), start))


class Block(nn.Module):
    """Pre-norm residual block: ``x + mixer(norm(x))``, then the same around an MLP if any.

    Where ``config`` says so, each branch has a gain a channel, and x is first mixed with the
    embedded bytes (as in github.com/KellerJordan/modded-nanogpt). ``has_skip``: the layer adds
    what an earlier one put out, times a gain (U-Net, Ronneberger et al. 2015, arXiv:1505.04597);
    ``is_kept``: what this one puts out is for such a layer too.
    """

    def __init__(
        self, config: ModelConfig, mixer: type[Mixer], has_skip: bool = False,
        is_kept: bool = False,
    ) -> None:
        super().__init__()
        self.is_kept = is_kept
        self.skip_gain = _gain(config) if has_skip else None
        mixed, scaled = config.residual_mix, config.block_scales
        self.stream_gain = _gain(config) if mixed else None
        self.embedded_gain = _gain(config, 0.0) if mixed else None
        self.mixer_gain = _gain(config) if scaled else None
        self.mlp_gain = _gain(config) if scaled and config.mlp_hidden else None
        self.norm = make_norm(config)
        self.mixer = mixer(config)
        self.mlp_norm = make_norm(config) if config.mlp_hidden else None
        self.mlp = MLP(config) if config.mlp_hidden else None

    def forward(
        self, x: Tensor, state: LayerState | None, embedded: Tensor | None = None,
        skip: Tensor | None = None, ages: Tensor | None = None,
    ) -> tuple[Tensor, LayerState]:
        """x (B, L, d_model) after the mixer's ``state``: the same shape, and its next state.

        ``embedded`` and ``skip``, of x's shape, where the layer reads them; ``ages`` as in
        :meth:`Mixer.forward`."""
        if self.skip_gain is not None:
            assert skip is not None
            x = x + (self.skip_gain * skip).to(x.dtype)
        if self.stream_gain is not None and self.embedded_gain is not None:
            assert embedded is not None
            x = (self.stream_gain * x + self.embedded_gain * embedded).to(x.dtype)
        # (A mixer that knows no documents does without where there are none.)
        y, state = self.mixer(self.norm(x), state, *() if ages is None else (ages,))
        x = x + _scaled(y, self.mixer_gain, x)
        if self.mlp is not None and self.mlp_norm is not None:
            x = x + _scaled(self.mlp(self.mlp_norm(x)), self.mlp_gain, x)
        return x, state


def _scaled(y: Tensor, gain: Tensor | None, stream: Tensor) -> Tensor:
    """What a branch adds to ``stream``; the gain is no reason for a stream in bf16 to widen."""
    return y if gain is None else (gain * y).to(stream.dtype)
