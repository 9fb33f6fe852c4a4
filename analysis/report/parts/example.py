"""Five steps of the recurrence for one channel with one state, in plain Python, and what becomes of
them when a sum of two factors takes the place of the loop.

Small enough to be redone with a pocket calculator; a test holds it against the definition in
mambabyte.ops. The step sizes tell the story: the third byte is nearly ignored, the fourth makes
the channel forget.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

A = -1.0  # continuous decay rate
D = 0.5  # skip from input to output
DELTA = (0.5, 0.5, 0.01, 3.0, 0.5)  # step sizes, one a byte: how much each byte counts
U = (1.0, 2.0, 5.0, 1.0, -1.0)  # inputs
B = (1.0, 1.0, 1.0, 1.0, 1.0)
C = (1.0, 1.0, 1.0, 1.0, 2.0)


@dataclass(frozen=True)
class Step:
    """One step; names as in the recurrence."""

    t: int
    u: float
    delta: float
    B: float
    C: float
    decay: float  # exp(delta A), what is kept of the state
    drive: float  # delta B u, what is added
    h: float
    y: float
    log_decay: float  # sum of delta A so far: what the log-cumsum trick exponentiates
    shrinking: float  # exp(log_decay)
    growing: float  # exp(-log_decay), what each input is multiplied by in the sum
    total: float  # sum of growing * drive so far
    by_factors: float  # shrinking * total: h again
    published: float  # the published formula's state, a (h + b): the input decays once more


def worked_example() -> list[Step]:
    """The five steps from h_0 = 0."""
    steps = []
    h = published = log_decay = total = 0.0
    for t, (u, delta, b, c) in enumerate(zip(U, DELTA, B, C, strict=True), start=1):
        decay, drive = math.exp(delta * A), delta * b * u
        h = decay * h + drive
        published = decay * (published + drive)
        log_decay += delta * A
        shrinking, growing = math.exp(log_decay), math.exp(-log_decay)
        total += growing * drive
        steps.append(Step(t, u, delta, b, c, decay, drive, h, c * h + D * u, log_decay, shrinking,
                          growing, total, shrinking * total, published))
    return steps


@dataclass(frozen=True)
class Repeat:
    """The five steps and then the fourth so many times more, by two factors in float32 and by the
    loop in float64."""

    more: int
    exponent: float  # -log_decay at the end
    growing: float  # exp(exponent)
    total: float
    by_factors: float
    h: float


def repeated(more: int = 40) -> list[Repeat]:
    """The fourth step after the five, again and again. The factors are computed in float32, so inf
    is what single precision gives and nothing that was put in."""
    rows: list[Repeat] = []
    steps = worked_example()
    h, log_decay, total = 0.0, 0.0, np.float32(0.0)
    with np.errstate(over="ignore", invalid="ignore"):
        for i, step in enumerate([*steps, *[steps[3]] * more]):
            h = step.decay * h + step.drive
            log_decay += step.delta * A
            growing = np.exp(np.float32(-log_decay))
            total = total + growing * np.float32(step.drive)
            state = np.exp(np.float32(log_decay)) * total
            if i >= len(steps) - 1:
                rows.append(Repeat(i - len(steps) + 1, -log_decay, float(growing), float(total),
                                   float(state), h))
    return rows


def first_lost() -> Repeat:
    """The first repetition whose sum is not finite."""
    return next(row for row in repeated() if not math.isfinite(row.total))


def example_table() -> pd.DataFrame:
    """The recurrence, a row a step."""
    return pd.DataFrame([
        {"step t": s.t, "input u": s.u, "step size\u00a0Δ": s.delta, "B": s.B, "C": s.C,
         "decay exp(Δ\u00a0A)": s.decay, "drive Δ\u00a0B\u00a0u": s.drive,
         "state h": s.h, "output y": s.y} for s in worked_example()])


def failure_table() -> pd.DataFrame:
    """The same steps by two factors, and by the published formula."""
    return pd.DataFrame([
        {"step t": s.t, "sum s of Δ\u00a0A": s.log_decay, "exp(s)": s.shrinking,
         "exp(−s)": s.growing, "sum of exp(−s)\u00a0Δ\u00a0B\u00a0u": s.total,
         "exp(s) × sum": s.by_factors, "state h": s.h, "published a\u00a0(h\u00a0+\u00a0b)":
         s.published} for s in worked_example()])


def repeat_table() -> pd.DataFrame:
    """The fourth step again and again, to where the sum is lost and once more."""
    last = first_lost().more
    return pd.DataFrame([
        {"fourth step, times more": r.more, "exponent −s": r.exponent, "exp(−s), float32":
         r.growing, "sum, float32": r.total, "exp(s) × sum, float32": r.by_factors,
         "state h by the loop": r.h}
        for r in repeated(last + 1) if r.more in (0, 1, 2, 10, 20) or r.more >= last - 1])
