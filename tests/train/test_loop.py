"""The loop and its protocol: any step, any batches, and what is asked of the caller when."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from mambabyte.config import ModelConfig, TrainConfig
from mambabyte.model import ByteLM
from mambabyte.train import EagerStep, NonFiniteError, Reading, optimise
from mambabyte.train.loop import DONE
from mambabyte.train.optim import make_optimizer

MODEL = ModelConfig(d_model=8, n_layer=1, d_state=2)
RECIPE = TrainConfig(context=12, batch_size=4, n_steps=3, lr=1e-2, precision="fp32")


class Noted:
    """A step of one's own: the protocol asks for a call and a reading, no more."""

    def __init__(self, fails_at: int = 99) -> None:
        self.seen: list[tuple[str, float]] = []
        self.fails_at = fails_at

    def __call__(self, share: float, measure: bool = False) -> None:
        if len(self.seen) == self.fails_at:
            raise NonFiniteError("step 2: lost", 1)
        self.seen.append(("measured" if measure else "plain", share))

    def read(self) -> Reading:
        return Reading(1.0, 1.0, None)


def test_the_loop_asks_in_order():
    step, asked = Noted(), []
    ended = optimise(
        step, lambda number: 0.5 * number, 5, first=2, before=lambda number: number == 3,
        stop=lambda done: asked.append(("stop", done)), after=lambda done: asked.append(("after",
                                                                                         done)))
    assert ended == (5, DONE)
    assert step.seen == [("plain", 1.0), ("measured", 1.5), ("plain", 2.0)]
    assert asked == [("stop", 2), ("after", 3), ("stop", 3), ("after", 4), ("stop", 4),
                     ("after", 5)]


def test_a_word_ends_the_loop_and_an_error_passes_through():
    step = Noted()
    assert optimise(step, lambda number: 1.0, 9, stop=lambda done: "enough" if done == 2 else None
                    ) == (2, "enough")
    assert len(step.seen) == 2
    with pytest.raises(NonFiniteError, match="lost") as error:
        optimise(Noted(fails_at=1), lambda number: 1.0, 9)
    assert error.value.step == 1
    assert optimise(Noted(), lambda number: 1.0, 3, first=3) == (3, DONE)


def test_micro_batches_make_the_step_of_the_whole_batch():
    tokens = torch.randint(0, 256, (4, 13), generator=torch.Generator().manual_seed(0))
    found = []
    for parts in (1, 2, 4):
        torch.manual_seed(0)
        model = ByteLM(MODEL)
        recipe = replace(RECIPE, micro_batches=parts)
        step = EagerStep(model, make_optimizer(model, recipe), lambda _: (tokens,), recipe)
        optimise(step, lambda number: 1.0, RECIPE.n_steps)
        found.append((step.read(), torch.cat([p.detach().flatten() for p in model.parameters()])))
    (whole, weights), *others = found
    for reading, own in others:
        assert reading.loss == pytest.approx(whole.loss, rel=1e-5)
        assert reading.grad_norm == pytest.approx(whole.grad_norm, rel=1e-4)
        assert torch.allclose(own, weights, atol=1e-4)


def test_a_loss_of_ones_own_over_several_tensors():
    torch.manual_seed(0)
    model = ByteLM(MODEL)

    def last_byte(tokens: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(tokens)[0][:, -1], answer)

    batch = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([7, 8])
    step = EagerStep(model, make_optimizer(model, RECIPE), lambda _: batch,
                     replace(RECIPE, n_steps=40), loss=last_byte)
    losses: list[float] = []
    optimise(step, lambda number: 1.0, 40, after=lambda done: losses.append(step.read().loss))
    assert losses[0] == pytest.approx(math.log(256), abs=0.2)
    assert losses[-1] < 0.5 * losses[0]
