"""Processes that share a sequence compute what one computes: losses, gradients, states, runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mambabyte.checkpoint import load_model
from mambabyte.config import TrainConfig
from mambabyte.corpus import load_corpus
from mambabyte.errors import UserError
from mambabyte.model import MIXERS, ByteLM
from mambabyte.model.distributed import World
from mambabyte.model.sequence import SequenceGroup
from mambabyte.train import train
from tests.helpers.split import CORPORA, RECIPE, model_of, run

CLOSE = {"float64": 1e-10, "float32": 5e-6}


def readings(run: Path) -> list[float]:
    """Losses and gradient norms, which a factor that AdamW does not see would change."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines for key in ("loss", "grad_norm")]


def check(found: dict[str, dict[str, float]]) -> None:
    for task, errors in found.items():
        if "/" in task:
            worst = max(errors, key=errors.__getitem__)
            assert errors[worst] < CLOSE[task.split("/")[2]], (task, worst, errors[worst])


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Three processes, and lengths that do not divide."""
    folder = tmp_path_factory.mktemp("three")
    return folder, run(3, folder, "MSDKALR/17/float64", "train=3", "documents=3")


def test_split_equals_whole(three):
    _, found = three
    assert len(found["MSDKALR/17/float64"]) > 60  # a value for each parameter
    check(found)


def test_all_mixers_are_among_them():
    assert set(MIXERS) == set("MSDKALR")


def test_a_split_run_is_the_run_of_one(three, tmp_path):
    folder, found = three
    corpus = load_corpus(str(folder / "text.txt"))
    one = train(model_of("MA").config, RECIPE, corpus, tmp_path / "one")
    expected = load_model(tmp_path / "one").state_dict()
    for name, weight in load_model(folder / "train-3").state_dict().items():
        assert torch.allclose(weight, expected[name], atol=1e-5), name
    assert found["train=3"]["valid_bits_per_byte"] == pytest.approx(
        one["valid_bits_per_byte"], abs=1e-5)
    resumed = folder / "train-3" / "checkpoints" / "step_00000003"
    resumed.rename(folder / "whole")  # by one process, from step 2
    train(model_of("MA").config, RECIPE, corpus, folder / "train-3", resume=True)
    again = load_model(folder / "train-3").state_dict()
    assert all(torch.allclose(again[name], expected[name], atol=1e-5) for name in expected)


def test_a_split_run_on_documents_is_the_run_of_one(three, tmp_path):
    folder, _ = three
    corpus = load_corpus(str(folder / "texts.jsonl"))
    assert corpus.begins
    train(model_of("MA").config, RECIPE, corpus, tmp_path / "one")
    expected = load_model(tmp_path / "one").state_dict()
    for name, weight in load_model(folder / "documents-3").state_dict().items():
        assert torch.allclose(weight, expected[name], atol=1e-5), name
    assert readings(folder / "documents-3") == pytest.approx(readings(tmp_path / "one"), rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("size", [2, 3, 4])
def test_each_mixer_at_many_lengths(size, tmp_path):
    check(run(size, tmp_path, *(
        f"{letter * 2}/{length}/{dtype}" for letter in MIXERS
        for length, dtype in ((4, "float64"), (41, "float64"), (257, "float64"),
                              (130, "float32")))))


@pytest.mark.long
def test_windows_and_stretches_are_a_mesh(tmp_path):
    """Four processes, two for each of the windows."""
    run(4, tmp_path, "train=2", "documents=2")
    for kind, name in CORPORA.items():
        train(model_of("MA").config, RECIPE, load_corpus(str(tmp_path / name)), tmp_path / kind)
        expected = load_model(tmp_path / kind).state_dict()
        found = load_model(tmp_path / f"{kind}-2").state_dict()
        assert all(torch.allclose(found[n], expected[n], atol=1e-5) for n in expected)
        assert readings(tmp_path / f"{kind}-2") == pytest.approx(
            readings(tmp_path / kind), rel=1e-5)


@pytest.mark.long
def test_the_bench_says_what_does_not_fit(tmp_path):
    rows = run(2, tmp_path, "bench")["bench"]
    assert [(row["length"], row["way"]) for row in rows] == [
        (length, way) for length in (40, 60) for way in ("alone", "split", "stretch")]
    notes = {(row["length"], row["way"]): row["note"] for row in rows if row["note"]}
    assert notes == {(60, "alone"): "out of memory"}
    assert all((row["ms"] is None) == bool(row["note"]) for row in rows)
    assert [row["way"] for row in rows if row["messages_ms"] is not None] == ["split"] * 2


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("length", [7, 8, 100, 64 * 64 * 7 + 1, 10**6, 999_999])
def test_stretches_cover_the_length_and_are_alike(size, length):
    pieces = [SequenceGroup(size, rank).pieces(length) for rank in range(size)]
    covered = [i for p in pieces for i in (p.own.start, p.own.stop)]
    assert covered == sorted(covered)
    assert covered[0] == 0
    assert covered[-1] == length
    assert covered[1:-1:2] == covered[2::2]
    sizes = [p.own.stop - p.own.start for p in pieces]
    assert max(sizes) - min(sizes) <= max(1, length // (32 * size))
    assert sum(p.weight for p in pieces) == pytest.approx(size)


def test_what_cannot_be_split_is_refused(tmp_path):
    with pytest.raises(UserError, match="sequence of 2 bytes cannot be split among 3"):
        SequenceGroup(3, 0).pieces(2)
    with pytest.raises(UserError, match="context_parallel is 3, of 4 processes: choose a divisor"):
        World(0, 4).sequence_group(3)
    with pytest.raises(UserError, match="torchrun --nproc-per-node 2"):
        World().sequence_group(2)
    with pytest.raises(UserError, match="batch_size 3 does not divide among 2 groups of 2"):
        World(0, 4).share(torch.empty(3), 2)
    with pytest.raises(UserError, match="context_parallel and step fused"):
        TrainConfig(context_parallel=2, step="compile")


def test_a_mixer_that_does_not_know_how_is_refused(monkeypatch):
    model: ByteLM = model_of("MA")
    monkeypatch.setattr(MIXERS["A"], "splits_length", False)
    with pytest.raises(UserError, match=r"layers 'A' .* cannot share a sequence"):
        model.share_sequences(SequenceGroup(2, 0))
    assert model.sequence_group is None
    model.share_sequences(None)


def test_windows_go_to_groups_and_groups_share_lengths():
    batch = torch.arange(4)
    rows = [World(rank, 4).share(batch, 2).tolist() for rank in range(4)]
    assert rows == [[0, 1], [0, 1], [2, 3], [2, 3]]
