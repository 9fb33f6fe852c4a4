"""Two processes make the step of one, and their checkpoints are those of one."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from analysis.cli.models import train as command
from analysis.measure.parallel import run_jobs
from mambabyte.checkpoint import load_model
from mambabyte.corpus import load_corpus
from mambabyte.errors import UserError
from mambabyte.model.distributed import World, current, joined
from mambabyte.train import train
from tests.helpers.two import MODEL, RECIPE, work


@pytest.fixture(scope="module")
def corpus_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("two hands make light work of many bytes. " * 400)
    return path


@pytest.fixture(scope="module")
def two(corpus_path, tmp_path_factory) -> Path:
    """A folder with the runs that two processes made."""
    out = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    list(run_jobs(work, [(rank, port, corpus_path, out) for rank in range(2)], 2))
    return out


@pytest.mark.parametrize("step", ["eager", "graph"])
def test_two_processes_equal_one(two, corpus_path, tmp_path, step):
    corpus = load_corpus(str(corpus_path))
    train(MODEL, replace(RECIPE, step=step), corpus, tmp_path / "one")
    one, other = load_model(tmp_path / "one").state_dict(), load_model(two / step).state_dict()
    for name, value in one.items():
        assert torch.allclose(value, other[name], atol=1e-5), name
    losses = [(p / "metrics.jsonl").read_text().count("\n") for p in (tmp_path / "one", two / step)]
    assert losses == [3, 3]  # written once, by the first process


def test_two_processes_have_one_clock(two):
    """A schedule by the clock would else give each process rates, and so weights, of its own."""
    clocks = [json.loads((two / f"clock{rank}").read_text()) for rank in range(2)]
    assert len(clocks[0]) == 4
    assert clocks[0] == clocks[1]


def test_a_sharded_run_is_the_run_of_one(two, corpus_path, tmp_path):
    one = train(MODEL, RECIPE, load_corpus(str(corpus_path)), tmp_path / "one")
    expected = load_model(tmp_path / "one").state_dict()
    for folder in ("whole", "checkpoints/step_00000004"):  # at a stretch, and resumed at step 2
        found = load_model(two / "sharded" / folder).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.allclose(found[k], expected[k], atol=1e-5) for k in expected), folder
    record = json.loads((two / "sharded" / "result.json").read_text())
    assert record["n_parameters"] == one["n_parameters"]
    assert record["valid_bits_per_byte"] == pytest.approx(one["valid_bits_per_byte"], abs=1e-4)


def test_what_cannot_be_sharded_is_refused():
    with pytest.raises(UserError, match="whole matrices"):
        replace(RECIPE, parallel="sharded", optimizer="muon")
    with pytest.raises(UserError, match="cannot be sharded"):
        replace(RECIPE, parallel="sharded", step="graph")


@pytest.mark.parametrize(("name", "step"), [("eager", "eager"), ("sharded", "auto")])
def test_a_run_of_two_is_resumed_by_one(two, corpus_path, name, step):
    corpus = load_corpus(str(corpus_path))
    run = two / name
    (run / "checkpoints/step_00000004").rename(run / "two")
    result = train(MODEL, replace(RECIPE, step=step), corpus, run, resume=True)
    assert result["steps"] == 4
    whole, resumed = load_model(run / "two").state_dict(), load_model(run).state_dict()
    assert all(torch.allclose(whole[k], resumed[k], atol=1e-5) for k in whole)


def test_shares_are_the_batch():
    batch = torch.arange(6)[:, None]
    parts = [World(rank, 3).share(batch) for rank in range(3)]
    assert torch.equal(torch.cat(parts), batch)
    assert torch.equal(World().share(batch), batch)
    with pytest.raises(UserError, match="does not divide among 4"):
        World(0, 4).share(batch)


def test_alone_is_a_world_of_one():
    world = current()
    assert (world.rank, world.size) == (0, 1)
    assert world.device("cuda") == "cuda"
    assert World(1, 2, 1).device("cuda") == "cuda:1"
    tensor = torch.ones(3)
    world.average([tensor])
    assert torch.equal(tensor, torch.ones(3))
    assert world.agree(True)
    assert not world.agree(False)


@pytest.mark.parametrize(("device", "line"), [
    ("cuda", "process 1 of this machine has no CUDA device, of which there are 0"),
    ("cuda:0", "device 'cuda:0', and process 1 of this machine has cuda:1: give --device cuda"),
])
def test_each_process_takes_a_card_of_its_own(device, line, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1"),
                        ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=line), joined(device):
        pass


def test_what_the_first_process_refuses_all_refuse(corpus_path, tmp_path, monkeypatch):
    """Else the others wait for it, and end in words of the network."""
    def refuse(*of):
        raise UserError("no room")

    told: list[str | None] = []
    monkeypatch.setattr(World, "agree", lambda self, value: told.append(value) or "no room there")
    monkeypatch.setattr(command, "_forecast", refuse)
    monkeypatch.setattr("mambabyte.train.smoke.is_smoke", lambda size: False)
    options = command.Options(tmp_path / "run", corpus=str(corpus_path))
    for first in (True, False):
        with pytest.raises(UserError, match="no room there"):
            command._train(options, "cpu", first)
    assert told == ["no room", None]
    assert not (tmp_path / "run").exists()
