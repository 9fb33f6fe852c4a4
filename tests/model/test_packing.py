"""Corpora of many documents: where they begin, how training and scoring read them."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from mambabyte.config import ModelConfig, TrainConfig
from mambabyte.corpus import Corpus, documents_in, load_corpus, sample_starts
from mambabyte.errors import UserError
from mambabyte.evaluate import bits_per_byte, byte_log_probs, score, score_streaming
from mambabyte.model import ByteLM
from mambabyte.ops.arguments import Ages, document_ages
from mambabyte.stream import ByteStream, CharModel, feed_together
from mambabyte.task.mixture import NgramLM
from mambabyte.task.ngram import count
from mambabyte.train import EagerStep, text_batches, train
from mambabyte.train.captured import (
    CapturedStep,
    Windows,
    most_documents,
    prepare,
    window_starts,
)
from mambabyte.train.optim import make_optimizer

MODEL = ModelConfig(d_model=16, layer_pattern="MA", n_layer=2, n_head=2, n_kv_head=1, d_state=4,
                    dt_rank=4, attention_window=8)
RECIPE = TrainConfig(context=24, batch_size=4, n_steps=3, warmup_fraction=0.0, log_every=1,
                     checkpoint_every=3, precision="fp32")
TEXT = np.frombuffer(b"she sells sea shells by the sea shore " * 30, np.uint8)
BEGINS = np.array([0, 7, 8, 30, 31, 200, 400, 401, 402, 900])


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "texts").mkdir()
    return tmp_path / "texts"


def test_files_and_records_are_documents(cache: Path) -> None:
    (cache / "a.txt").write_text("one")
    (cache / "b.txt").write_text("")  # none
    with gzip.open(cache / "c.jsonl.gz", "wt") as file:
        file.write('{"text": "zwei\\n", "id": 3}\n\n{"text": ""}\n{"text": "drei"}\n')
    (cache / "d.txt").write_text("four " * 40)
    corpus = load_corpus(str(cache))
    assert corpus.about == "the text files of a folder, 4 documents, cut 90/5/5"
    assert [bytes(d) for d in corpus.documents("train")][:3] == [b"one\n", b"zwei\n", b"drei\n"]
    assert corpus.begins["train"].tolist() == [0, 4, 9, 14]
    assert [len(corpus.documents(s)) for s in ("train", "valid", "test")] == [4, 1, 1]
    whole = b"".join(bytes(d) for s in ("train", "valid", "test") for d in corpus.documents(s))
    assert whole == b"one\nzwei\ndrei\n" + b"four " * 40
    assert [len(d) for d in corpus.documents("train", 10)] == [4, 5, 1]
    alone = load_corpus(str(cache / "c.jsonl.gz"))
    assert alone.about == "the records of one file, 2 documents, cut 90/5/5"
    assert load_corpus(str(cache / "d.txt")).begins == {}  # one text


@pytest.mark.parametrize(("line", "words"), [
    ("{", "line 2 of .* is no JSON"), ("[1]", "line 2 of .* has no text"),
    ('{"body": "x"}', "has no text"), ('{"text": 3}', "has no text"),
    ('{"text": "\\ud800"}', "half a character"),
])  # fmt: skip
def test_what_is_no_record_is_said_with_its_line(cache: Path, line: str, words: str) -> None:
    (cache / "a.jsonl").write_text('{"text": "one"}\n' + line + "\n")
    with pytest.raises(UserError, match=words):
        load_corpus(str(cache / "a.jsonl"))


def test_windows_say_where_documents_begin() -> None:
    first = np.zeros(len(TEXT), dtype=bool)
    first[BEGINS] = True
    starts = sample_starts(len(TEXT), 24, 50, 3, 0)
    found = documents_in(BEGINS, starts, 24)
    assert np.array_equal(found, np.stack([first[s : s + 25] for s in starts]))
    (batch,) = [text_batches(TEXT, RECIPE, "cpu", BEGINS)(1)]
    windows = Windows(torch.from_numpy(TEXT.copy()), 24, BEGINS, RECIPE.batch_size)
    tokens, packed, predictions = windows(window_starts(len(TEXT), RECIPE, 1, BEGINS)[0])
    ages = packed.steps
    for one, two in zip(batch, (tokens, ages == 0, predictions), strict=True):
        assert torch.equal(one, two)
    of_window = document_ages(batch[1], tokens)  # which knows nothing of what was before
    assert of_window is not None
    assert torch.equal(ages[of_window < 255], of_window[of_window < 255])
    assert document_ages(packed, tokens) is ages
    assert batch[2].sum() == (~batch[1][:, 1:]).sum()  # predictions


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_most_documents_of_a_batch_are_known_beforehand(parts: int) -> None:
    recipe = replace(RECIPE, n_steps=30)
    starts = window_starts(len(TEXT), recipe, 0, BEGINS)
    most = most_documents(starts, recipe.context, BEGINS, parts)
    windows = Windows(torch.from_numpy(TEXT.copy()), recipe.context, BEGINS, 4, most)
    counts = []
    for part in (part for step in starts for part in step.chunk(parts)):
        _, ages, _ = windows(part)
        assert isinstance(ages, Ages)
        assert ages.most == most
        begins = ages.steps[:, :-1] == 0
        begins[:, 0] = True
        counts.append(int(begins.sum()))
    assert max(counts) == most
    assert min(counts) < most


def stepped(
    config: ModelConfig, recipe: TrainConfig, captured: bool, device: str = "cpu"
) -> tuple[list[torch.Tensor], list[tuple[float, float]]]:
    """The weights after two steps on documents; loss and gradient norm of each."""
    torch.manual_seed(0)
    model = ByteLM(config).to(device)
    optimizer = make_optimizer(model, recipe, on_device=captured)
    step = EagerStep(model, optimizer, text_batches(TEXT, recipe, device, BEGINS), recipe)
    if captured:
        prepare(model, recipe)
        text = torch.from_numpy(TEXT.copy()).to(device)
        starts = window_starts(len(TEXT), recipe, 0, BEGINS)
        most = most_documents(starts, recipe.context, BEGINS, recipe.micro_batches)
        step = CapturedStep(  # type: ignore[assignment]
            model, model.loss, optimizer,
            Windows(text, recipe.context, BEGINS, recipe.batch_size, most), starts, recipe)
    readings = []
    for _ in range(recipe.n_steps):
        step(1.0)
        readings.append(step.read()[:2])
    return list(model.parameters()), readings


def test_parts_of_a_batch_make_the_step_of_the_whole() -> None:
    recipe = replace(RECIPE, n_steps=2, step="graph")
    wanted, _ = stepped(MODEL, recipe, False)
    for parts, captured in ((4, False), (2, True)):
        found, _ = stepped(MODEL, replace(recipe, micro_batches=parts), captured)
        for one, two in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("way", ["graph", "fused", "compile"])
def test_captured_steps_on_documents(way: str) -> None:
    """Every kind of mixer with the kernels of a card, past the steps before a capture."""
    config = replace(MODEL, layer_pattern="MSDKA", n_layer=5, d_model=64, d_state=16)
    recipe = replace(RECIPE, n_steps=6, context=200, step=way, precision="bf16", lr=1e-3)
    _, wanted = stepped(config, recipe, False, "cuda")
    _, found = stepped(config, recipe, True, "cuda")
    assert found == [pytest.approx(reading, rel=3e-2) for reading in wanted]
    alone = replace(recipe, n_steps=1)
    torch.manual_seed(0)
    model = ByteLM(config)
    tokens, starts, _ = text_batches(TEXT, alone, "cpu", BEGINS)(0)
    assert wanted[0][0] == pytest.approx(float(model.loss(tokens, starts).detach()), rel=2e-2)


def test_a_training_reads_and_scores_documents(tmp_path: Path) -> None:
    begins = {"train": np.arange(0, len(TEXT), 13), "valid": np.array([5, 40])}
    corpus = Corpus("shells", "", TEXT, TEXT[:90], TEXT[:90], "", begins)
    asked: list[torch.Tensor | None] = []
    real = ByteLM.loss

    def watched(self: ByteLM, *batch: torch.Tensor) -> torch.Tensor:
        asked.append(batch[1])
        return real(self, *batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ByteLM, "loss", watched)
        result = train(MODEL, RECIPE, corpus, tmp_path / "run")
    assert len(asked) == 3
    assert any(a.any() for a in asked if a is not None)
    assert result["valid_bytes"] == 90
    from mambabyte.checkpoint import load_model

    model = load_model(tmp_path / "run")
    parts = [bytes(TEXT[a:b]) for a, b in ((0, 5), (5, 40), (40, 90))]
    assert result["valid_bits_per_byte"] == pytest.approx(bits_per_byte(model, parts), rel=1e-6)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["valid_bytes"] == 90


def test_texts_of_any_lengths_score_as_they_do_alone() -> None:
    torch.manual_seed(1)
    model = ByteLM(MODEL).double()
    texts = [b"a", "naïve café".encode(), b"", b"she sells sea shells", b"xy"]
    alone = [byte_log_probs(model, text, window=7) for text in texts if text]
    for window in (3, 100):
        found = byte_log_probs(model, texts, window=window)
        torch.testing.assert_close(found, torch.cat(alone), rtol=1e-5, atol=1e-5)
    scores = [score(model, text) for text in texts if text]
    together = score(model, texts)
    assert together.hits.tolist() == [h for s in scores for h in s.hits]
    assert together.bytes == sum(map(len, texts))
    assert bits_per_byte(model, texts) == pytest.approx(together.bits_per_byte, rel=1e-5)
    assert score(model, texts, characters=4).characters == 4
    told: list[float] = []
    streamed = score_streaming(CharModel(model.float()), texts, report=told.append)
    assert streamed.bits_per_byte == pytest.approx(together.bits_per_byte, rel=1e-4)
    assert told == sorted(told)
    counts = NgramLM(count(b"she sells shells", 3))  # reads no documents: one by one
    assert len(byte_log_probs(counts, texts)) == together.bytes
    with pytest.raises(UserError, match="nothing to score"):
        bits_per_byte(model, [b"", b""])


def test_scoring_says_how_far_it_is() -> None:
    model = ByteLM(MODEL)
    texts = [b"she sells sea shells " * 20, b"naive", b"xy" * 150]  # 420, 5 and 300 bytes
    for way, expected in (
            (partial(bits_per_byte, model, window=400), [400 / 725, 1.0]),
            (partial(score, model, window=210), [210 / 725, 420 / 725, 425 / 725, 635 / 725, 1.0]),
            (partial(score_streaming, CharModel(model)), [
                0, 200 / 725, 400 / 725, 420 / 725, 425 / 725, 625 / 725])):
        told: list[float] = []
        way(texts, report=told.append)
        assert told == pytest.approx(expected)


@pytest.mark.parametrize("text", ["abc", 3, [97, 98], np.array([97, 98]), [b"a", "b"], None])
def test_what_is_no_bytes_is_not_taken_for_some(text: object) -> None:
    model = ByteLM(ModelConfig(d_model=8, n_layer=1, d_state=2))
    for take in (partial(bits_per_byte, model), ByteStream(model).feed, count,
                 lambda piece: feed_together([ByteStream(model)], [piece])):
        with pytest.raises(UserError, match=r"a text is .*: expected bytes"):
            take(text)  # type: ignore[arg-type]
    assert bits_per_byte(model, bytearray(b"ab")) == bits_per_byte(model, b"ab")  # type: ignore
