"""The synthetic tasks of the ablation study: recall and copying."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from analysis.studies.ablation import figures
from analysis.studies.ablation.synthetic import (
    IGNORE,
    accuracy,
    learn_task,
    left_chance,
    make_task,
    parse_task,
)
from mambabyte.config import ModelConfig
from mambabyte.errors import UserError
from mambabyte.model import ByteLM

SMALL = ModelConfig(d_model=16, n_layer=2, layer_pattern="MA", n_head=2, n_kv_head=2, d_state=4,
                    attention_window=32)


def test_a_seed_that_is_done_stays_in_the_mean():
    """One seed solves the task at step 20 and stops, the other stays at 0.5: the mean is 0.75."""
    rows = [(0, 10, 0.5), (0, 20, 1.0), (1, 10, 0.5), (1, 20, 0.5), (1, 30, 0.5)]
    frame = pd.DataFrame([{"task": "copy", "size": 2, "pattern": "A", "seed": seed, "step": step,
                           "accuracy": accuracy, "chance": 0.1} for seed, step, accuracy in rows])
    line = figures.tasks(frame).axes[0].lines[0]
    assert line.get_xdata().tolist() == [10, 20, 30]
    assert line.get_ydata().tolist() == [0.5, 0.75, 0.75]


def test_recall_answers_are_the_values_shown():
    task = make_task("recall", 3, 5)
    inputs, targets = task.batch(20, 0, 0)
    assert inputs.shape == (20, task.length)
    for row, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
        value_of = dict(zip(row[0:6:2], row[1:6:2], strict=True))
        assert len(value_of) == 3
        for i in (6, 8, 10):
            assert wanted[i] == value_of[row[i]] == row[i + 1]
        assert all(w == IGNORE for i, w in enumerate(wanted) if i not in (6, 8, 10))


@pytest.mark.parametrize(("answers", "symbols", "accuracy"), [
    (8, 32, 0.386), (16, 32, 0.279), (4, 8, 0.607), (1, 8, 1.0), (3, 1, 1.0)])
def test_a_guess_that_knows_what_is_left(answers: int, symbols: int, accuracy: float) -> None:
    """The closed form, against the guess played out."""
    assert left_chance(answers, symbols) == pytest.approx(accuracy, abs=1.1e-3)
    rng = np.random.default_rng(0)
    right = 0
    for _ in range(2000):
        left = rng.integers(symbols, size=answers).tolist()  # asked for from the end
        while left:
            guess = max(left, key=left.count)
            right += guess == left.pop(rng.integers(len(left)))
    assert right / (2000 * answers) == pytest.approx(accuracy, abs=0.02)


def test_copy_answers_are_the_text():
    task = make_task("copy", 4, 5)
    inputs, targets = task.batch(10, 0, 0)
    assert (inputs[:, 4] == 5).all()
    assert torch.equal(targets[:, 4:], inputs[:, :4])
    assert torch.equal(inputs[:, 5:], inputs[:, :3])
    assert (targets[:, :4] == IGNORE).all()


def test_tasks_are_seeded_and_checked():
    task = parse_task("copy 4", 5)
    assert torch.equal(task.batch(3, 1, 2)[0], task.batch(3, 1, 2)[0])
    assert not torch.equal(task.batch(3, 1, 2)[0], task.batch(3, 1, 3)[0])
    refused = (("copy", "kind and a size"), ("sort 3", "unknown"), ("recall 9", "distinct"))
    for bad, match in refused:
        with pytest.raises(UserError, match=match):
            parse_task(bad, 5)


def test_an_untrained_model_guesses_and_a_trained_one_copies():
    task = make_task("copy", 3, 4)
    config = replace(SMALL, d_model=32, embed_std=0.2, mlp_ratio=1.0)
    torch.manual_seed(0)
    untrained = ByteLM(replace(config, vocab_size=task.vocab_size))
    assert accuracy(untrained, task, 200, 0) < 0.5
    curve = learn_task(config, task, steps=150, batch=32, lr=5e-3, check_every=25)
    assert curve[-1][1] > 0.95
