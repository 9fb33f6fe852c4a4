"""The numbers that make a model, and those that follow from them: what a mixer's entry is told.

Below both mambabyte.config.mixers, which reads them, and mambabyte.config.model, which checks them
by the mixers' entries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Architecture:
    """Shape of a byte-level language model, as it was written down: ModelConfig checks it.

    ``layer_pattern`` is cycled over ``n_layer``: "M" is a pure SSM, "MMMA" three SSM layers to
    one attention layer. Letters: M Mamba, S Mamba-2, D Gated DeltaNet, K Kimi Delta Attention, A
    attention, L local attention. Names follow the Mamba code: d_model, d_inner, d_state, d_conv,
    expand, dt_rank.
    """

    vocab_size: int = 256
    d_model: int = 192
    n_layer: int = 4
    layer_pattern: str = "M"
    # "rms_plain" is an RMS norm without weights.
    norm: Literal["layer", "rms", "rms_plain"] = "layer"
    # Added to the variance or mean square; None is torch's own: 1e-5, or the dtype's epsilon.
    norm_eps: float | None = None

    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    # "auto" is ceil(d_model / 16); "full" projects the step size from all d_inner channels.
    dt_rank: int | Literal["auto", "full"] = "auto"
    # "mamba" draws softplus(bias) log-uniformly from [dt_min, dt_max]; "linear" is torch's default.
    dt_init: Literal["mamba", "linear"] = "mamba"
    dt_min: float = 1e-3
    dt_max: float = 1e-1

    # Mamba-2: channels and states of a head, and how many groups of heads share B and C.
    ssd_head_dim: int = 64
    ssd_d_state: int = 64
    ssd_groups: int = 1
    # Delta rule: key channels of a head, d_model / delta_head_dim heads, value channels a key's.
    delta_head_dim: int = 64
    delta_expand_v: int = 1

    n_head: int = 6
    n_kv_head: int = 6
    qk_norm: bool = False
    rope_base: float = 10000.0
    # Share of the rotary frequencies that turn; the rest, the slowest, are 0.
    rope_fraction: float = 1.0
    # How many bytes back attention looks, itself included, in training and in streaming: the cache
    # never grows past it. A context above it is trained with local attention; for attention over
    # all of a context, give at least the context.
    attention_window: int = 1024
    # The same of the layers of local attention, "L".
    local_window: int = 128

    # Hidden width of the MLP of every block as a multiple of d_model; 0 means no MLP.
    mlp_ratio: float = 0.0
    mlp_activation: Literal["relu2", "gelu", "silu"] = "relu2"

    embed_std: float = 0.02
    # Whether the embedding is normalised before the first layer, and is the head as well.
    embed_norm: bool = False
    tied_head: bool = True
    zero_init_out: bool = False
    logit_softcap: float = 0.0

    # Which form of the scan computes the SSM layers; see mambabyte.ops.FORMS.
    scan_form: str = "auto"
    scan_chunk: int | None = None

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
