"""Warm-up of context and batch size: the stages, the same run in both steps, exact resume."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mambabyte.config import ModelConfig, TrainConfig
from mambabyte.corpus import Corpus
from mambabyte.errors import UserError
from mambabyte.train import Progress, train
from mambabyte.train.schedule import Stage, bytes_before, stage_at, stages

MODEL = ModelConfig(d_model=16, n_layer=1, d_state=4)
GROWING = TrainConfig(context=32, batch_size=4, n_steps=12, first_context=8, first_batch_size=2,
                      growth_fraction=0.5, checkpoint_every=100, precision="fp32", log_every=1)
TEXT = np.frombuffer(b"she sells sea shells by the sea shore, " * 60, np.uint8)
CORPUS = Corpus("shells", "a tongue twister", TEXT, TEXT[:400], TEXT[:400])


def test_stages_double_up_to_the_full_shape() -> None:
    assert stages(GROWING) == (Stage(0, 3, 2, 8), Stage(3, 6, 2, 16), Stage(6, 12, 4, 32))
    assert stages(TrainConfig(n_steps=7)) == (Stage(0, 7, 16, 1024),)
    odd = TrainConfig(context=100, batch_size=5, n_steps=10, first_context=30, growth_fraction=0.4)
    assert [s.context for s in stages(odd)] == [30, 50, 100]
    assert {s.batch_size for s in stages(odd)} == {5}
    short = TrainConfig(context=64, batch_size=4, n_steps=4, first_context=8, growth_fraction=0.98)
    assert stages(short)[-1] == Stage(3, 4, 4, 64)  # one step at least has the full shape


def test_bytes_are_those_of_the_stages() -> None:
    assert [bytes_before(n, GROWING) for n in (0, 1, 3, 4, 6, 7, 12, 99)] == [
        0, 16, 48, 80, 144, 272, 912, 912]
    assert stage_at(5, GROWING).context == 16
    assert stage_at(99, GROWING).context == 32


@pytest.mark.parametrize("change", [
    {"first_context": 33}, {"first_batch_size": 5}, {"growth_fraction": 1.0},
    {"first_context": -1}])
def test_a_start_beyond_the_end_is_refused(change: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(change))):
        TrainConfig(**{"context": 32, "batch_size": 4, **change})  # type: ignore[arg-type]


def weights(run: Path) -> torch.Tensor:
    folder = max((run / "checkpoints").glob("step_*"))
    return torch.cat([t.flatten().float() for _, t in sorted(load_file(
        next(folder.glob("model*.safetensors"))).items())])


def test_a_growing_run_is_the_same_in_both_steps_and_after_stops(tmp_path: Path) -> None:
    whole = train(MODEL, GROWING, CORPUS, tmp_path / "whole")
    assert whole["bytes_seen"] == 912
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["bytes_seen"] for line in lines] == [
        bytes_before(n, GROWING) for n in range(1, 13)]

    train(MODEL, replace(GROWING, step="graph"), CORPUS, tmp_path / "fast")
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "fast")
    assert (a - b).norm() / a.norm() < 1e-5

    def interrupt(progress: Progress) -> None:
        if progress.step in (2, 3, 7):  # inside a stage, between two, in the last
            os.kill(os.getpid(), signal.SIGINT)

    parts = tmp_path / "parts"
    steps = [train(MODEL, GROWING, CORPUS, parts, report=interrupt, resume=i > 0)["steps"]
             for i in range(4)]
    assert steps == [2, 3, 7, 12]
    assert torch.equal(a, weights(parts))
