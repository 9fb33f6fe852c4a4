"""What changes from step to step: the learning rate, and the shape of the windows.

Warm-up of batch size and context: a run begins with few short windows, which double. Early on a
gradient is large beside its noise, so that small batches do as well, and what is learnt first
needs little context: the saved bytes are steps. Each stage draws windows of its own shape; a
step's windows depend on (seed, step) alone, as they do without warm-up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mambabyte.config import TrainConfig

_FEWEST = 10  # steps of a warm-up that the clock ends


def schedule(step: int, config: TrainConfig, elapsed_seconds: float = 0.0) -> float:
    """Share of the peak rate at ``step``, which counts from 0.

    Linear warm-up over ``warmup_fraction`` of the steps, then a cosine to zero, or flat and then
    linear to zero over the last ``decay_fraction``. A time-aware schedule advances with the steps
    or with the clock, whichever is further on, in its warm-up too: it is at zero when
    ``max_seconds`` are over.

    The first step of the published schedule has rate 0 and does nothing; here it has 1/warmup.
    """
    warmup = warmup_steps(config)
    clock = elapsed_seconds / config.max_seconds if config.time_aware else 0.0
    # The clock also counts what comes before the first step, a compilation for one, which warms
    # nothing up: it ends no warm-up before a few steps.
    if step < warmup and (clock < config.warmup_fraction or step < _FEWEST):
        by_clock = min(1.0, clock / config.warmup_fraction, (step + 1) / _FEWEST)
        return max((step + 1) / warmup, by_clock)
    done = min(1.0, max(step / config.n_steps, clock))
    if config.schedule == "stable":
        return min(1.0, (1 - done) / config.decay_fraction)
    start = min(warmup, config.n_steps - 1) / config.n_steps
    return 0.5 * (1 + math.cos(math.pi * max(0.0, (done - start) / (1 - start))))


def warmup_steps(config: TrainConfig) -> int:
    """Steps of the warm-up where the clock does not end it earlier; 0 without one."""
    return max(1, int(config.warmup_fraction * config.n_steps)) if config.warmup_fraction else 0


def learning_rate(step: int, config: TrainConfig) -> float:
    """AdamW's rate at ``step``; Muon's is in the same proportion to its peak."""
    return config.lr * schedule(step, config)


@dataclass(frozen=True)
class Stage:
    """Steps ``first`` to ``end`` (exclusive) on ``batch_size`` windows of ``context`` bytes."""

    first: int
    end: int
    batch_size: int
    context: int

    @property
    def bytes_per_step(self) -> int:
        return self.batch_size * self.context


def stages(config: TrainConfig) -> tuple[Stage, ...]:
    """The stages of a run, in order; one without warm-up.

    ``growth_fraction`` of the steps is shared evenly by all stages but the last, which has the
    full shape. The stage before it has half of context and batch, and so on back, but no less
    than ``first_context`` and ``first_batch_size``.
    """
    starts = (config.first_context or config.context, config.first_batch_size or config.batch_size)
    doublings = max(math.ceil(math.log2(full / first)) for full, first in
                    zip((config.context, config.batch_size), starts, strict=True))
    grown = min(round(config.growth_fraction * config.n_steps), config.n_steps - 1)
    found = []
    for i in range(doublings + 1):
        first = round(grown * i / max(1, doublings))
        end = round(grown * (i + 1) / doublings) if i < doublings else config.n_steps
        halvings = doublings - i
        if end > first:
            found.append(Stage(first, end, max(starts[1], config.batch_size >> halvings),
                               max(starts[0], config.context >> halvings)))
    return tuple(found)


def stage_at(step: int, config: TrainConfig) -> Stage:
    """The stage that ``step`` belongs to; the last one past the end."""
    every = stages(config)
    return next((s for s in every if step < s.end), every[-1])


def bytes_before(step: int, config: TrainConfig) -> int:
    """Bytes of text that the steps before ``step`` have seen."""
    return sum(s.bytes_per_step * max(0, min(step, s.end) - s.first) for s in stages(config))
