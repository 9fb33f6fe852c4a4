"""Training the systems on text: equal parameters, the rate of a cell, bits of two texts."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from analysis.studies.ablation.learning import (
    Learned,
    heldout_windows,
    learn_text,
    window_bits,
)
from analysis.studies.arena import SIZES, Parameters, pattern_of
from analysis.studies.arena.trainings.plan import Cell
from analysis.theory.flops import flops_per_byte
from analysis.theory.matching import GPU_WIDTHS, match_parameters
from analysis.theory.sizes import at_size
from analysis.theory.step_memory import state_bytes
from mambabyte.config import ModelConfig, TrainConfig, get_preset
from mambabyte.config.provenance import commit, job
from mambabyte.corpus import Corpus, load_corpus
from mambabyte.errors import NonFiniteError, UserError

HELD_SHARE = 0.02  # of the training text, its end: never trained on, rates are chosen on it
HELD_BYTES = 2_000_000  # and at most this
ADAMW_SHARE = 0.1  # of Muon's rate: what AdamW has for all that is no matrix of a layer


def config_of(
    p: Parameters, system: str, size: str, vocab_size: int = 256
) -> ModelConfig:
    """A system at a size: MLPs bring all of a size to the parameters of the largest mixer alone.
    A larger vocabulary has its embedding besides."""
    pattern, half = pattern_of(system)
    base = _base(p, size)
    layers = base.n_layer // 2 if half else base.n_layer
    multiple = GPU_WIDTHS if p.device.startswith("cuda") else 1
    matched = match_parameters(
        replace(base, layer_pattern=pattern, n_layer=layers), target_parameters(p, size),
        multiple=multiple)
    return replace(matched.config, vocab_size=vocab_size)


def target_parameters(p: Parameters, size: str) -> int:
    """What all systems of a size come near to: those of the largest without MLPs."""
    base = _base(p, size)
    return max(replace(base, layer_pattern=pattern_of(s)[0]).n_parameters for s in p.systems)


def _base(p: Parameters, size: str) -> ModelConfig:
    width, layers, head = SIZES[size]
    return at_size(get_preset("mamba_byte").model, width, layers, width // head,
                   attention_window=p.context)


def recipe_of(p: Parameters, cell: Cell) -> TrainConfig:
    """Cosine to zero after a tenth of warm-up. A cell's rate is AdamW's, or Muon's."""
    muon = cell.optimizer == "muon"
    return replace(
        get_preset("mamba_byte").train, context=p.context, batch_size=p.batch_size,
        n_steps=max(1, cell.budget // (p.context * p.batch_size)), seed=cell.seed,
        optimizer="muon" if muon else "adamw", muon_lr=cell.rate, warmup_fraction=0.1,
        step="fused" if p.device.startswith("cuda") else "eager",
        lr=cell.rate * (ADAMW_SHARE if muon else 1.0))


@cache
def open_corpus(name: str) -> tuple[Corpus, np.ndarray, np.ndarray]:
    """A corpus, what of its training text is trained on, and what rates are chosen on."""
    corpus = load_corpus(name)
    held = min(int(HELD_SHARE * len(corpus.train)), HELD_BYTES)
    return corpus, corpus.train[:-held], corpus.train[-held:]


@cache
def text_id(name: str) -> str:
    """Which text a corpus is: digests of what is trained on, its end held out, and validated."""
    sums = open_corpus(name)[0].digest()
    return "-".join(sums[split][:12] for split in ("train", "valid"))


def train(p: Parameters, cell: Cell, device: str) -> tuple[Learned, dict[str, Any]]:
    """The model of a cell, and its row: cost, and bits per byte of both held-out texts."""
    corpus, text, held = open_corpus(p.corpus)
    if len(held) < 2 * p.context:
        raise UserError(f"corpus {p.corpus}: {HELD_SHARE:.0%} of its training text is "
                        f"{len(held):,} bytes: expected two contexts, {2 * p.context:,} bytes")
    config, recipe = config_of(p, cell.system, cell.size), recipe_of(p, cell)
    windows = [heldout_windows(part, p.context, p.heldout_windows) for part in (held, corpus.valid)]
    done = learn_text(config, recipe, text, device=device, decay=True, evaluations=1,
                      windows=windows[0])
    bits = float(window_bits(done.model, windows[1]).mean())
    if not math.isfinite(done.curve[-1][1] + bits):
        raise NonFiniteError("the held-out bits are not finite")
    trained = done.steps * p.context * p.batch_size
    flops = flops_per_byte(config, p.context)
    return done, {
        "chosen_by": done.curve[-1][1], "valid_bits": bits, "n_parameters": config.n_parameters,
        "trained_bytes": trained, "steps": done.steps, "ms_per_step": 1e3 * done.step_seconds,
        "seconds": done.steps * done.step_seconds,
        "joules": done.joules, "alone": p.workers == 1,  # on its device, or time and joules are not
        "train_flops": flops * trained,
        "state_bytes": sum(state_bytes(config, p.context).values()),
        "text": text_id(p.corpus), "commit": commit(), "job": job()["id"],
    }

