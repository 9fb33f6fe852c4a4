"""What a model is: a frozen dataclass, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mambabyte.config.checks import at_least_zero
from mambabyte.config.mixers import SPECS, letters_in_words, spec_of, uses_scan_form
from mambabyte.config.scan_forms import FORMS
from mambabyte.errors import UserError


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a byte-level language model.

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

    def __post_init__(self) -> None:
        if not self.layer_pattern or set(self.layer_pattern) - SPECS.keys():
            raise UserError(
                f"layer_pattern is {self.layer_pattern!r}: write one letter a layer, at least one "
                f"of {letters_in_words()}, e.g. MMMA")
        for name in ("vocab_size", "d_model", "n_layer", "d_state", "d_conv", "expand",
                     "ssd_head_dim", "ssd_d_state", "ssd_groups", "delta_head_dim",
                     "delta_expand_v", "n_head", "n_kv_head", "attention_window", "local_window"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("mlp_ratio", "embed_std", "logit_softcap"):
            at_least_zero(name, getattr(self, name))
        if self.norm_eps is not None:
            at_least_zero("norm_eps", self.norm_eps)
        if not (math.isfinite(self.rope_base) and self.rope_base > 0):
            raise UserError(f"rope_base is {self.rope_base}: it must be a finite number above 0")
        if self.scan_chunk is not None and self.scan_chunk < 1:
            raise UserError(f"scan_chunk is {self.scan_chunk}: it must be at least 1, or None for "
                            "the form's own")
        if isinstance(self.dt_rank, int) and self.dt_rank < 1:
            raise UserError(f"dt_rank is {self.dt_rank}: give a positive rank, 'auto' or 'full'")
        if not 0 < self.dt_min <= self.dt_max < math.inf:
            raise UserError(f"dt_min {self.dt_min} and dt_max {self.dt_max}: they must be finite, "
                            "with 0 < dt_min <= dt_max")
        if not 0 < self.rope_fraction <= 1:
            raise UserError(f"rope_fraction is {self.rope_fraction}: it must be in (0, 1]")
        for letter in dict.fromkeys(self.layers):
            spec_of(letter).check(self)
        if self.scan_form != "auto" and self.scan_form not in FORMS:
            raise UserError(
                f"scan_form {self.scan_form!r} is unknown: choose auto, {', '.join(FORMS)}"
            )

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
    def uses_scan_form(self) -> bool:
        """Whether any layer has a scan whose form can be chosen."""
        return uses_scan_form(self.layers)

    def parameter_groups(self) -> dict[str, int]:
        """Exact parameter counts by role; a tied head counts once, as embedding."""
        d = self.d_model
        per_norm = {"layer": 2 * d, "rms": d, "rms_plain": 0}[self.norm]
        norms = self.n_layer * (2 if self.mlp_hidden else 1) + 1
        mixers: dict[str, int] = {}
        for letter in sorted(set(self.layers), key=list(SPECS).index):
            spec = spec_of(letter)
            for name, shape in spec.shapes(self).items():
                group = spec.group(name)
                mixers[group] = mixers.get(group, 0) + (
                    self.layers.count(letter) * math.prod(shape))
        return {
            "embedding": self.vocab_size * d,
            **({} if self.tied_head else {"head": self.vocab_size * d}),
            **mixers,
            "mlp": self.n_layer * 2 * d * self.mlp_hidden,
            "norm": norms * per_norm,
        }

    @property
    def n_parameters(self) -> int:
        return sum(self.parameter_groups().values())
