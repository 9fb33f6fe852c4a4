"""Subword pieces: bytes accounted for, bits in bytes, and what few large steps reach."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from analysis.studies.ablation.tokens import (
    PRIOR,
    Pieces,
    PieceText,
    bits_per_raw_byte,
    check_bytes,
    few_steps,
    piece_byte_lengths,
    score_stream,
)
from mambabyte.config import ModelConfig
from mambabyte.corpus import Corpus
from mambabyte.errors import UserError
from mambabyte.model import ByteLM

SMALL = ModelConfig(d_model=16, n_layer=2, layer_pattern="MA", n_head=2, n_kv_head=2, d_state=4,
                    attention_window=32)


def test_bits_per_raw_byte():
    # 3 tokens at ln 4 nats each are 6 bits; over 4 bytes, 1.5 bits a byte.
    assert bits_per_raw_byte(3 * math.log(4), 4) == pytest.approx(1.5)


def test_piece_lengths_and_their_check():
    pieces = ["<unk>", "<0x0A>", "\u2581the", "\u00e9", "\u2581"]
    lengths = piece_byte_lengths(pieces, [False, True, False, False, False],
                                 [True, False, False, False, False])
    assert lengths.tolist() == [0, 1, 4, 2, 1]
    assert check_bytes(np.array([2, 1, 3]), lengths, " the\n\u00e9") == 7
    with pytest.raises(UserError, match="stand for 4 bytes and the text has 5"):
        check_bytes(np.array([2]), lengths, " thee")
    with pytest.raises(UserError, match="stand for 0 bytes"):
        check_bytes(np.array([0]), lengths, "x")


def test_counted_bits_by_hand():
    pieces = Pieces(None, np.array([1, 1, 2]))
    text = PieceText(pieces, np.array([0, 1, 0, 1, 2]), np.zeros(4, np.uint8), np.array([0, 1, 2]))
    single = np.array([3, 3, 2]) / 8  # one more each than counted
    assert text.counted_bits["unigram_bits_per_raw_byte"] == pytest.approx(
        -np.log2(single).sum() / 4)
    pair = [(2 + PRIOR * single[1]) / (2 + PRIOR), (1 + PRIOR * single[2]) / (2 + PRIOR)]
    assert text.counted_bits["bigram_bits_per_raw_byte"] == pytest.approx(
        -(np.log2(single[0]) + np.log2(pair).sum()) / 4)


def test_pieces_without_the_package_are_one_clear_line(monkeypatch):
    import sys

    from analysis.studies.ablation.tokens import train_pieces

    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match="pip install sentencepiece"):
        train_pieces(b"text " * 1000, 300)


def test_pieces_account_for_every_byte():
    pytest.importorskip("sentencepiece", reason="needs sentencepiece: pip install '.[tokens]'")
    from analysis.studies.ablation.tokens import train_pieces

    text = "the cat and the hat, the bat\n\n\tsat  on the m\u00e4t \u2014 \U0001f600 ok\n" * 200
    pieces = train_pieces(text.encode(), 300)
    ids = pieces.encode(text)
    assert pieces.processor.decode(ids.tolist()) == text
    assert pieces.piece_bytes[ids].sum() == len(text.encode())
    assert len(ids) < len(text.encode())
    with pytest.raises(UserError, match="bits per byte"):
        pieces.encode("\u2581")


class Letters:
    """A piece model of 26 letters, enough to score with."""

    def encode(self, text):
        return [ord(c) - 97 for c in text]


def test_a_model_that_knows_nothing_has_uniform_bits():
    pieces = Pieces(Letters(), np.ones(26, dtype=np.int64))
    text = "abcxyz" * 50
    held = np.array(pieces.encode(text))
    model = ByteLM(replace(SMALL, vocab_size=26))
    torch.nn.init.zeros_(model.embedding.weight)
    assert score_stream(model, held, len(text)) == pytest.approx(math.log2(26), rel=1e-5)


def test_a_stream_is_scored_the_same_in_parts():
    """On bytes against the package's own scoring, beyond one part of 4096."""
    torch.manual_seed(0)
    model = ByteLM(SMALL)
    text = "".join(chr(97 + i * i % 26) for i in range(5000))
    ours = score_stream(model, np.frombuffer(text.encode(), dtype=np.uint8), len(text))
    whole = torch.tensor([list(text.encode())])
    logits, _ = model(whole[:, :-1])
    nats = torch.nn.functional.cross_entropy(logits[0], whole[0, 1:], reduction="sum").item()
    assert ours == pytest.approx((nats / math.log(2) + math.log2(256)) / len(text), rel=1e-5)


def test_few_steps_start_uniform_and_learn():
    pieces = Pieces(Letters(), np.ones(26, dtype=np.int64))
    split = np.frombuffer(b"abcd" * 500, dtype=np.uint8)
    corpus = Corpus("letters", "", split, split, split)
    table = few_steps({"tiny": SMALL}, pieces, corpus, steps=3, tokens_per_step=100, context=32,
                      micro_batch=2, train_bytes=2000, valid_bytes=400)
    assert table["step"].tolist() == [0, 1, 2, 3]
    assert table["tokens"].tolist() == [0, 64, 128, 192]  # whole micro-batches of 2 x 32
    bits = table["bits_per_raw_byte"]
    assert bits[0] == pytest.approx(math.log2(26), abs=0.1)
    assert bits[3] < bits[0]
    with pytest.raises(UserError, match="at least 1"):
        few_steps({}, pieces, corpus, steps=0, tokens_per_step=1, train_bytes=10)
