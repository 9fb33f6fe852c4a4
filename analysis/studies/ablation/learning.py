"""Training a model on text for a comparison: a curve of held-out bits, and what each step cost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from mambabyte.config import ModelConfig, TrainConfig
from mambabyte.corpus import sample_windows
from mambabyte.energy import EnergyMeter
from mambabyte.model import ByteLM
from mambabyte.model.block import AttentionMixer
from mambabyte.train import NonFiniteError, autocast, train_step
from mambabyte.train.captured import FastStep, Windows, prepare, window_starts
from mambabyte.train.optim import learning_rate, make_optimizer

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
    schedule = recipe if decay else constant_rate(recipe)
    on_gpu = model.device.type == "cuda" and recipe.step != "eager"
    take = (_captured_steps if on_gpu else _steps)(model, train, recipe, schedule)
    at = {round(recipe.n_steps * (i + 1) / evaluations) for i in range(evaluations)}
    curve = [] if windows is None else [(0, heldout_bits(model, windows))]
    seconds: list[float] = []
    metered = BLOCK if recipe.n_steps > BLOCK else 0  # the step that the meter starts at
    meter = EnergyMeter(device)
    outside = 0.0  # joules spent on scoring
    began, step = time.perf_counter(), 0
    while step < recipe.n_steps:
        if step == metered:
            meter, outside = EnergyMeter(device), 0.0
        end = min(s for s in {*at, metered, recipe.n_steps} if s > step)
        done = take(step, end, began + max_seconds if max_seconds else math.inf)
        seconds += done
        step += len(done)
        late = bool(max_seconds) and time.perf_counter() - began > max_seconds
        if windows is not None and (step in at or late):
            before = meter.read().joules
            curve.append((step, heldout_bits(model, windows)))
            after = meter.read().joules
            outside += (after - before) if after is not None and before is not None else 0.0
        if late:
            break
    energy = meter.read()
    joules = None
    if energy.joules is not None and step > metered:
        joules = (energy.joules - outside) * step / (step - metered)
    return Learned(model, curve, step, float(np.median(seconds)), joules, energy.source,
                   step < recipe.n_steps)


# take(first, end, deadline): does the steps from first to end, at most until the deadline (of
# time.perf_counter), and returns the seconds of each.
Take = Callable[[int, int, float], list[float]]


def _steps(
    model: ByteLM, train: np.ndarray, recipe: TrainConfig, schedule: TrainConfig
) -> Take:
    """Steps one by one."""
    optimizer = make_optimizer(model, recipe)

    def take(first: int, end: int, deadline: float) -> list[float]:
        seconds: list[float] = []
        for step in range(first, end):
            tokens = sample_windows(
                train, recipe.context, recipe.batch_size, recipe.seed, step).to(model.device)
            start = time.perf_counter()
            train_step(model, optimizer, tokens, schedule, step)
            seconds.append(time.perf_counter() - start)
            if time.perf_counter() > deadline:
                break
        return seconds

    return take


def _captured_steps(
    model: ByteLM, train: np.ndarray, recipe: TrainConfig, schedule: TrainConfig
) -> Take:
    """The same steps as one CUDA graph. The time is that of a block of steps, spread over them:
    the first block holds the warm-up and the capture, and counts no more than any other."""
    optimizer = make_optimizer(model, recipe, on_device=True)
    prepare(model, recipe, compiled=recipe.step == "compile")
    text = torch.from_numpy(np.array(train)).to(model.device)
    step_once = FastStep(model, model.loss, optimizer, Windows(text, recipe.context),
                         window_starts(len(text), recipe), recipe)

    def take(first: int, end: int, deadline: float) -> list[float]:
        seconds: list[float] = []
        for low in range(first, end, BLOCK):
            high, start = min(low + BLOCK, end), time.perf_counter()
            # torch stops compiling a function for the ninth time; all systems share one.
            with torch._dynamo.config.patch(recompile_limit=COMPILED):
                for step in range(low, high):
                    step_once(rate_multiplier(step, schedule))
            bad = step_once.read()[2]
            if bad is not None:
                raise NonFiniteError(f"step {bad + 1}: the loss or the gradient norm is not finite")
            seconds += [(time.perf_counter() - start) / (high - low)] * (high - low)
            if time.perf_counter() > deadline:
                break
        return seconds

    return take


@torch.no_grad()
def heldout_bits(model: ByteLM, windows: Tensor, batch: int = 32) -> float:
    """Mean bits per byte of windows (n, context + 1), each scored from an empty state.

    By the model as it is written: what training compiled is for its own shapes.
    """
    nats = 0.0
    with autocast(model.device, "auto"):
        for part in windows.split(batch):
            tokens = part.to(model.device)
            logits = model(tokens[:, :-1])[0].float()
            nats += F.cross_entropy(
                logits.flatten(0, 1), tokens[:, 1:].flatten()).item() * len(part)
    return nats / len(windows) / LN2


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
    unbounded: bool = False, report: Callable[[str], None] = lambda line: None,
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
    attention = [b.mixer for b in model.layers if isinstance(b.mixer, AttentionMixer)]
    kept = [mixer.window for mixer in attention]
    length = streams.shape[1] - 1
    half = context // 2

    restart = torch.full((len(streams), length), float("nan"))
    for start in range(0, length - context + 1, half):
        part = streams[:, start : start + context + 1]
        logits, _ = model(part[:, :-1].to(device))
        restart[:, start + half : start + context] = _nats(logits, part[:, 1:])[:, half:]

    if unbounded:
        for mixer in attention:
            mixer.window = length + 1
    stream, state = [], None
    for start in range(0, length, piece):
        part = streams[:, start : start + piece + 1]
        logits, state = model(part[:, :-1].to(device), state)
        stream.append(_nats(logits, part[:, 1:]))
        report(f"position {min(start + piece, length):,} of {length:,}")
    for mixer, window in zip(attention, kept, strict=True):
        mixer.window = window

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


def rate_multiplier(step: int, recipe: TrainConfig) -> float:
    """The recipe's learning rate at ``step`` as a share of its peak."""
    return learning_rate(step, recipe) / recipe.lr
