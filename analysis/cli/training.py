"""What a training says while it runs and when it has ended, in words and units of the field."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mambabyte.config import ModelConfig, TrainConfig
    from mambabyte.train import Progress

# ln of float32's largest number: where exp(), and with it a cumulated sum's weight, becomes inf.
EXPONENT_LIMIT = 88.7


class Story:
    """A training of this model by this recipe, told from the ``Progress`` of its steps."""

    def __init__(self, model: ModelConfig, recipe: TrainConfig, form: str) -> None:
        """``form`` is the scan form in use; it matters to models that have one."""
        self.model, self.recipe, self.form = model, recipe, form
        self.exponent: float | None = None
        self._said: set[str] = set()

    def done(self, p: Progress) -> float:
        """Share of the run that is done, by steps or by the clock, whichever is further on."""
        cap = self.recipe.max_seconds
        return min(1.0, max(p.step / p.n_steps, p.seconds / cap if cap else 0.0))

    def place(self, p: Progress) -> str:
        """The step, and how long it is to the last one or to the cap."""
        left = p.seconds * (p.n_steps - p.step) / max(1, p.step)
        if self.recipe.max_seconds:
            left = min(left, max(0.0, self.recipe.max_seconds - p.seconds))
        return f"step {p.step}/{p.n_steps}, {clock(left)} left"

    def state(self, p: Progress) -> str:
        """Loss, speed, exponent and energy, on less than 80 columns."""
        if p.exponent is not None:  # measured at logged steps, shown until the next
            self.exponent = p.exponent
        parts = [f"loss {p.loss:.4f}", f"{p.bits_per_byte:.4f} bits/byte",
                 f"{p.bytes_per_second / 1e3:.1f} kB/s"]
        if self.exponent is not None:
            parts.append(f"exponent {self.exponent:.1f} of {EXPONENT_LIMIT}")
        if p.joules is not None:
            parts.append(f"{p.joules:.0f} J")
        return ", ".join(parts)

    def notes(self, p: Progress) -> list[str]:
        """What is worth a line of its own now, each once a run."""
        found = {"cap": self._cap(p), "exponent": self._exponent(p)}
        new = {name: text for name, text in found.items() if text and name not in self._said}
        self._said |= new.keys()
        return list(new.values())

    def _cap(self, p: Progress) -> str:
        cap, steps = self.recipe.max_seconds, self.recipe.n_steps
        if not cap or self.recipe.time_aware or p.step < 2:  # the first step also starts things
            return ""
        from mambabyte.train.schedule import warmup_steps

        last, warmup = int(p.step * cap / max(p.seconds, 1e-9)), warmup_steps(self.recipe)
        if last >= steps:
            return ""
        where = (f"inside its warm-up of {warmup} steps" if last < warmup
                 else "before its learning rate has come down")
        return (f"the cap of {cap:g} s will end this run near step {last} of {steps}, {where}: "
                "--train.time-aware fits the schedule to the cap, --train.max-seconds 0 lifts it "
                f"(about {clock(p.seconds / p.step * steps)}), and a smaller --train.context or "
                "--train.batch-size makes more steps of the same time")

    def _exponent(self, p: Progress) -> str:
        if p.exponent is None or p.exponent <= EXPONENT_LIMIT:
            return ""
        from mambabyte.config.scan_forms import FORMS

        text = (f"exponent {p.exponent:.0f} of {EXPONENT_LIMIT}: cumulated-sum forms of the scan "
                "would overflow in float32")
        if not self.model.uses_scan_form:
            return text
        fragile = FORMS[self.form].study
        return f"{text}; {self.form}, in use here, is {'one of them' if fragile else 'safe'}"

    def advice(self, record: dict[str, Any], run: Path) -> list[str]:
        """What to do next with a run that has ended."""
        lines = []
        if record["stopped_by"] == "interrupt":
            return [f"go on:       mambabyte train --out {run} --resume"]
        if record["stopped_by"] == "max_seconds" and not self.recipe.time_aware:
            lines.append(f"go on:       mambabyte train --out {run} --resume --train.max-seconds "
                         f"{2 * self.recipe.max_seconds:g}   # stopped by the cap at step "
                         f"{record['steps']} of {self.recipe.n_steps}")
        return [*lines, f"read from it: mambabyte generate {run}",
                f"look at it:   mambabyte runs show {run}"]


def describe(model: ModelConfig, recipe: TrainConfig) -> str:
    """A model and its recipe in a line."""
    return (f"{model.n_parameters / 1e6:.2f}M parameters, layers {model.layers}, context "
            f"{recipe.context}, batch {recipe.batch_size}, {recipe.n_steps} steps")


def replaced(
    model: ModelConfig, recipe: TrainConfig, smoke_model: ModelConfig, smoke_recipe: TrainConfig,
) -> str:
    """What smoke mode has put in the place of what was asked for."""
    return (f"note: smoke mode trains {describe(smoke_model, smoke_recipe)} in place of "
            f"{describe(model, recipe)}: it checks the parts, and says nothing about quality. A "
            "text of 10,000 training bytes or more, without SMOKE_TEST_ONLY, trains what was asked")


def clock(seconds: float) -> str:
    """A duration as people say it: 0:07, 12:30, 3 h 05 min."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 60}:{whole % 60:02}"
