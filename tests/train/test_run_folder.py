"""What a run folder keeps: old runs, stopped runs, files that are not ours."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from analysis.cli import main
from analysis.cli.console import Bar, say
from mambabyte import checkpoint
from mambabyte.checkpoint import load_model
from mambabyte.config import ModelConfig, TrainConfig
from mambabyte.config.files import to_json
from mambabyte.corpus import Corpus
from mambabyte.errors import UserError
from mambabyte.train import Progress, read_metrics, train
from mambabyte.train import metrics as metrics_module
from mambabyte.train.metrics import drop_after
from mambabyte.train.optim import make_optimizer
from mambabyte.train.signals import ASKED
from mambabyte.train.step import EagerStep

OLD_RUN = Path(__file__).parent / "old_run"  # of commit 8c9db56, four steps, kept at the second
TEXT = np.frombuffer(b"she sells sea shells by the sea shore, " * 60, np.uint8)
CORPUS = Corpus("shells", "a tongue twister", TEXT, TEXT[:400], TEXT[:400])
MODEL = ModelConfig(d_model=4, n_layer=1, d_state=2, dt_rank=1, expand=1)
RECIPE = TrainConfig(context=16, batch_size=2, n_steps=4, lr=1e-2, max_seconds=0, log_every=1,
                     checkpoint_every=2, precision="fp32")


def test_an_old_run_is_read_and_goes_on_as_it_did(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(OLD_RUN, run)
    then = read_metrics(run / "metrics.jsonl")
    assert [p.step for p in then] == [1, 2, 3, 4]
    assert then[0].exponent == pytest.approx(1.902787)  # it was called headroom
    train(MODEL, RECIPE, CORPUS, run, resume=True)
    now = read_metrics(run / "metrics.jsonl")
    assert now[:2] == then[:2]
    for a, b in zip(now[2:], then[2:], strict=True):
        assert (a.step, a.loss, a.exponent) == (b.step, pytest.approx(b.loss, rel=1e-5),
                                                pytest.approx(b.exponent, rel=1e-5))


@pytest.mark.parametrize("number", ASKED, ids=lambda number: number.name)
def test_each_signal_that_asks_leaves_a_checkpoint(number, tmp_path):
    signal.signal(number, signal.SIG_DFL)  # nohup, for one, has a signal ignored
    before = [signal.getsignal(each) for each in ASKED]

    def kill(progress: Progress) -> None:
        if progress.step == 3:
            os.kill(os.getpid(), number)

    result = train(MODEL, RECIPE, CORPUS, tmp_path / "run", report=kill)
    assert (result["stopped_by"], result["steps"]) == ("interrupt", 3)
    assert checkpoint.find_checkpoint(tmp_path / "run").name == "step_00000003"
    assert [signal.getsignal(each) for each in ASKED] == before


@pytest.mark.parametrize("number", ASKED)
def test_a_signal_that_is_ignored_stays_ignored(number, tmp_path):
    """As SIGHUP is under nohup, and SIGINT in what a script puts behind &."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        result = train(MODEL, RECIPE, CORPUS, tmp_path / "run",
                       report=lambda progress: os.kill(os.getpid(), number))
    finally:
        signal.signal(number, before)
    assert result["stopped_by"] == "n_steps"


def test_a_saved_step_is_never_written_again(tmp_path, monkeypatch):
    written = []
    real = checkpoint.save_training

    def counted(folder, model, optimizer, progress):
        written.append(progress["step"])
        return real(folder, model, optimizer, progress)

    def stop_at(step):
        return lambda progress: progress.step == step and os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(checkpoint, "save_training", counted)
    run = tmp_path / "run"
    train(MODEL, RECIPE, CORPUS, run, report=stop_at(2))  # where one is due anyway
    assert written == [2]
    capped = train(MODEL, replace(RECIPE, max_seconds=1e-9), CORPUS, run, resume=True)
    assert capped["stopped_by"] == "max_seconds"
    train(MODEL, RECIPE, CORPUS, run, resume=True)
    train(MODEL, RECIPE, CORPUS, run, resume=True)  # nothing is left to do
    assert written == [2, 4]


