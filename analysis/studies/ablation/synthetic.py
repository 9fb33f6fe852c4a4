"""Synthetic tasks that ask one thing of a sequence mixer: recall by key, and copying.

Tokens are small integers, not text. Every sample is drawn anew from (seed, step), so there is no
training set to memorise and accuracy is accuracy on unseen data. The loss and the accuracy count
the answer positions alone. Beside every accuracy stands what a guess reaches that keeps track of
the answers given so far: it knows which are left, and nothing of where each belongs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.studies.ablation import task_size
from mambabyte.config import ModelConfig, TrainConfig
from mambabyte.errors import UserError
from mambabyte.model import ByteLM
from mambabyte.train import EagerStep, optimise
from mambabyte.train.optim import make_optimizer
from mambabyte.train.schedule import schedule

IGNORE = -100  # positions that neither loss nor accuracy counts
LEARNED = 0.999  # accuracy at which a training ends early
SAMPLES = 256  # that an accuracy is measured on


@dataclass(frozen=True)
class Task:
    """A generator of (inputs, targets) batches and what they ask."""

    name: str
    about: str
    size: int  # pairs to recall, or symbols to copy
    symbols: int
    vocab_size: int
    length: int  # inputs per sample
    draw: Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]

    @property
    def chance(self) -> float:
        """Accuracy of a guess that knows which answers are left (``left_chance``), as a model may
        that has recalled nothing: every answer is fed back to it."""
        return left_chance(self.size, self.symbols)

    def batch(self, size: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each (size, length) int64; targets are IGNORE but at answers."""
        inputs, targets = self.draw(np.random.default_rng([seed, step]), size)
        return torch.from_numpy(inputs), torch.from_numpy(targets)


def left_chance(answers: int, symbols: int) -> float:
    """Expected accuracy of naming the most frequent of the answers that are left.

    The ``answers`` are drawn from ``symbols`` with replacement and asked for in an order that says
    nothing. With r of them left the guess is right with probability M_r / r, where M_r is the
    largest count of a symbol among r draws; so the accuracy is the mean of E[M_r] / r over
    r = 1 .. answers. Exact: P(M_r <= m) = r! [x^r] (sum_{j <= m} x^j / j!)^symbols / symbols^r.
    """
    terms = [Fraction(1, math.factorial(j)) for j in range(answers + 1)]
    expected = [Fraction(0)] * (answers + 1)  # E[M_r] = sum over m >= 0 of P(M_r > m)
    for m in range(answers + 1):
        at_most = _power(terms[: m + 1], symbols, answers)
        for r in range(m + 1, answers + 1):
            expected[r] += 1 - at_most[r] * math.factorial(r) / Fraction(symbols) ** r
    return float(sum(expected[r] / r for r in range(1, answers + 1)) / answers)


def _power(polynomial: list[Fraction], exponent: int, degree: int) -> list[Fraction]:
    """Coefficients up to ``degree`` of a polynomial whose first one is 1, to a power."""
    p = [*polynomial, *[Fraction(0)] * (degree + 1 - len(polynomial))]
    found = [Fraction(1)]
    for n in range(1, degree + 1):  # from p (p^k)' = k p' p^k, coefficient by coefficient
        found.append(sum((Fraction((exponent + 1) * k - n) * p[k] * found[n - k]
                          for k in range(1, n + 1)), Fraction(0)) / n)
    return found


