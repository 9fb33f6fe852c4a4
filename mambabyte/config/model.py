"""What a model is: a frozen dataclass, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mambabyte.config.architecture import Architecture
from mambabyte.config.mixers import SPECS, LayerPattern, spec_of, uses_scan_form
from mambabyte.errors import UserError

MOST_PARAMETERS = 10**13


@dataclass(frozen=True)
class ModelConfig(Architecture):
    """An architecture that can be built, and its parameters counted.

    Raises UserError where a field is out of its range or does not fit a mixer of the pattern.
    """

    layer_pattern: LayerPattern = "M"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dt_min > self.dt_max:
            raise UserError(f"dt_min is {self.dt_min} and dt_max {self.dt_max}: expected "
                            "dt_min <= dt_max")
        if self.embed_norm_gain and not self.embed_norm:
            raise UserError("embed_norm_gain is set without embed_norm: it is that norm's gain")
        for letter in dict.fromkeys(self.layers):
            spec_of(letter).check(self)
        if self.n_parameters > MOST_PARAMETERS:
            raise UserError(f"the model has {self.n_parameters:.1e} parameters, more than any "
                            "machine holds: give smaller sizes")

    @property
    def uses_scan_form(self) -> bool:
        """Whether any layer has a scan whose form can be chosen."""
        return uses_scan_form(self.layers)

    def parameter_groups(self) -> dict[str, int]:
        """Exact parameter counts by role; a tied head counts once, as embedding."""
        d, n, bias = self.d_model, self.n_layer, self.linear_bias
        per_norm = {"layer": 2 * d, "rms": d, "rms_plain": 0}[self.norm]
        branches = n * (2 if self.mlp_hidden else 1)  # mixers and MLPs
        gains = (branches * self.block_scales + 2 * n * self.residual_mix
                 + sum(skip is not None for skip in self.skips))
        mixers: dict[str, int] = {}
        for letter in sorted(set(self.layers), key=list(SPECS).index):
            spec = spec_of(letter)
            for name, shape in spec.shapes(self).items():
                group = spec.group(name)
                mixers[group] = mixers.get(group, 0) + (
                    self.layers.count(letter) * math.prod(shape))
        return {
            "embedding": self.vocab_size * d,
            **({} if self.tied_head else {"head": self.vocab_size * (d + bias)}),
            **mixers,
            "mlp": n * (2 * d * self.mlp_hidden + bias * (self.mlp_hidden + d) * bool(
                self.mlp_hidden)),
            "norm": (branches + 1) * per_norm + self.embed_norm_gain * d,
            **({"residual": gains * d} if gains else {}),
        }

    @property
    def n_parameters(self) -> int:
        return sum(self.parameter_groups().values())
