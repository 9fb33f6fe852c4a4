"""Every registered mixer under strong decay: its exponents, and the errors of its own operator.

The exponent is what a cumulated sum of log-decays over a chunk would take the exponential of. It
bounds the chunk of every form that divides by a cumulated decay. With one decay a head the decays
between two steps are a small matrix and need no division; with one a channel they are not, and
kernels that divide take short chunks. The operators of this package multiply decays in [0, 1] and
have no bound (mambabyte.ops.ssd.decay): the errors here say whether that holds.
"""

from __future__ import annotations

import math

import pandas as pd
import torch

from analysis.measure.exponents import CHUNK
from analysis.studies.overflow import Grid
from analysis.theory.bounds import log_max
from analysis.theory.sizes import at_size
from mambabyte.config import PRESETS, SPECS
from mambabyte.config.mixers import kind_of
from mambabyte.model.mixer import mixer_of
from mambabyte.ops.compare import relative_rms

D_MODEL, HEADS, BATCH = 32, 2, 2
SCALES = (1.0, 10.0, 100.0)  # of the mixer's input: the step sizes and decays grow with it


def mixer_frame(p: Grid) -> pd.DataFrame:
    """A row a mixer with decays and scale of its input; errors are relative RMS, the worst of the
    tensors.

    Under bf16 autocast what the operator is given is rounded, the same for it and the definition.
    """
    generator = torch.Generator().manual_seed(p.seed)
    x = torch.randn(BATCH, p.length, D_MODEL, generator=generator)
    rows = []
    for letter in SPECS:
        config = at_size(PRESETS["mamba_byte"].model, D_MODEL, 1, HEADS, layer_pattern=letter)
        torch.manual_seed(p.seed)
        mixer = mixer_of(letter)(config)
        for scale in SCALES if mixer.has_decays else ():
            step, chunk = (mixer.exponent(scale * x, None, steps) or 0.0 for steps in (1, CHUNK))
            row: dict[str, object] = {
                "mixer": kind_of(letter), "scale of the input": scale,
                "largest exponent of a step": step, f"largest exponent of {CHUNK} steps": chunk,
                "longest chunk of a cumulated sum, steps": math.floor(log_max() / step)}
            for precision in ("fp32", "bf16"):
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                    compared = mixer.against_definition(scale * x)
                row |= {f"error of the {what}, {precision}": max(
                    relative_rms(found, exact) for found, exact in pairs)
                    for what, pairs in compared.items()}
            rows.append(row)
    return pd.DataFrame(rows)