def test_only_complete_checkpoints_of_ours_are_read_or_pruned(tmp_path):
    run = tmp_path / "run"
    train(MODEL, RECIPE, CORPUS, run)
    folder = run / "checkpoints"
    shutil.copytree(folder / "step_00000004", folder / "step_00000600.bak")
    (folder / "step_00000900").mkdir()
    (folder / "step_00000900" / "notes.txt").write_text("mine")
    (folder / "step_00000004" / "model.safetensors").unlink()
    assert checkpoint.find_checkpoint(run).name == "step_00000002"
    train(MODEL, replace(RECIPE, keep_checkpoints=1), CORPUS, run, resume=True)
    assert {p.name for p in folder.iterdir()} == {
        "step_00000004", "step_00000600.bak", "step_00000900"}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_turned_off_around_a_training_are_its_own(mode, tmp_path):
    expected = train(MODEL, RECIPE, CORPUS, str(tmp_path / "a"))  # a path may be text
    with mode():
        found = train(MODEL, RECIPE, CORPUS, tmp_path / "b")
    assert found["valid_bits_per_byte"] == expected["valid_bits_per_byte"]


@pytest.mark.parametrize(("given", "line"), [
    ({"run": None}, "the run folder is None: expected a path"),
    ({"model_config": RECIPE}, "stands where a ModelConfig is expected: ModelConfig makes one"),
    ({"config": {}}, "{} stands where a TrainConfig is expected"),
    ({"corpus": "stdlib"}, "'stdlib' stands where a Corpus is expected: load_corpus makes one"),
    ({"evaluate_bytes": -1}, "evaluate_bytes is -1: expected a whole number from 0"),
])
def test_arguments_of_another_kind_are_one_line(given, line, tmp_path):
    usual = {"model_config": MODEL, "config": RECIPE, "corpus": CORPUS, "run": tmp_path / "run"}
    with pytest.raises(UserError, match=re.escape(line)) as caught:
        train(**usual | given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_weights_are_float32_whatever_the_defaults_of_torch_are(tmp_path):
    expected = train(MODEL, RECIPE, CORPUS, tmp_path / "a")
    torch.set_default_device("meta")
    try:
        assert train(MODEL, RECIPE, CORPUS, tmp_path / "b")["valid_bits_per_byte"] == (
            expected["valid_bits_per_byte"])
        torch.set_default_dtype(torch.bfloat16)
        with pytest.raises(UserError, match=r"torch's default type is torch\.bfloat16"):
            train(MODEL, RECIPE, CORPUS, tmp_path / "c")
        found = checkpoint.load_model(str(tmp_path / "a")).state_dict()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    wanted = checkpoint.load_model(tmp_path / "a").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_nothing_is_resumed_where_there_is_no_run(tmp_path, capsys):
    """A misspelt folder is no wish for the default run of a minute."""
    assert main(["train", "--out", str(tmp_path / "fisrt"), "--resume"]) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path / 'fisrt'} holds no run to resume")
    assert not (tmp_path / "fisrt").exists()


def test_a_script_may_resume_from_its_first_start_on(tmp_path, monkeypatch):
    monkeypatch.setattr("analysis.cli.models.train._train", lambda *options: 0)
    words = ["train", "--device", "cpu", "--out", str(tmp_path / "run"), "--resume"]
    for said in (("--preset", "auto"), ("--preset=quick_start",), ("--corpus", "synthetic")):
        assert main([*words, *said]) == 0


def test_a_run_whose_checkpoints_cannot_be_read_does_not_begin_anew(tmp_path, forbid):
    run = tmp_path / "run"
    train(MODEL, RECIPE, CORPUS, run)
    before = (run / "metrics.jsonl").read_text()
    forbid(run / "checkpoints")
    with pytest.raises(PermissionError, match="checkpoints"):
        train(MODEL, RECIPE, CORPUS, run, resume=True)
    assert (run / "metrics.jsonl").read_text() == before
    with pytest.raises(PermissionError, match="checkpoints"):
        checkpoint.find_checkpoint(run)


