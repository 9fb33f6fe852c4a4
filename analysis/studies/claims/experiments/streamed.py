"""Trained in parallel with the published scan, streamed by the step: what the difference costs.

The published scan computes another recurrence than the step does. Both sides of each comparison
have the same seed, windows and number of steps; the text is prose, the model the first document's,
narrower and shallower (``choices.small_model``).
"""

from __future__ import annotations

import math
from dataclasses import replace

import pandas as pd
import torch

from analysis.studies.claims.experiments.choices import CONTEXT, small_model, trained
from analysis.studies.claims.lab import Lab, Settings, experiment
from mambabyte.corpus import load_corpus, sample_windows
from mambabyte.model import ByteLM

PUBLISHED = "document_chunked"
# The published formula is the same recurrence at any chunk size. In chunks of 32, the document's,
# these trainings overflow after some 200 steps; in chunks of 8 they do not.
CHUNK = 8
COLUMNS = ["seed", "steps", "trained and scored by the exact scan, bits/byte",
           "trained and scored by the published scan, bits/byte",
           "trained by the published scan and streamed, bits/byte",
           "accuracy by the published scan", "accuracy streamed"]


@experiment
def streamed(settings: Settings) -> dict[str, float]:
    """Held-out bits per byte and next-byte accuracy, seed by seed.

    Streamed means scored with the exact scan, whose outputs are those of the step (a test of the
    model says so), over the same windows.
    """
    corpus = load_corpus("stdlib")
    config = small_model()
    found: dict[str, float] = {}
    for seed in range(settings.seed, settings.seed + settings.paired_seeds):
        held_out = sample_windows(corpus.valid, CONTEXT, 64, seed, 1).to(settings.device)
        exact, published = (
            trained(c, corpus, seed, (settings.streamed_steps,), device=settings.device)[0]
            for c in (config, replace(config, scan_form=PUBLISHED, scan_chunk=CHUNK)))
        by_step = ByteLM(config).to(settings.device)
        by_step.load_state_dict(published.state_dict())
        for name, model in (("exact", exact), ("published", published), ("streamed", by_step)):
            bits, accuracy = _held_out(model, held_out)
            found |= {f"{name}_bits_{seed}": bits, f"{name}_accuracy_{seed}": accuracy}
    return found


@torch.no_grad()
def _held_out(model: ByteLM, windows: torch.Tensor) -> tuple[float, float]:
    """Bits per byte and share of bytes that the largest logit names; windows (B, L + 1)."""
    logits, _ = model.eval()(windows[:, :-1])
    right = (logits.argmax(-1) == windows[:, 1:]).float().mean()
    return model.loss(windows).item() / math.log(2), float(right)


def streamed_table(lab: Lab) -> pd.DataFrame:
    """The comparison, one row a seed."""
    first, settings = lab.settings.seed, lab.settings
    rows = [[seed, settings.streamed_steps,
             *(lab[f"streamed.{name}_bits_{seed}"] for name in ("exact", "published", "streamed")),
             *(lab[f"streamed.{name}_accuracy_{seed}"] for name in ("published", "streamed"))]
            for seed in range(first, first + settings.paired_seeds)]
    return pd.DataFrame(rows, columns=COLUMNS)
