"""Kills and damage by kind: a few a day, a thousand kills and ten thousand damages in the long
suite (``pytest -m long tests/runs/test_harm.py -s`` prints the table of docs/robustness.md)."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from analysis.cli import INTERRUPTED, main
from analysis.runs.folders import load_run, seal
from mambabyte.checkpoint import find_checkpoint, load_model, load_training
from mambabyte.config import ModelConfig, TrainConfig
from mambabyte.corpus import Corpus
from mambabyte.task import ngram_file
from mambabyte.task.ngram import count
from mambabyte.train import train
from mambabyte.train.optim import make_optimizer
from tests.helpers.harm import damage, kills, sweep_kills, table, unharmed
from tests.helpers.report_world import write_run
from tests.helpers.sweeps import write_tiny

TEXT = np.frombuffer(b"she sells sea shells by the sea shore, " * 60, np.uint8)
MODEL = ModelConfig(d_model=4, n_layer=1, d_state=2, dt_rank=1, expand=1)
RECIPE = TrainConfig(context=16, batch_size=2, n_steps=2, max_seconds=0, precision="fp32")
DAILY, LONG = 12, 1000


def test_a_signal_while_torch_is_imported_ends_at_once(monkeypatch, capfd):
    """An exception there comes out of torch's C++, which aborts or forgets it."""
    def leave(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr("os._exit", leave)
    monkeypatch.setattr(torch.__spec__, "_initializing", True, raising=False)
    monkeypatch.setattr("analysis.cli._check_folder", lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        main(["corpus"])
    assert ended.value.code == 130
    assert capfd.readouterr().err == f"{INTERRUPTED}\n"


def of_a_checkpoint(folder: Path, tries: int) -> dict[str, Counter[str]]:
    train(MODEL, RECIPE, Corpus("shells", "", TEXT, TEXT[:400], TEXT[:400]), folder / "run")
    model, right = load_model(folder / "run"), load_model(folder / "run").state_dict()
    optimizer, checkpoint = make_optimizer(model, RECIPE), find_checkpoint(folder / "run")
    progress = load_training(checkpoint, model, optimizer)
    state = optimizer.state_dict()["state"]

    def resume() -> object:
        other = make_optimizer(model, RECIPE)
        return load_training(checkpoint, model, other), other.state_dict()["state"]

    def same(found: object) -> bool:
        (how_far, states), weights = found, model.state_dict()  # type: ignore[misc]
        return (how_far == progress and all(torch.equal(weights[n], t) for n, t in right.items())
                and all(torch.equal(states[i][k], t) for i, s in state.items()
                        for k, t in s.items()))

    return {f"checkpoint: {path.name}": damage(path, resume, same, tries)
            for path in sorted(checkpoint.iterdir())}


def of_tables(folder: Path, tries: int) -> dict[str, Counter[str]]:
    path = folder / "n.safetensors"
    whole = count(TEXT[:300], 4)
    ngram_file.save(whole, path)
    wanted = whole.log_probs(b"the sea")
    return {"n-gram file": damage(path, lambda: ngram_file.load(path),
                                  lambda m: torch.equal(m.log_probs(b"the sea"), wanted), tries)}


def of_a_run(folder: Path, tries: int) -> dict[str, Counter[str]]:
    run = write_run(folder, "tiny-1")
    seal(run)
    wanted = load_run(run)

    def same(found: object) -> bool:
        return (found.values, found.parameters, found.provenance, found.seconds) == (  # type: ignore
            wanted.values, wanted.parameters, wanted.provenance, wanted.seconds) and all(
            found.tables[n].frame.equals(t.frame) for n, t in wanted.tables.items())  # type: ignore

    return {f"run folder: {path.name}": damage(path, lambda: load_run(run), same, tries)
            for path in sorted(run.iterdir())}


@pytest.mark.parametrize("surface", [of_a_checkpoint, of_tables, of_a_run])
def test_damaged_files_are_told_or_are_the_same(surface, tmp_path):
    rows = surface(tmp_path, DAILY)
    assert all(map(unharmed, rows.values())), table(rows)


@pytest.mark.long
def test_ten_thousand_damages(tmp_path):
    rows: dict[str, Counter[str]] = {}
    for surface in (of_a_checkpoint, of_tables, of_a_run):
        rows |= surface(tmp_path, LONG + 200)
    print("\n" + table(rows))
    assert sum(row["tried"] for row in rows.values()) >= 10_000
    assert all(map(unharmed, rows.values()))


@pytest.mark.long
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT", "SIGHUP"])
def test_a_thousand_kills(name):
    rows: dict[str, Counter[str]] = {name: Counter()}
    for seed in range(25):
        rows[name] += kills(getattr(signal, name), 10, seed)
    print("\n" + table(rows))
    assert unharmed(rows[name])


@pytest.mark.long
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT", "SIGHUP"])
def test_killed_sweeps(name, tmp_path):
    write_tiny(tmp_path)
    rows = {f"sweep: {name}": sweep_kills(getattr(signal, name), 12, tmp_path)}
    print("\n" + table(rows))
    assert unharmed(rows[f"sweep: {name}"])
