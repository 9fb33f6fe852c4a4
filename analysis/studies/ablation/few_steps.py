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
from torch import nn

from analysis.studies.ablation.tokens import Pieces, encode_corpus, score_stream
from analysis.studies.ablation.variants import build, get_variant, make_optimizers, round_weights
from mambabyte.config import ModelConfig, TrainConfig
from mambabyte.corpus import Corpus, sample_windows
from mambabyte.errors import UserError
from mambabyte.train import autocast


def few_steps(
    systems: dict[str, ModelConfig], pieces: Pieces, corpus: Corpus, *, steps: int,
    tokens_per_step: int, context: int = 1024, micro_batch: int = 16, train_bytes: int,
    valid_bytes: int = 100_000, seed: int = 0, device: str = "cpu", variant: str = "published",
    report: Callable[[str], None] = lambda line: None,
) -> pd.DataFrame:
    """Bits per raw byte before and after each of ``steps`` steps, one row a system and step.

    A step is ``tokens_per_step`` tokens in windows of ``context``, rounded down to whole
    micro-batches, and at least one. Raises UserError for fewer than one step.
    """
    if steps < 1:
        raise UserError(f"{steps} steps: give at least 1")
    text = encode_corpus(pieces, corpus, train_bytes, valid_bytes)
    micro = max(1, tokens_per_step // (micro_batch * context))
    choices = get_variant(variant)
    recipe = TrainConfig(context=context, batch_size=micro_batch, seed=seed)
    rows = []
    for name, config in systems.items():
        given = {**vars(config), "vocab_size": pieces.size}
        model = build(ModelConfig(**given), choices, seed, device)
        optimizers = make_optimizers(model, choices, recipe)
        for step in range(steps + 1):
            if step:
                for optimizer in optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = group["peak"]
                    optimizer.zero_grad(set_to_none=True)
                for i in range(micro):
                    tokens = sample_windows(text.ids, context, micro_batch, seed, step * micro + i)
                    with autocast(torch.device(device), recipe.precision):
                        loss = model.loss(tokens.to(device))
                    (loss / micro).backward()
                nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip)
                for optimizer in optimizers:
                    optimizer.step()
                if choices.bf16_weights:
                    round_weights(model)
            bits = score_stream(model, text.held, len(text.held_bytes), device)
            rows.append({
                "system": name, "layers": config.layers, "n_parameters": model.config.n_parameters,
                "step": step, "tokens": step * micro * micro_batch * context,
                "bits_per_raw_byte": bits,
            })
            report(f"{name} step {step} of {steps}: {bits:.3f} bits per raw byte")
    return pd.DataFrame(rows)
