"""The numbers that make a model, and those that follow from them: what a mixer's entry is told.

Below both mambabyte.config.mixers, which reads them, and mambabyte.config.model, which checks them
by the mixers' entries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from mambabyte.config.checks import (
    Checked,
    Count,
    Layers,
    NotNegative,
    Positive,
    above,
    between,
)
from mambabyte.config.scan_forms import FormOrAuto


@dataclass(frozen=True)
class Architecture(Checked):
    """Shape of a byte-level language model, field by field; ModelConfig checks that they fit.

    Names follow the Mamba code: d_model, d_inner, d_state, d_conv, expand, dt_rank.
    """

    vocab_size: Count = 256
    """Symbols that the model reads and predicts; bytes are 256."""
    d_model: Count = 192
    """Width of the residual stream."""
    n_layer: Layers = 4
    """Number of layers."""
    layer_pattern: str = "M"
    """Mixers, a letter a layer, cycled over n_layer: MMMA is three SSM layers to one of attention.
    M Mamba, S Mamba-2, R Mamba-3, D Gated DeltaNet, K Kimi Delta Attention, A attention, L local
    attention."""
    norm: Literal["layer", "rms", "rms_plain"] = "layer"
    """Norm before every mixer and MLP; rms_plain is an RMS norm without weights."""
    norm_eps: NotNegative | None = None
    """Added to the variance or mean square; none is torch's own: 1e-5, or the dtype's epsilon."""

    d_state: Count = 16
    """States of a channel of Mamba."""
    d_conv: Count = 4
    """Taps of the causal convolution."""
    expand: Count = 2
    """d_inner, the channels inside a Mamba layer, as a multiple of d_model."""
    dt_rank: Count | Literal["auto", "full"] = "auto"
    """Rank of the step-size projection: auto is ceil(d_model / 16), full takes all of d_inner."""
    dt_init: Literal["mamba", "linear"] = "mamba"
    """How step sizes start: mamba draws softplus(bias) log-uniformly from [dt_min, dt_max], linear
    is torch's default."""
    dt_min: Positive = 1e-3
    """Smallest step size at the start."""
    dt_max: Positive = 1e-1
    """Largest step size at the start."""

    ssm_bias: bool = False
    """Biases in the projections into and out of Mamba and Mamba-2."""
    ssd_head_dim: Count = 64
    """Channels of a head of Mamba-2 and Mamba-3."""
    ssd_d_state: Count = 64
    """States of a head of Mamba-2 and Mamba-3."""
    ssd_groups: Count = 1
    """Groups of heads of Mamba-2 and Mamba-3 that share B and C."""
    ssd_norm_eps: NotNegative = 1e-5
    """Added to the mean square in Mamba-2's gated norm."""
    ssd_rope_fraction: Annotated[float, above(0, 1)] = 0.5
    """Share of the states of Mamba-3 that turn, in pairs."""
    delta_head_dim: Count = 64
    """Key channels of a head of the delta rule, whose heads are d_model / delta_head_dim."""
    delta_expand_v: Count = 1
    """Value channels of the delta rule as a multiple of its key channels."""

    n_head: Count = 6
    """Heads of attention."""
    n_kv_head: Count = 6
    """Heads of keys and values; fewer than n_head share them."""
    qk_norm: bool = False
    """Normalise queries and keys."""
    qk_gain: NotNegative = 0.0
    """Where a learned gain a head on the rotated queries starts; 0 is no gain."""
    rope_base: Positive = 10000.0
    """Base of the rotary frequencies."""
    rope_fraction: Annotated[float, above(0, 1)] = 1.0
    """Share of the rotary frequencies that turn; the rest, the slowest, are 0."""
    attention_window: Count = 1024
    """How many bytes back attention looks, itself included, in training and in streaming: the cache
    never grows past it. A context above it is trained with local attention."""
    local_window: Count = 128
    """The same of the layers of local attention, L."""

    mlp_ratio: Annotated[float, between(0, 10_000)] = 0.0
    """Hidden width of every block's MLP as a multiple of d_model; 0 is no MLP."""
    mlp_activation: Literal["relu2", "gelu", "silu"] = "relu2"
    """Activation of the MLP; relu2 is a squared ReLU."""

    embed_std: NotNegative = 0.02
    """Standard deviation of the embedding at the start."""
    embed_norm: bool = False
    """Normalise the embedding before the first layer, by its RMS."""
    embed_norm_gain: bool = False
    """Give that norm weights."""
    tied_head: bool = True
    """Use the embedding as the head as well."""
    zero_init_out: bool = False
    """Start the output projections at zero."""
    logit_softcap: NotNegative = 0.0
    """Cap the logits smoothly at this value; 0 does not."""

    linear_bias: bool = False
    """Biases in attention's projections, in MLPs and in a head of its own."""
    block_scales: bool = False
    """A gain a channel, from 1, on what each mixer and MLP adds to the residual stream."""
    residual_mix: bool = False
    """Before each layer: gains a channel, from 1 and 0, times the stream and the embedded bytes."""
    unet_skips: bool = False
    """Layers of the second half add what those of the first put out, last to first, times a gain a
    channel, from 1."""

    scan_form: FormOrAuto = "auto"
    """Form of the scan of the Mamba layers; auto is the fused one where its kernels run."""
    scan_chunk: Count | None = None
    """Steps of a chunk of the scan; none is the form's own."""

    @property
    def layers(self) -> str:
        """One letter a layer: the pattern cycled over n_layer."""
        repeats = -(-self.n_layer // len(self.layer_pattern))
        return (self.layer_pattern * repeats)[: self.n_layer]

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_head

    @property
    def dt_rank_value(self) -> int:
        """Width of the step-size projection's input: R, or d_inner when it is "full"."""
        if self.dt_rank == "auto":
            return math.ceil(self.d_model / 16)
        return self.d_inner if self.dt_rank == "full" else int(self.dt_rank)

    @property
    def mlp_hidden(self) -> int:
        return round(self.mlp_ratio * self.d_model)

    @property
    def skips(self) -> tuple[int | None, ...]:
        """For each layer the one whose output it adds to its input, or None."""
        half = self.n_layer // 2 if self.unet_skips else 0
        return tuple(2 * half - 1 - i if half <= i < 2 * half else None
                     for i in range(self.n_layer))

    @property
    def has_extras(self) -> bool:
        """Whether there are parts that the kernels which stream a whole model do not compute."""
        return bool(self.qk_gain or self.embed_norm_gain or self.linear_bias or self.block_scales
                    or self.residual_mix or self.unet_skips or self.ssm_bias
                    or self.ssd_norm_eps != 1e-5)
