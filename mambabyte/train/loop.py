"""The training loop: every training of this project, long or short, is a call of ``optimise``."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from mambabyte.train.step import Step

DONE = "n_steps"


class Ended(NamedTuple):
    """How far a loop came: steps done since the run's beginning, and what ended it."""

    steps: int
    stopped_by: str  # DONE, or the word that ``stop`` gave


def optimise(
    step: Step, share: Callable[[int], float], end: int, *, first: int = 0,
    stop: Callable[[int], str | None] = lambda done: None,
    before: Callable[[int], bool] = lambda number: False,
    after: Callable[[int], None] = lambda done: None,
) -> Ended:
    """Call ``step`` until ``end`` steps are done, of which ``first`` were before.

    ``share(number)`` is the share of the peak learning rates at step ``number``, which counts from
    0. ``stop(done)`` is asked before every step, for a word why to end here (None: go on);
    ``before(number)`` whether the step shall measure exponents; ``after(done)`` is for what is
    looked at and kept between steps. What the step raises, NonFiniteError above all, passes
    through: the caller knows what a diverged run means to it.
    """
    for number in range(first, end):
        word = stop(number)
        if word is not None:
            return Ended(number, word)
        step(share(number), measure=before(number))
        after(number + 1)
    return Ended(max(first, end), DONE)
