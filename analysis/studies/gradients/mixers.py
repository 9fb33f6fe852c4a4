"""Every registered mixer at a boundary: the gradient that its state carries across.

The reference is the mixer in float64, one byte at a time. A loss on the later half of a sequence
reaches the earlier half through the state alone, so its gradient there, of the inputs and of the
weights, shows what a call in one piece and two calls that meet at the boundary make of it, and what
a detached state loses.
"""

from __future__ import annotations

from copy import deepcopy

import pandas as pd
import torch
from torch import Tensor

from analysis.studies.gradients import Scans
from analysis.theory.sizes import at_size
from mambabyte.config import PRESETS, SPECS
from mambabyte.config.mixers import kind_of
from mambabyte.model.mixer import Mixer, detached, mixer_of
from mambabyte.ops.compare import relative_rms

D_MODEL, HEADS, BATCH = 32, 2, 2


def mixer_frame(p: Scans) -> pd.DataFrame:
    """A row a mixer and gradient: relative errors in float32 against byte by byte in float64.

    Sequences of two chunks of ``p.chunk`` steps; the boundary is between them.
    """
    generator = torch.Generator().manual_seed(p.seed)
    x, weight = torch.randn(
        2, BATCH, 2 * p.chunk, D_MODEL, generator=generator, dtype=torch.float64)
    rows = []
    for letter in SPECS:
        config = at_size(PRESETS["mamba_byte"].model, D_MODEL, 1, HEADS, layer_pattern=letter)
        torch.manual_seed(p.seed)
        mixer = mixer_of(letter)(config)
        exact = _gradients(deepcopy(mixer).double(), x, weight, [1] * 2 * p.chunk)
        mixer.to(p.device)
        found = {
            "one call": _gradients(mixer, x, weight, [2 * p.chunk]),
            "two calls": _gradients(mixer, x, weight, [p.chunk] * 2),
            "state detached": _gradients(mixer, x, weight, [p.chunk] * 2, cut=True)}
        for i, name in enumerate(("inputs before the boundary", "weights")):
            rows.append({"mixer": kind_of(letter), "gradient of": name, **{
                how: relative_rms(gradients[i], exact[i]) for how, gradients in found.items()}})
    return pd.DataFrame(rows)


def _gradients(
    mixer: Mixer, x: Tensor, weight: Tensor, pieces: list[int], cut: bool = False
) -> tuple[Tensor, Tensor]:
    """Gradients, of the inputs of the earlier half and of all weights, of a loss on the later half;
    the sequence goes through in ``pieces``, the state between them detached if ``cut``."""
    like = next(mixer.parameters())
    leaf = x.to(like).requires_grad_()
    state, outputs = None, []
    for part in leaf.split(pieces, 1):
        y, state = mixer(part, detached(state) if cut and state is not None else state)
        outputs.append(y)
    half = x.shape[1] // 2
    loss = (torch.cat(outputs, 1) * weight.to(like))[:, half:].sum()
    first, *others = torch.autograd.grad(loss, [leaf, *mixer.parameters()])
    return first[:, :half].cpu(), torch.cat([g.flatten() for g in others]).cpu()
