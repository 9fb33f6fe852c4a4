"""Step size times decay while a model trains, and what a bound on the step size costs.

A cumulated sum over CHUNK steps overflows float32 where the exponent of a channel, the sum of its
step sizes times its fastest decay, passes ln of the largest float32. The bound holds every step
size below the one that would reach that in CHUNK steps.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.measure.exponents import CHUNK, ssm_layers, step_sizes
from analysis.studies.ablation.learning import (
    captured_text_step,
    heldout_bits,
    heldout_windows,
)
from analysis.studies.arena import Parameters
from analysis.studies.arena.trainings.plan import Cell
from analysis.studies.arena.trainings.text import config_of, open_corpus, recipe_of
from analysis.theory.bounds import log_max
from mambabyte.config.provenance import commit
from mambabyte.model import ByteLM, MambaMixer
from mambabyte.model.families.shared import inverse_softplus
from mambabyte.train import autocast, optimise, text_step
from mambabyte.train.schedule import learning_rate, schedule

BOUNDED = " bounded"  # behind a system's name
LOOKS = 24
QUANTILES = (0.5, 0.9, 0.99, 0.999)
FITTED_SHARE = 0.5  # of the training, of which the onset is predicted


class BoundedMixer(MambaMixer):
    """A Mamba mixer whose step sizes end at what its fastest decay may have for CHUNK steps."""

    def scan_inputs(
        self, x: Tensor, conv_state: Tensor | None, ages: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        u, delta, B, C, z, conv_state = super().scan_inputs(x, conv_state, ages)
        fastest = self.A_log.detach().float().exp().amax(-1)  # (D,)
        bound = inverse_softplus(log_max() / CHUNK / fastest)
        bias = self.dt_bias
        limit = bound if bias is None else bound - bias.float()
        most = limit.to(delta.dtype)  # which may round up, past the bound
        most = torch.where(most.float() > limit, most - most.abs() * torch.finfo(most.dtype).eps,
                           most)
        return u, torch.minimum(delta, most), B, C, z, conv_state


def train_followed(p: Parameters, cell: Cell, device: str) -> dict[str, Any]:
    """The row of a training of Mamba-1 that is looked at LOOKS times, with or without the bound."""
    system, bounded = cell.system.removesuffix(BOUNDED), cell.system.endswith(BOUNDED)
    corpus, text, held = open_corpus(p.corpus)
    recipe = recipe_of(p, cell)
    torch.manual_seed(cell.seed)
    model = ByteLM(config_of(p, system, cell.size),
                   {"M": BoundedMixer} if bounded else None).to(device)
    on_gpu = device.startswith("cuda")
    step = (captured_text_step if on_gpu else text_step)(model, text, recipe)
    windows = heldout_windows(held, p.context, 4)
    every = max(1, recipe.n_steps // LOOKS)
    rows: list[dict[str, Any]] = []

    def look(done: int) -> None:
        if done % every == 0 or done == recipe.n_steps:
            step.read()
            rows.append({"step": done, **exponents(model, windows[:, :-1])})

    rows.append({"step": 0, **exponents(model, windows[:, :-1])})
    optimise(step, partial(schedule, config=recipe), recipe.n_steps, after=look)
    chosen, valid = (heldout_bits(model, heldout_windows(part, p.context, p.heldout_windows))
                     for part in (held, corpus.valid))
    learned = np.cumsum([0.0, *(learning_rate(s, recipe) for s in range(recipe.n_steps))])
    for row in rows:
        row["learned"] = float(learned[row["step"]])
    return {"chosen_by": chosen, "valid_bits": valid, "steps": recipe.n_steps, "followed": rows,
            "commit": commit(), **onset(rows, learned)}


@torch.no_grad()
def exponents(model: ByteLM, tokens: Tensor) -> dict[str, float]:
    """Quantiles over layers, channels, bytes of the exponent of one step, and the largest of CHUNK
    steps, on tokens (B, L)."""
    single, longest = [], 0.0
    with autocast(model.device, "auto"):
        sizes = step_sizes(model, tokens.to(model.device))
    for mixer, dt in zip(ssm_layers(model), sizes, strict=True):
        each = dt.float() * mixer.A_log.float().exp().amax(-1)  # (B, L, D)
        steps = min(CHUNK, each.shape[1])
        chunks = F.pad(each, (0, 0, 0, -each.shape[1] % steps)).unflatten(1, (-1, steps))
        longest = max(longest, float(chunks.sum(2).max()))
        single.append(each.flatten().cpu().double().numpy())
    found = np.quantile(np.concatenate(single), (*QUANTILES, 1.0))
    names = [*(f"q{q:g}" for q in QUANTILES), "largest"]
    return {**{name: float(x) for name, x in zip(names, found, strict=True)},
            "largest_in_chunk": longest}


def onset(rows: list[dict[str, Any]], learned: np.ndarray) -> dict[str, int | None]:
    """The step at which the largest exponent of CHUNK steps passes the bound: seen, and predicted
    by a line over the sum of learning rates through the looks of the first half. None: not by the
    end."""
    bound, last = log_max(), rows[-1]["step"]
    first = [row for row in rows if row["step"] <= FITTED_SHARE * last]
    predicted = None
    if len(first) > 2:
        slope, base = np.polyfit([row["learned"] for row in first],
                                 [row["largest_in_chunk"] for row in first], 1)
        past = np.flatnonzero(base + slope * learned > bound)
        predicted = int(past[0]) if len(past) else None
    seen = next((row["step"] for row in rows if row["largest_in_chunk"] > bound), None)
    return {"onset_seen": seen, "onset_predicted": predicted}