def test_a_kill_while_metrics_are_cut_loses_no_record(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    shutil.copy(OLD_RUN / "metrics.jsonl", path)
    before = path.read_text()

    def killed(name):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(metrics_module, "whole_file", killed)
        with pytest.raises(KeyboardInterrupt):
            drop_after(path, 2)
    assert path.read_text() == before
    drop_after(path, 2)
    assert path.read_text() == "".join(before.splitlines(keepends=True)[:2])


def test_a_dead_standard_error_ends_no_training(tmp_path, monkeypatch):
    """As with ``2>&1 | tee log`` and Ctrl-C, which ends tee first."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as dead:
        monkeypatch.setattr("sys.stderr", dead)
        say("nobody reads this")
        with Bar("training") as bar:
            result = train(MODEL, RECIPE, CORPUS, tmp_path / "run",
                           report=lambda p: bar(p.step / p.n_steps, line=True))
    assert result["stopped_by"] == "n_steps"


def test_a_metric_that_is_not_finite_is_read_back(tmp_path):
    values = dict.fromkeys((f.name for f in fields(Progress)), 1.0) | {"exponent": math.inf}
    path = tmp_path / "metrics.jsonl"
    path.write_text(to_json(values) + "\n")
    assert read_metrics(path) == [Progress(**values)]


def test_a_card_that_is_lost_costs_the_steps_since_the_checkpoint(tmp_path, monkeypatch, capsys):
    words = ["train", "--preset", "smoke", "--device", "cpu", "--train.n-steps", "4",
             "--train.checkpoint-every", "2", "--out", str(tmp_path / "run")]
    update = EagerStep.update

    def lost(step):
        if step.index == 2:
            raise RuntimeError("CUDA error: unspecified launch failure\nFor debugging consider ...")
        update(step)

    with monkeypatch.context() as patch:
        patch.setattr(EagerStep, "update", lost)
        assert main(words) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: the GPU failed (CUDA error: unspecified launch failure)")
    assert "--resume" in line
    assert [path.name for path in checkpoint.saved(tmp_path / "run")] == ["step_00000002"]
    assert main([*words, "--resume"]) == 0


# --- checkpoints ---------------------------------------------------------------------------------


def test_broken_checkpoints(tmp_path):
    run = tmp_path / "run"
    train(MODEL, RECIPE, CORPUS, run)
    folder = checkpoint.find_checkpoint(run)
    with pytest.raises(UserError, match="holds no checkpoint"):
        load_model(tmp_path)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="missing, truncated or damaged"):
        load_model(run)
    (folder / "model.safetensors").write_bytes(data)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"d_state": 5}))
    with pytest.raises(UserError, match="another shape"):
        load_model(run)
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 2}))
    with pytest.raises(UserError, match="another model"):
        load_model(run)
    (folder / "config.json").write_text(json.dumps(config | {"colour": 1}))
    with pytest.raises(UserError, match="unknown field 'colour'"):
        load_model(run)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load_model(run)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    train(MODEL, replace(RECIPE, checkpoint_every=1), CORPUS, tmp_path / "run")
    names = sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["step_00000003", "step_00000004"]


def test_a_failing_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    run = tmp_path / "run"
    train(MODEL, RECIPE, CORPUS, run)
    model = load_model(run)
    optimizer = make_optimizer(model, RECIPE)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_json", full)
    with pytest.raises(UserError, match="No space left on device; nothing of it was left"):
        checkpoint.save_training(run / "checkpoints", model, optimizer, {"step": 9})
    for name, weight in load_model(run).state_dict().items():
        assert weight.equal(model.state_dict()[name])
    assert not list((run / "checkpoints").glob(".*"))


def test_a_disk_without_room_for_a_checkpoint_is_told_before_a_step(tmp_path, monkeypatch):
    def has_free(n: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=n))

    has_free(8 * MODEL.n_parameters - 1)
    with pytest.raises(UserError, match=r"a checkpoint takes .* or more: make room"):
        train(MODEL, RECIPE, CORPUS, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
    has_free(8 * MODEL.n_parameters)
    train(MODEL, RECIPE, CORPUS, tmp_path / "run")
    assert checkpoint.saved(tmp_path / "run")


def test_tied_head_is_stored_once(tmp_path):
    train(MODEL, RECIPE, CORPUS, tmp_path / "run")
    folder = checkpoint.find_checkpoint(tmp_path / "run")
    stored = load_file(folder / "model.safetensors")
    assert sum(weight.numel() for weight in stored.values()) == MODEL.n_parameters
    assert asdict(load_model(folder).config) == asdict(MODEL)
