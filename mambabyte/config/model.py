"""What a model is: a frozen dataclass, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mambabyte.config.architecture import Architecture
from mambabyte.config.checks import at_least_zero
from mambabyte.config.mixers import SPECS, letters_in_words, spec_of, uses_scan_form
from mambabyte.config.scan_forms import FORMS
from mambabyte.errors import UserError


@dataclass(frozen=True)
class ModelConfig(Architecture):
    """An architecture that can be built, and its parameters counted.

    Raises UserError where a field is out of its range or does not fit a mixer of the pattern.
    """

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
