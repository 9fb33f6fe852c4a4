"""Subword pieces (sp1024): trained on the training split, judged in bits per raw byte.

Bits per token of two vocabularies say nothing about each other. Total nats over the *raw bytes*
that the tokens stand for do, if every byte is counted exactly once. So the piece model is
trained without normalisation, without a dummy space in front and with byte fallback: any text
comes back unchanged, and each piece stands for a known number of bytes. That is checked against
the length of the text, every time, and a mismatch is an error.

``few_steps`` is what a handful of large steps can reach: the second document reports 2.0295 bits
per byte for SSM-1 after about five effective steps, and 3.3168 for the hybrid after 180 s. Here the
same systems train on pieces with all of the published choices (analysis.studies.ablation.variants),
batches of the published size split into micro-batches, and the learning rate at its full height
throughout, which is more than the published schedule gives.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.studies.ablation import get_variant
from analysis.studies.ablation.learning import learn_text
from analysis.studies.ablation.variants import build, round_weights, variant_step
from mambabyte.config import ModelConfig, TrainConfig
from mambabyte.corpus import Corpus, sample_windows
from mambabyte.errors import UserError
from mambabyte.model import ByteLM
from mambabyte.train import autocast, optimise

SPACE = "\u2581"  # how sentencepiece writes a space inside a piece
# 256 byte pieces and <unk> are always there; less leaves nothing to learn.
FEWEST_PIECES = 258
PRIOR = 30.0  # occurrences


@dataclass(frozen=True)
class Pieces:
    """A trained piece model and how many raw bytes each of its pieces stands for."""

    processor: Any
    piece_bytes: np.ndarray  # (pieces,) int64

    @property
    def size(self) -> int:
        return len(self.piece_bytes)

    def encode(self, text: str) -> np.ndarray:
        """Piece numbers of ``text``, whose bytes are checked to add up to those of the text."""
        ids = np.asarray(self.processor.encode(text), dtype=np.int64)
        check_bytes(ids, self.piece_bytes, text)
        return ids


def piece_byte_lengths(pieces: list[str], is_byte: list[bool], special: list[bool]) -> np.ndarray:
    """Raw bytes of each piece: 1 for a byte piece, 0 for <unk> and controls, else its UTF-8."""
    return np.array([
        0 if control else 1 if byte else len(piece.replace(SPACE, " ").encode("utf-8"))
        for piece, byte, control in zip(pieces, is_byte, special, strict=True)
    ], dtype=np.int64)


def check_bytes(ids: np.ndarray, piece_bytes: np.ndarray, text: str) -> int:
    """Bytes that ``ids`` stand for; UserError when that is not the byte length of ``text``."""
    total, expected = int(piece_bytes[ids].sum()), len(text.encode("utf-8"))
    if total != expected:
        raise UserError(
            f"the pieces stand for {total:,} bytes and the text has {expected:,}: bits per byte "
            f"would be wrong (does the text hold {SPACE!r}, which the piece model keeps for "
            "spaces?)")
    return total


def bits_per_raw_byte(total_nats: float, raw_bytes: int) -> float:
    """Total -ln p over all tokens, spread over the raw bytes they stand for, in bits."""
    return total_nats / math.log(2) / raw_bytes


def train_pieces(data: bytes, pieces: int = 1024) -> Pieces:
    """Train a BPE piece model on UTF-8 ``data``; needs the optional package sentencepiece."""
    try:
        import sentencepiece
    except ImportError:
        raise UserError("pieces need the package sentencepiece: pip install sentencepiece, or "
                        "set pieces to 0") from None
    if pieces < FEWEST_PIECES:
        raise UserError(f"{pieces} pieces: 256 are single bytes, give at least {FEWEST_PIECES}")
    text = data.decode("utf-8", errors="ignore")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(line for line in text.split("\n") if line),
            model_writer=model, vocab_size=pieces, model_type="bpe", byte_fallback=True,
            normalization_rule_name="identity", add_dummy_prefix=False,
            remove_extra_whitespaces=False, character_coverage=0.999, bos_id=-1, eos_id=-1,
            max_sentence_length=1 << 16, num_threads=2, minloglevel=2)
    except RuntimeError as error:
        raise UserError(f"{pieces} pieces cannot be trained on {len(data):,} bytes: "
                        f"{str(error).splitlines()[0]}") from None
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    numbers = range(processor.get_piece_size())
    return Pieces(processor, piece_byte_lengths(
        [processor.id_to_piece(i) for i in numbers],
        [processor.is_byte(i) for i in numbers],
        [processor.is_control(i) or processor.is_unknown(i) for i in numbers]))


@dataclass(frozen=True)
class PieceText:
    """A corpus in pieces: ids to train on, and a held-out text in bytes and in ids."""

    pieces: Pieces
    ids: np.ndarray  # of the first bytes of the training split
    held_bytes: np.ndarray  # (raw bytes,) uint8
    held: np.ndarray  # the ids of the same text; their bytes were added up and checked

    @cached_property
    def counted_bits(self) -> dict[str, float]:
        """What counting needs for the held-out text, in bits per raw byte: how often each piece
        comes in the training text, and how often after the piece before."""
        size, raw = self.pieces.size, len(self.held_bytes)
        single = np.bincount(self.ids, minlength=size) + 1.0
        single /= single.sum()
        pairs = np.bincount(self.ids[:-1] * size + self.ids[1:], minlength=size**2)
        before, after = self.held[:-1], self.held[1:]
        seen = np.bincount(self.ids[:-1], minlength=size)[before]
        # Frequencies without the piece before weigh as much as PRIOR occurrences of it do.
        pair = (pairs[before * size + after] + PRIOR * single[after]) / (seen + PRIOR)
        first = -np.log2(single[self.held[0]])
        return {"unigram_bits_per_raw_byte": float(-np.log2(single[self.held]).sum() / raw),
                "bigram_bits_per_raw_byte": float((first - np.log2(pair).sum()) / raw)}

    def steps_for(self, raw_bytes: int, tokens_a_step: int) -> int:
        """Steps after which about ``raw_bytes`` bytes of the training text were seen; 1 or more."""
        return max(1, round(raw_bytes / (tokens_a_step * self.bytes_per_id)))

    @property
    def bytes_per_id(self) -> float:
        return float(self.pieces.piece_bytes[self.ids].mean())


def encode_corpus(
    pieces: Pieces, corpus: Corpus, train_bytes: int, valid_bytes: int = 100_000
) -> PieceText:
    """The start of the training and of the validation split, every byte accounted for."""
    held = bytes(corpus.valid[:valid_bytes]).decode("utf-8", errors="ignore")
    return PieceText(
        pieces, pieces.encode(bytes(corpus.train[:train_bytes]).decode("utf-8", errors="ignore")),
        np.frombuffer(held.encode("utf-8"), dtype=np.uint8), pieces.encode(held))


def learn_pieces(
    text: PieceText, config: ModelConfig, recipe: TrainConfig, device: str = "cpu",
    decay: bool = False,
) -> dict[str, Any]:
    """Train ``config`` on tokens and score it; all counts that make up bits per raw byte.

    The context is ``recipe.context`` tokens, so it spans ``bytes_per_token`` times as many bytes,
    and each step sees that much more text than one of a byte model (``steps_for``). ``decay`` as
    in ``learn_text``, which trains the byte models too.
    """
    config = replace(config, vocab_size=text.pieces.size)
    learned = learn_text(config, recipe, text.ids, device=device, decay=decay)
    raw, held = len(text.held_bytes), len(text.held)
    bits = score_stream(learned.model, text.held, raw, device)
    trained = recipe.n_steps * recipe.context * recipe.batch_size
    return {
        "pieces": text.pieces.size, "n_parameters": config.n_parameters, "steps": recipe.n_steps,
        "trained_tokens": trained, "trained_raw_bytes": round(trained * text.bytes_per_id),
        "tokens": held, "raw_bytes": raw, "bytes_per_token": raw / held,
        "bits_per_token": bits * raw / held, "bits_per_raw_byte": bits,
        "uniform_bits_per_raw_byte": math.log2(text.pieces.size) * held / raw,
        **text.counted_bits,
    }


@torch.no_grad()
def score_stream(model: ByteLM, held: np.ndarray, raw_bytes: int, device: str = "cpu") -> float:
    """Bits per raw byte of the ids ``held``, pieces or bytes, as one stream of ``raw_bytes``.

    The first is charged the uniform ln(vocabulary): nothing precedes it.
    """
    ids = torch.from_numpy(held.astype(np.int64))
    nats, state = math.log(model.config.vocab_size), None
    model.eval()
    with autocast(torch.device(device), "auto"):
        for part in (ids[i : i + 4097] for i in range(0, len(ids) - 1, 4096)):
            logits, state = model(part[None, :-1].to(device), state)
            nats += F.cross_entropy(logits[0].float(), part[1:].to(device),
                                    reduction="sum").item()
    return bits_per_raw_byte(nats, raw_bytes)


def few_steps(
    systems: dict[str, ModelConfig], pieces: Pieces, corpus: Corpus, *, steps: int,
    tokens_per_step: int, context: int = 1024, micro_batch: int = 16, train_bytes: int,
    valid_bytes: int = 100_000, device: str = "cpu",
    report: Callable[[str], None] = lambda line: None,
) -> pd.DataFrame:
    """Bits per raw byte before and after each of ``steps`` steps, one row a system and step, with
    the second document's choices.

    A step is ``tokens_per_step`` tokens in windows of ``context``, rounded down to whole
    micro-batches, and at least one. Raises UserError for fewer than one step, and
    NonFiniteError where a system diverges.
    """
    if steps < 1:
        raise UserError(f"{steps} steps: give at least 1")
    text = encode_corpus(pieces, corpus, train_bytes, valid_bytes)
    micro = max(1, tokens_per_step // (micro_batch * context))
    choices, seed = get_variant("published"), 0
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