def recall_task(pairs: int, symbols: int = 16) -> Task:
    """Associative recall with many queries: ``pairs`` key-value pairs, then every key again.

    A sample reads ``k v k v ... k v  k ? k ? ...`` with distinct keys and the queries in another
    random order; the answer to a key is the value it came with, and is given after each query,
    so a sample is 4 * pairs tokens. Keys and values are disjoint sets of ``symbols`` tokens each.
    """
    if not 1 <= pairs <= symbols:
        raise UserError(f"recall of {pairs} pairs needs 1 to {symbols} pairs: keys are distinct")

    def draw(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
        keys = rng.permuted(np.tile(np.arange(symbols), (size, 1)), axis=1)[:, :pairs]
        values = rng.integers(symbols, 2 * symbols, (size, pairs))
        order = rng.permuted(np.tile(np.arange(pairs), (size, 1)), axis=1)
        rows = np.arange(size)[:, None]
        shown = np.stack([keys, values], -1).reshape(size, -1)
        asked = np.stack([keys[rows, order], values[rows, order]], -1).reshape(size, -1)
        inputs = np.concatenate([shown, asked], 1)
        targets = np.full_like(inputs, IGNORE)
        targets[:, 2 * pairs :: 2] = values[rows, order]  # read off at the query key
        return inputs, targets

    return Task("recall", f"{pairs} key-value pairs, each asked for once", pairs, symbols,
                2 * symbols, 4 * pairs, draw)


def copy_task(size: int, symbols: int = 16) -> Task:
    """Copying: ``size`` random symbols, a separator, then the same symbols in the same order."""
    if size < 1:
        raise UserError(f"a copy of {size} symbols: it must be at least 1")

    def draw(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, np.ndarray]:
        text = rng.integers(0, symbols, (batch, size))
        separator = np.full((batch, 1), symbols)
        inputs = np.concatenate([text, separator, text[:, :-1]], 1)
        targets = np.full_like(inputs, IGNORE)
        targets[:, size:] = text
        return inputs, targets

    return Task("copy", f"{size} symbols repeated after a separator", size, symbols,
                symbols + 1, 2 * size, draw)


TASKS: dict[str, Callable[[int, int], Task]] = {"recall": recall_task, "copy": copy_task}


def make_task(name: str, size: int, symbols: int = 16) -> Task:
    if name not in TASKS:
        raise UserError(f"task {name!r} is unknown: choose one of {', '.join(TASKS)}")
    return TASKS[name](size, symbols)


def parse_task(text: str, symbols: int = 16) -> Task:
    """The task written as its kind and size, such as ``recall 4`` or ``copy 16``."""
    kind, size = task_size(text)
    return make_task(kind, size, symbols)


@torch.no_grad()
def accuracy(model: ByteLM, task: Task, samples: int, seed: int) -> float:
    """Share of answers whose most probable symbol is right, on samples never trained on."""
    device = model.embedding.weight.device
    inputs, targets = task.batch(samples, seed, 2**31)  # a step that no training reaches
    logits, _ = model(inputs.to(device))
    asked = targets != IGNORE
    return float((logits.argmax(-1).cpu() == targets)[asked].double().mean())


def learn_task(
    config: ModelConfig, task: Task, *, steps: int, batch: int = 32, lr: float = 3e-3,
    seed: int = 0, device: str = "cpu", check_every: int = 0,
) -> list[tuple[int, float]]:
    """Train a model of ``config`` on ``task``; returns (step, accuracy) pairs, the last at the end.

    The head sees the task's own vocabulary, and attention looks back over the whole sample.
    Training stops early once an accuracy of LEARNED has been measured.
    """
    config = replace(config, vocab_size=task.vocab_size,
                     attention_window=max(config.attention_window, task.length))
    torch.manual_seed(seed)
    model = ByteLM(config).to(device)
    recipe = TrainConfig(lr=lr, n_steps=steps, weight_decay=0.0, context=task.length,
                         precision="fp32")
    curve: list[tuple[int, float]] = []

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        logits, _ = model(inputs)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(),
                               ignore_index=IGNORE)

    def batches(step: int) -> tuple[Tensor, ...]:
        return tuple(t.to(device) for t in task.batch(batch, seed, step))

    def look(done: int) -> None:
        if done == steps or (check_every and done % check_every == 0):
            curve.append((done, accuracy(model, task, SAMPLES, seed)))

    optimise(EagerStep(model, make_optimizer(model, recipe), batches, recipe, loss=loss),
             partial(schedule, config=recipe), steps, after=look,
             stop=lambda done: "learned" if curve and curve[-1][1] >= LEARNED else None)
    return curve
