"""Checkpoints that are not as they were written, not of this run, or of another machine."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mambabyte import checkpoint
from mambabyte.checkpoint import find_checkpoint, load_model
from mambabyte.config import ModelConfig, TrainConfig
from mambabyte.corpus import Corpus
from mambabyte.errors import UserError
from mambabyte.model import ByteLM
from mambabyte.train import train
from mambabyte.train.optim import make_optimizer

TEXT = np.frombuffer(b"she sells sea shells by the sea shore, " * 60, np.uint8)
CORPUS = Corpus("shells", "a tongue twister", TEXT, TEXT[:400], TEXT[:400])
MODEL = ModelConfig(d_model=4, n_layer=1, d_state=2, dt_rank=1, expand=1)
RECIPE = TrainConfig(context=16, batch_size=2, n_steps=4, max_seconds=0, checkpoint_every=2,
                     precision="fp32")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    train(MODEL, replace(RECIPE, n_steps=2), CORPUS, run)
    train(MODEL, replace(RECIPE, optimizer="adamw"), CORPUS, run.with_name("adamw"))
    train(MODEL, RECIPE, CORPUS, run.with_name("muon"))
    return run.parent


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained / "muon", tmp_path / "run"))


def resume(run: Path, **changes) -> None:
    train(MODEL, replace(RECIPE, **changes), CORPUS, run, resume=True)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "optimizer.safetensors",
                                  "progress.json", "manifest.json"])
def test_a_flipped_bit_is_told_and_the_last_good_one_named(name, run):
    path = find_checkpoint(run) / name
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(data), size=3):
        changed = bytearray(data)
        changed[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        if name == "manifest.json" and find_checkpoint(run) != path.parent:
            continue  # it calls itself another run's, and the one before is taken
        with pytest.raises(UserError):
            resume(run)
        if name in ("config.json", "model.safetensors"):
            with pytest.raises(UserError):
                load_model(run)


def test_the_last_good_one_is_named(run):
    for folder in ("step_00000004", "step_00000002"):
        path = run / "checkpoints" / folder / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-4] ^= 1  # the last bits of a weight
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"step_00000004.*SHA-256 is another.*") as error:
            load_model(run)
        good = f"(the last good one is {run / 'checkpoints' / 'step_00000002'})" in str(error.value)
        assert good == (folder == "step_00000004")


def test_what_has_no_checksums_says_so_and_loads(run, caplog):
    folder = find_checkpoint(run)
    load_model(run)
    assert not caplog.records
    (folder / "manifest.json").unlink()
    load_model(run)
    assert [record.getMessage() for record in caplog.records] == [
        f"note: {folder} has no checksums (made before there were any, or elsewhere): damage to it "
        "cannot be told"]


def rewrite(path: Path, change) -> None:
    """Changes tensors of a file whose folder then has no checksums to tell it by."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    (path.parent / "manifest.json").unlink(missing_ok=True)


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t["embedding.weight"].__setitem__((3, 1), float("nan")), "nan or inf in embedding"),
    (lambda t: t["embedding.weight"].__setitem__((3, 1), float("inf")), "nan or inf in embedding"),
    (lambda t: t.update({"embedding.weight": t["embedding.weight"].char()}), "in torch.int8"),
    (lambda t: t.update({"embedding.weight": t["embedding.weight"].cfloat()}), "in torch.complex"),
])
def test_weights_that_are_no_weights_are_named(change, message, run):
    rewrite(find_checkpoint(run) / "model.safetensors", change)
    with pytest.raises(UserError, match=message):
        load_model(run)


