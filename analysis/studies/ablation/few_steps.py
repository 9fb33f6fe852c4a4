"""What a handful of large steps can reach: the second document's "about 5 effective steps".

It reports 2.0295 bits per byte for SSM-1 after about five effective steps, and 3.3168 for the
hybrid after 180 s. Here the same systems train on subword pieces with all of the published
choices (analysis.studies.ablation.variants), batches of the published size split into
micro-batches, and the learning rate at its full height throughout, which is more than the published
schedule gives.
"""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import torch
from torch import Tensor

from analysis.studies.ablation import get_variant
from analysis.studies.ablation.tokens import Pieces, encode_corpus, score_stream
from analysis.studies.ablation.variants import build, round_weights, variant_step
from mambabyte.config import ModelConfig, TrainConfig
from mambabyte.corpus import Corpus, sample_windows
from mambabyte.errors import UserError
from mambabyte.model import ByteLM
from mambabyte.train import optimise


def few_steps(
    systems: dict[str, ModelConfig], pieces: Pieces, corpus: Corpus, *, steps: int,
    tokens_per_step: int, context: int = 1024, micro_batch: int = 16, train_bytes: int,
    valid_bytes: int = 100_000, seed: int = 0, device: str = "cpu", variant: str = "published",
    report: Callable[[str], None] = lambda line: None,
) -> pd.DataFrame:
    """Bits per raw byte before and after each of ``steps`` steps, one row a system and step.

    A step is ``tokens_per_step`` tokens in windows of ``context``, rounded down to whole
    micro-batches, and at least one. Raises UserError for fewer than one step, and
    NonFiniteError where a system diverges.
    """
    if steps < 1:
        raise UserError(f"{steps} steps: give at least 1")
    text = encode_corpus(pieces, corpus, train_bytes, valid_bytes)
    micro = max(1, tokens_per_step // (micro_batch * context))
    choices = get_variant(variant)
    recipe = TrainConfig(context=context, batch_size=micro * micro_batch,
                         micro_batches=micro, seed=seed)

    def batch(step: int) -> tuple[Tensor, ...]:
        parts = [sample_windows(text.ids, context, micro_batch, seed, (step + 1) * micro + i)
                 for i in range(micro)]
        return (torch.cat(parts).to(device),)

    rows = []
    for name, config in systems.items():
        given = {**vars(config), "vocab_size": pieces.size}
        model = build(ModelConfig(**given), choices, seed, device)

        def look(done: int, name: str = name, model: ByteLM = model) -> None:
            if done and choices.bf16_weights:
                round_weights(model)
            bits = score_stream(model, text.held, len(text.held_bytes), device)
            rows.append({
                "system": name, "layers": model.config.layers,
                "n_parameters": model.config.n_parameters,
                "step": done, "tokens": done * micro * micro_batch * context,
                "bits_per_raw_byte": bits,
            })
            report(f"{name} step {done} of {steps}: {bits:.3f} bits per raw byte")

        look(0)
        optimise(variant_step(model, choices, recipe, batch), lambda step: 1.0, steps,
                 after=look)
    return pd.DataFrame(rows)
