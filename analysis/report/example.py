"""Five steps of the recurrence for one channel with one state, in plain Python.

Small enough to be redone with a pocket calculator; a test holds it against the definition in
mambabyte.ops. The step sizes tell the story: the third byte is nearly ignored, the fourth makes
the channel forget.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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


def worked_example() -> list[Step]:
    """The five steps from h_0 = 0."""
    steps = []
    h = total = 0.0
    for t, (u, delta, b, c) in enumerate(zip(U, DELTA, B, C, strict=True), start=1):
        decay, drive = math.exp(delta * A), delta * b * u
        h = decay * h + drive
        total += delta * A
        steps.append(Step(t, u, delta, b, c, decay, drive, h, c * h + D * u, total))
    return steps