def test_imported_weights_of_another_precision_load(run, caplog):
    rewrite(find_checkpoint(run) / "model.safetensors",
            lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    assert load_model(run).embedding.weight.dtype == torch.float32
    assert "no checksums" in caplog.text


STATES = {
    "missing": lambda t: [t.pop(k) for k in list(t) if k.startswith("1.")],
    "empty": lambda t: t.clear(),
    "short": lambda t: t.pop(next(k for k in t if k.startswith("0."))),
    "broadcast": lambda t: t.update({k: v[:1].contiguous() for k, v in t.items() if v.ndim}),
    "scalar": lambda t: t.update({k: v.flatten()[0].clone() for k, v in t.items() if v.ndim}),
    "dtype": lambda t: t.update({k: v.double() for k, v in t.items()}),
    "whole": lambda t: t.update({k: v.int() for k, v in t.items()}),
    "extra": lambda t: t.update({"99.momentum": torch.zeros(2)}),
    "words": lambda t: t.update({"first.momentum": torch.zeros(2)}),
    "another's": lambda t: [
        t.update({f"0.{k}": v for k, v in {
            "momentum": t.pop("0.exp_avg"), "x": t.pop("0.exp_avg_sq")}.items()})
        if "0.exp_avg" in t else t.update({"0.exp_avg": t.pop("0.momentum")})],
    **{f"step of {value}": lambda t, value=value: t.update(
        {k: torch.tensor(value) for k in t if k.endswith(".step")})
       for value in (0.0, 1.0, -4.0, 1e18, float("nan"), float("inf"))},
}


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("name", STATES)
def test_a_wrong_state_of_the_optimizer_is_not_resumed(name, optimizer, trained, tmp_path):
    run = Path(shutil.copytree(trained / optimizer, tmp_path / "run"))
    path = find_checkpoint(run) / "optimizer.safetensors"
    rewrite(path, STATES[name])
    model = ByteLM(MODEL)
    empty = make_optimizer(model, replace(RECIPE, optimizer=optimizer))
    with pytest.raises(UserError, match=r"optimizer\.safetensors (has|lacks|is not)"):
        checkpoint.load_training(path.parent, model, empty)
    assert not empty.state


@pytest.mark.parametrize(("key", "value"), [
    ("step", True), ("step", 4.0), ("step", "4"), ("step", -1), ("step", 10**18), ("step", None),
    ("seconds", -1), ("seconds", float("nan")), ("seconds", True), ("joules", "many"),
    ("train", []),
])
def test_progress_of_the_wrong_kind_is_not_resumed(key, value, run):
    path = find_checkpoint(run) / "progress.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    (path.parent / "manifest.json").unlink()
    with pytest.raises(UserError, match=f"does not say {key} as it should"):
        resume(run)


def test_checkpoints_of_other_runs_and_steps_are_neither_read_nor_removed(run, trained):
    folder = run / "checkpoints"
    shutil.copytree(trained / "run" / "checkpoints" / "step_00000002", folder / "step_00000003")
    shutil.copytree(folder / "step_00000004", folder / "step_00000600")
    old = Path(shutil.copytree(folder / "step_00000002", folder / "step_00000001"))
    (old / "manifest.json").unlink()  # who made this one is not known
    before = {p.name for p in folder.iterdir()}
    assert find_checkpoint(run).name == "step_00000004"
    shutil.rmtree(folder / "step_00000004")
    resume(run, keep_checkpoints=1)
    assert {p.name for p in folder.iterdir()} == before - {"step_00000002"}


def test_a_run_goes_on_from_checkpoints_that_were_copied(run, tmp_path):
    new = tmp_path / "new"
    shutil.copytree(run / "checkpoints" / "step_00000002", new / "checkpoints" / "step_00000002")
    resume(new)
    assert find_checkpoint(new).name == "step_00000004"
    resume(new)


def test_two_trainings_of_one_folder_are_one_too_many(tmp_path):
    def another(progress):
        with pytest.raises(UserError, match=rf"another process \({os.getpid()}\) trains in"):
            train(MODEL, RECIPE, CORPUS, tmp_path, resume=True)

    assert train(MODEL, RECIPE, CORPUS, tmp_path, report=another)["steps"] == 4
    assert not list(tmp_path.glob(".*"))


def test_what_changes_the_order_of_sums_is_said_at_resume(run, caplog):
    threads = torch.get_num_threads()
    path = find_checkpoint(run) / "progress.json"
    assert json.loads(path.read_text())["machine"]["threads"] == threads
    resume(run)
    assert not caplog.records
    torch.set_num_threads(threads + 1)
    try:
        resume(run)
    finally:
        torch.set_num_threads(threads)
    assert f"(threads {threads}, now {threads + 1})" in caplog.text


@pytest.mark.parametrize("name", ["provenance.json", "metrics.jsonl", "config.json"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_run_folder_with_something_else_in_place_of_a_file_is_refused(name, make, run):
    (run / name).unlink()
    make(run / name)
    with pytest.raises(UserError, match=f"{name} is no file"):
        resume(run)


def test_a_pipe_in_place_of_a_file_is_not_waited_for(run):
    for name in checkpoint._FILES:
        path = find_checkpoint(run) / name
        data = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        assert find_checkpoint(run).name == "step_00000002"
        with pytest.raises(UserError):
            checkpoint._load_object(path)
        with pytest.raises(UserError):
            checkpoint._load_tensors(path)
        path.unlink()
        path.write_bytes(data)
