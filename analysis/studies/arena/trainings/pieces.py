"""Bytes or pieces, on clean text and on text with noise: the same raw bytes seen, each tuned.

Bits are per raw byte of the text that is scored, noisy or not; accuracy is the share of its raw
bytes that stand in a symbol that was predicted right, a byte or a whole piece.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from analysis.studies.ablation.learning import LN2, learn_text
from analysis.studies.ablation.tokens import Pieces, PieceText, encode_corpus, train_pieces
from analysis.studies.arena import Parameters
from analysis.studies.arena.trainings.plan import PIECE_BYTES, Cell, at
from analysis.studies.arena.trainings.text import (
    HELD_BYTES,
    config_of,
    open_corpus,
    recipe_of,
    train,
)
from mambabyte.config.provenance import commit
from mambabyte.model import ByteLM
from mambabyte.train import autocast

VOCABULARY = 1024
SCORED_BYTES = 60_000
NOISE_SHARE = 0.05  # of characters that noise touches
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def typos(text: str, rng: np.random.Generator) -> str:
    """A letter takes the place of another in NOISE_SHARE of all places."""
    return _touched(text, rng, str.isalpha, lambda c: LETTERS[rng.integers(len(LETTERS))])


def case(text: str, rng: np.random.Generator) -> str:
    """Capitals for small letters and the reverse."""
    return _touched(text, rng, str.isalpha, str.swapcase)


def spacing(text: str, rng: np.random.Generator) -> str:
    """A space is doubled, or is gone."""
    return _touched(text, rng, lambda c: c == " ", lambda c: "" if rng.random() < 0.5 else "  ",
                    share=4 * NOISE_SHARE)


def _touched(
    text: str, rng: np.random.Generator, fits: Callable[[str], bool],
    change: Callable[[str], str], share: float = NOISE_SHARE,
) -> str:
    touched = rng.random(len(text)) < share
    return "".join(change(c) if t and fits(c) else c for c, t in zip(text, touched, strict=True))


NOISES: dict[str, Callable[[str, np.random.Generator], str]] = {
    "none": lambda text, rng: text, "typos": typos, "case": case, "spacing": spacing}


@cache
def piece_text(corpus_name: str, vocabulary: int = VOCABULARY) -> PieceText:
    """Pieces of the training text that is trained on, and its ids."""
    corpus, text, _ = open_corpus(corpus_name)
    size = min(PIECE_BYTES, len(text))
    return encode_corpus(train_pieces(bytes(text[:size]), vocabulary), corpus, size)


def scores(model: ByteLM, text: bytes, pieces: Pieces | None) -> list[dict[str, Any]]:
    """Bits per raw byte and accuracy on ``text`` under each noise."""
    model.eval()
    clean = text.decode("utf-8", errors="ignore")
    rows = []
    for name, noise in NOISES.items():
        noisy = noise(clean, np.random.default_rng(0))
        raw = noisy.encode("utf-8")
        ids = np.frombuffer(raw, np.uint8) if pieces is None else pieces.encode(noisy)
        lengths = np.ones(len(ids), np.int64) if pieces is None else pieces.piece_bytes[ids]
        bits, right = _score(model, ids.astype(np.int64), lengths)
        rows.append({"noise": name, "raw_bytes": len(raw), "bits_per_raw_byte": bits / len(raw),
                     "accuracy": right / len(raw)})
    return rows


@torch.no_grad()
def _score(model: ByteLM, ids: np.ndarray, lengths: np.ndarray) -> tuple[float, float]:
    """Total bits, and bytes of the symbols predicted right, of one stream; the first symbol is
    charged as one of equals."""
    nats, right, state = math.log(model.config.vocab_size), 0.0, None
    tokens, weights = torch.from_numpy(ids).to(model.device), torch.from_numpy(lengths)
    for start in range(0, len(ids) - 1, 4096):
        part = tokens[start : start + 4097]
        with autocast(model.device, "auto"):
            logits, state = model(part[None, :-1], state)
        nats += F.cross_entropy(logits[0].float(), part[1:], reduction="sum").item()
        hit = (logits[0].argmax(-1) == part[1:]).cpu()
        right += float(weights[start + 1 : start + 1 + len(hit)][hit].sum())
    return nats / LN2, right


def train_on_units(p: Parameters, cell: Cell, device: str) -> dict[str, Any]:
    """The row of a training on pieces or, of kind "noise", on bytes; scored under each noise."""
    corpus, _, held = open_corpus(p.corpus)
    text = bytes(corpus.valid[:SCORED_BYTES])
    if cell.kind == "noise":
        done, row = train(p, cell, device)
        return row | {"units": [{"units": "bytes", **one}
                                for one in scores(done.model, text, None)]}
    vocabulary = piece_text(p.corpus)
    per_step = p.context * p.batch_size
    recipe = recipe_of(p, at(cell, budget=per_step * vocabulary.steps_for(cell.budget, per_step)))
    config = config_of(p, cell.system, cell.size, vocabulary.pieces.size)
    done = learn_text(config, recipe, vocabulary.ids, device=device, decay=True)
    pieces = vocabulary.pieces
    chosen = scores(done.model, bytes(held[: min(SCORED_BYTES, HELD_BYTES)]), pieces)[0]
    return {"chosen_by": chosen["bits_per_raw_byte"], "steps": done.steps,
            "n_parameters": config.n_parameters, "commit": commit(),
            "units": [{"units": "pieces", **one} for one in scores(done.model, text, pieces)]}
