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
