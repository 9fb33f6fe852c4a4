"""Training a model on text for a comparison: a curve of held-out bits, and what each step cost."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from mambabyte.config import ModelConfig, TrainConfig
from mambabyte.energy import EnergyMeter
from mambabyte.model import ByteLM
from mambabyte.train import Step, autocast, optimise, text_step
from mambabyte.train.captured import CapturedStep, Windows, prepare, window_starts
from mambabyte.train.optim import make_optimizer
from mambabyte.train.schedule import schedule

LN2 = math.log(2)
BLOCK = 20  # steps between two looks at the device
COMPILED = 64  # most layers of different shape that a study compiles


@dataclass(frozen=True)
class Learned:
    """A trained model, its held-out curve and its cost.

    ``curve`` is (step, bits per byte) from step 0 on; ``step_seconds`` is the median over steps,
    so a pause of the machine does not count; ``joules`` is None where no counter was read. The
    first BLOCK steps of a longer run, which compile and fill caches, cost what the later ones do.
    """

    model: ByteLM
    curve: list[tuple[int, float]]
    steps: int
    step_seconds: float
    joules: float | None
    energy_source: str
    stopped_early: bool


def constant_rate(config: TrainConfig) -> TrainConfig:
    """The same recipe with a rate that stays at its peak after the same warm-up steps.

    Every point of such a run's curve is a fair end of a run, so one run answers all budgets. It
    ends higher than a run whose rate decays to zero.
    """
    warmup = max(1, int(config.warmup_fraction * config.n_steps))
    horizon = 10_000 * config.n_steps  # the cosine has hardly begun when the run ends
    return replace(config, n_steps=horizon, warmup_fraction=warmup / horizon)


def learn_text(
    config: ModelConfig, recipe: TrainConfig, train: np.ndarray, *, device: str = "cpu",
    decay: bool = False, evaluations: int = 6, windows: Tensor | None = None,
    max_seconds: float = 0.0,
) -> Learned:
    """Train ``config`` on the ids ``train``, bytes or pieces, for ``recipe.n_steps`` steps.

    ``decay`` follows the recipe's cosine to zero, otherwise the rate is constant after warm-up.
    ``windows`` (n, context + 1) are held-out bytes, scored ``evaluations`` times along the way
    and before the first step. ``max_seconds`` ends the run early. On CUDA the step is captured as
    one graph, so that a system is not judged by its count of kernel launches, unless
    ``recipe.step`` is "eager"; "compile" compiles its layers too.
    """
    torch.manual_seed(recipe.seed)
    model = ByteLM(config).to(device)
    rate = recipe if decay else constant_rate(recipe)
    on_gpu = model.device.type == "cuda" and recipe.step != "eager"
    step = (captured_text_step if on_gpu else text_step)(model, train, recipe)
    follow = _Follow(model, step, recipe, windows, device, evaluations, max_seconds,
                     look_every=BLOCK if on_gpu else 1)
    # torch stops compiling a function for the ninth time; all systems share one.
    limit = torch._dynamo.config.patch(recompile_limit=COMPILED) if on_gpu else nullcontext()
    with limit:
        steps, _ = optimise(step, partial(schedule, config=rate), recipe.n_steps,
                            stop=follow.stop, after=follow.after)
    return follow.learned(steps)


class _Follow:
    """Times the steps of a training, scores it on the way, and takes its energy without that.

    A captured step is looked at once a block of ``look_every``, and its time is that of the block,
    spread over it: the first block holds the warm-up and the capture, and counts no more than
    any other.
    """

    def __init__(
        self, model: ByteLM, step: Step, recipe: TrainConfig, windows: Tensor | None, device: str,
        evaluations: int, max_seconds: float, look_every: int,
    ) -> None:
        self.model, self.step, self.windows, self.device = model, step, windows, device
        self.n_steps, self.max_seconds, self.look_every = recipe.n_steps, max_seconds, look_every
        self.at = {round(recipe.n_steps * (i + 1) / evaluations) for i in range(evaluations)}
        self.metered = BLOCK if recipe.n_steps > BLOCK else 0  # the step that the meter starts at
        self.curve = [] if windows is None else [(0, heldout_bits(model, windows))]
        self.seconds: list[float] = []
        self.meter, self.outside = EnergyMeter(device), 0.0  # joules spent on scoring
        self.began = self.looked = time.perf_counter()
        self.looked_at, self.late = 0, False

    def stop(self, done: int) -> str | None:
        return "max_seconds" if self.late else None

    def after(self, done: int) -> None:
        point = done in self.at or done in (self.metered, self.n_steps)
        if not point and done - self.looked_at < self.look_every:
            return
        self.step.read()  # waits for the device; NonFiniteError ends the training
        count = done - self.looked_at
        self.seconds += [(time.perf_counter() - self.looked) / count] * count
        self.looked_at = done
        self.late = bool(self.max_seconds) and (
            time.perf_counter() - self.began > self.max_seconds)
        if self.windows is not None and (done in self.at or self.late):
            before = self.meter.read().joules
            self.curve.append((done, heldout_bits(self.model, self.windows)))
            after = self.meter.read().joules
            self.outside += (after - before) if after is not None and before is not None else 0.0
        if done == self.metered:
            self.meter, self.outside = EnergyMeter(self.device), 0.0
        self.looked = time.perf_counter()

    def learned(self, steps: int) -> Learned:
        energy = self.meter.read()
        joules = None
        if energy.joules is not None and steps > self.metered:
            joules = (energy.joules - self.outside) * steps / (steps - self.metered)
        return Learned(self.model, self.curve, steps, float(np.median(self.seconds)), joules,
                       energy.source, steps < self.n_steps)


def captured_text_step(model: ByteLM, train: np.ndarray, recipe: TrainConfig) -> Step:
    """What ``text_step`` is, as one CUDA graph."""
    prepare(model, recipe)
    text = torch.from_numpy(np.array(train)).to(model.device)
    return CapturedStep(model, model.loss, make_optimizer(model, recipe, on_device=True),
                        Windows(text, recipe.context), window_starts(len(text), recipe), recipe)


@torch.no_grad()
def heldout_bits(model: ByteLM, windows: Tensor) -> float:
    """Mean bits per byte of windows (n, context + 1), each scored from an empty state."""
    return float(window_bits(model, windows).mean())


@torch.no_grad()
def window_bits(model: ByteLM, windows: Tensor) -> np.ndarray:
    """Bits per byte of each window (n,), scored from an empty state.

    By the model as it is written: what training compiled is for its own shapes.
    """
    bits = []
    with autocast(model.device, "auto"):
        for part in windows.split(32):
            tokens = part.to(model.device)
            nats = F.cross_entropy(model(tokens[:, :-1])[0].float().flatten(0, 1),
                                   tokens[:, 1:].flatten(), reduction="none")
            bits.append(nats.view(len(part), -1).mean(1) / LN2)
    return torch.cat(bits).double().cpu().numpy()


def heldout_windows(data: np.ndarray, context: int, count: int) -> Tensor:
    """``count`` windows of context + 1 bytes at even distances over the split."""
    starts = np.linspace(0, len(data) - context - 1, count).astype(int)
    return torch.from_numpy(np.stack([data[s : s + context + 1] for s in starts])).long()


def bits_at(curve: list[tuple[int, float]], step: float) -> float:
    """Bits per byte at ``step`` of a curve, linear between two scorings; its end past the end."""
    steps, bits = zip(*curve, strict=True)
    return float(np.interp(step, steps, bits))


@torch.inference_mode()
def position_bits(
    model: ByteLM, streams: Tensor, context: int, *, piece: int = 4096,
    unbounded: bool = False,
) -> pd.DataFrame:
    """Bits per byte by position in a long stream, beside fresh windows over the same bytes.

    ``streams`` (n, length + 1) are scored once as a stream, the state carried from end to end,
    and once in windows of ``context`` at half-context strides, of which the second half counts
    (each byte then has between context / 2 and context bytes of past). Both score the same
    bytes, so ``drift_bits`` = stream - windows is free of how hard those bytes are; it is None
    before context / 2, where there is no fresh window. ``unbounded`` lets attention keep every
    key, which is how a model without a sliding window streams.

    One row a bin: from context / 4 on the bins double.
    """
    device = model.embedding.weight.device
    length = streams.shape[1] - 1
    half = context // 2

    restart = torch.full((len(streams), length), float("nan"))
    for start in range(0, length - context + 1, half):
        part = streams[:, start : start + context + 1]
        logits, _ = model(part[:, :-1].to(device))
        restart[:, start + half : start + context] = _nats(logits, part[:, 1:])[:, half:]

    if unbounded:
        model = model.reconfigured(attention_window=length + 1)
    stream, state = [], None
    for start in range(0, length, piece):
        part = streams[:, start : start + piece + 1]
        logits, state = model(part[:, :-1].to(device), state)
        stream.append(_nats(logits, part[:, 1:]))

    nats = torch.cat(stream, 1)
    edges = [0, context // 4]
    while edges[-1] < length:
        edges.append(min(2 * edges[-1], length))
    rows = []
    for low, high in pairwise(edges):
        bits = float(nats[:, low:high].mean()) / LN2
        fresh = restart[:, low:high]
        covered = ~fresh.isnan()
        drift = (
            float((nats[:, low:high] - fresh)[covered].mean()) / LN2
            if low >= half and covered.any() else None
        )
        rows.append({"first_position": low, "last_position": high - 1, "bits_per_byte": bits,
                     "drift_bits": drift})
    return pd.DataFrame(rows)


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p of every target (n, length), on the CPU."""
    flat = F.cross_entropy(logits.flatten(0, 1).float(), targets.to(logits.device).flatten(),
                           reduction="none")
    return flat.view(targets.shape).cpu()
