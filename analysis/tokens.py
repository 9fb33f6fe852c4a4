"""Subword pieces (sp1024): trained on the training split, judged in bits per raw byte.

Bits per token of two vocabularies say nothing about each other. Total nats over the *raw bytes*
that the tokens stand for do, if every byte is counted exactly once. So the piece model is
trained without normalisation, without a dummy space in front and with byte fallback: any text
comes back unchanged, and each piece stands for a known number of bytes. That is checked against
the length of the text, every time, and a mismatch is an error.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from mambabyte.config import ModelConfig, TrainConfig
from mambabyte.corpus import Corpus, sample_windows
from mambabyte.errors import UserError
from mambabyte.model import ByteLM
from mambabyte.optim import make_optimizer
from mambabyte.text import first_characters
from mambabyte.train import autocast, train_step

SPACE = "\u2581"  # how sentencepiece writes a space inside a piece
# 256 byte pieces and <unk> are always there; less leaves nothing to learn.
FEWEST_PIECES = 258


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


def learn_pieces(
    pieces: Pieces, config: ModelConfig, recipe: TrainConfig, corpus: Corpus, *,
    train_bytes: int, valid_bytes: int = 100_000, device: str = "cpu",
) -> dict[str, Any]:
    """Train ``config`` on tokens and score it; all counts that make up bits per raw byte.

    The context is ``recipe.context`` tokens, so it spans ``bytes_per_token`` times as many bytes,
    and as many steps see that much more text than a byte model does.
    """
    text = bytes(corpus.train[:train_bytes]).decode("utf-8", errors="ignore")
    ids = pieces.encode(text)
    held_text = first_characters(bytes(corpus.valid[:valid_bytes]), valid_bytes)
    held = torch.from_numpy(pieces.encode(held_text))
    raw = check_bytes(held.numpy(), pieces.piece_bytes, held_text)

    config = replace(config, vocab_size=pieces.size)
    torch.manual_seed(recipe.seed)
    model = ByteLM(config).to(device)
    optimizer = make_optimizer(model, recipe)
    for step in range(recipe.n_steps):
        tokens = sample_windows(ids, recipe.context, recipe.batch_size, recipe.seed, step)
        train_step(model, optimizer, tokens.to(device), recipe, step)

    bits = score_pieces(model, held, raw, device)
    trained = recipe.n_steps * recipe.context * recipe.batch_size
    return {
        "pieces": pieces.size, "n_parameters": config.n_parameters, "steps": recipe.n_steps,
        "trained_tokens": trained,
        "trained_raw_bytes": round(trained * pieces.piece_bytes[ids].mean()),
        "tokens": len(held), "raw_bytes": raw, "bytes_per_token": raw / len(held),
        "bits_per_token": bits * raw / len(held), "bits_per_raw_byte": bits,
        "uniform_bits_per_raw_byte": math.log2(pieces.size) * len(held) / raw,
    }


@torch.no_grad()
def score_pieces(model: ByteLM, held: torch.Tensor, raw_bytes: int, device: str = "cpu") -> float:
    """Bits per raw byte of the tokens ``held`` as one stream, which stand for ``raw_bytes``.

    The first token is charged the uniform ln(pieces): nothing precedes it.
    """
    nats, state = math.log(model.config.vocab_size), None
    with autocast(torch.device(device), "auto"):
        for part in (held[i : i + 4097] for i in range(0, len(held) - 1, 4096)):
            logits, state = model(part[None, :-1].to(device), state)
            nats += F.cross_entropy(logits[0].float(), part[1:].to(device),
                                    reduction="sum").item()
    return bits_per_raw_byte(nats, raw_bytes)
