"""From training bytes to a byte model: what a system counts, trains and fits, in which order.

What a system chooses by looking, it chooses on the end of its *training* text.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from mambabyte.config import ModelConfig, TrainConfig
from mambabyte.corpus.files import present
from mambabyte.errors import UserError
from mambabyte.evaluate import byte_log_probs
from mambabyte.model import ByteLM, head_loss, without_state
from mambabyte.model.mixer import in_float32
from mambabyte.stream import ByteModel
from mambabyte.task.experts import ExpertLM, Experts, Mixing, count_contexts, fit_gate
from mambabyte.task.experts.contexts import PADDING, padded
from mambabyte.task.guide import Guide, GuidedLM, GuidedWindows
from mambabyte.task.mixture import Mixture, NgramLM, best_weight
from mambabyte.task.ngram import NgramModel, count
from mambabyte.task.systems import Ngram, System
from mambabyte.train import Step, ahead, optimise
from mambabyte.train.captured import CapturedStep, Windows, prepare, window_starts
from mambabyte.train.optim import make_optimizer
from mambabyte.train.precision import autocast
from mambabyte.train.schedule import schedule
from mambabyte.train.smoke import is_smoke, smoke_configs

HELD_OUT_BYTES = 200_000  # end of the training text: kept for choices, no network trains on it
_LOG_EVERY = 50
_TELL_SECONDS = 2.0
_ROW, _BEFORE = 4096, 1024  # bytes of a row whose distributions the gate needs, and before it


@dataclass(frozen=True)
class Fit:
    """A trained byte model and what it took."""

    model: ByteModel
    steps: int
    bytes_seen: int  # by the network
    n_parameters: int  # of the network
    ngram_bytes: int  # memory of the tables
    notes: dict[str, Any]


Report = Callable[[str], None]


def silent(line: str) -> None:
    pass


@dataclass(frozen=True)
class Watch:
    """Who hears of a build: ``report`` a line now and then, ``ended`` the name of each part when it
    has ended, the device's work included. ``began`` is perf_counter at the start."""

    report: Report = silent
    ended: Report = silent
    began: float = field(default_factory=time.perf_counter)

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.began


def build(
    system: System, data: bytes | np.ndarray, device: str = "cpu", seed: int = 0,
    report: Report = silent, ended: Report = silent,
) -> Fit:
    """Train ``system`` on ``data``, all of it counted from this call on. Deterministic but for the
    clock. A tiny corpus, or SMOKE_TEST_ONLY=1, selects the smoke configuration. ``report`` gets a
    line now and then while it trains, ``ended`` the name of each part when it has ended."""
    watch = Watch(report, ended)
    data = present(data) if isinstance(data, np.ndarray) else np.frombuffer(data, np.uint8)
    if len(data) < 64:
        raise UserError(f"{len(data)} training bytes: expected at least 64")
    config, recipe, ngram = system.model, replace(system.train, seed=seed), system.ngram
    mixing = system.mixing
    if is_smoke(len(data)):
        report(f"SMOKE mode ({len(data)} training bytes): a tiny model in place of the system's")
        if config is not None:
            config, recipe = smoke_configs(config, len(data))
        if ngram is not None:
            ngram = replace(ngram, order=min(ngram.order, 5))
        if mixing is not None:
            mixing = replace(mixing, steps=min(mixing.steps, 20))
    if config is not None:
        ahead.begin(config, recipe, device)
    held = min(HELD_OUT_BYTES, len(data) // 10)
    text = torch.from_numpy(np.array(data)).to(device)
    torch.manual_seed(seed)
    if mixing is not None:
        return _build_experts(mixing, config, recipe, ngram, text, held, watch)
    if config is None:
        assert ngram is not None
        counts = _counted(text, ngram, watch)
        return Fit(NgramLM(counts).eval(), 0, 0, 0, counts.n_bytes, {})
    if ngram is not None and ngram.guide_share:
        return _build_guided(config, recipe, ngram, text, held, watch)

    model = in_float32(lambda: ByteLM(config)).to(device)
    steps, notes = fit(model, model,
                       Windows(text[: len(text) - held], recipe.context), recipe, watch)
    result: ByteModel = model
    table_bytes = 0
    if ngram is not None:
        weight = ngram.weight
        if weight is None:
            part = _counted(text[: len(text) - held], ngram, watch)
            weight = _weight_on(model, NgramLM(part), bytes(data[len(data) - held :]))
            del part
            notes["ngram_weight"] = weight
        counts = _counted(text, ngram, watch)
        table_bytes = counts.n_bytes
        result = Mixture(model, counts, weight)
    return Fit(result.eval(), steps, steps * recipe.batch_size * recipe.context,
               config.n_parameters, table_bytes, notes)


def _counted(data: Tensor, ngram: Ngram, watch: Watch) -> NgramModel:
    watch.report(f"counting {len(data):,} bytes")
    made = count(data, ngram.order, ngram.discount, continuation=ngram.continuation)
    watch.ended("counting")
    return made


def _build_guided(
    config: ModelConfig, recipe: TrainConfig, ngram: Ngram, text: Tensor, held: int, watch: Watch,
) -> Fit:
    end = len(text) - held
    # A window at least is left to train on.
    cut = max(1, min(int(ngram.guide_share * end), end - recipe.context - 1))
    guide = Guide(_counted(text[:cut], ngram, watch))
    model = in_float32(lambda: GuidedLM(config, guide.n_kinds)).to(text.device)
    windows = GuidedWindows(text[cut:end], guide, recipe.context)
    watch.ended("tabulating hints")
    notes = {"seconds_before_training": watch.elapsed, "hint_bytes": windows.n_bytes}
    steps, more = fit(model, model.lm, windows, recipe, watch)
    del windows
    if ngram.recount:
        del guide
        guide = Guide(_counted(text[:end], ngram, watch))
    model.guide = guide
    return Fit(model.eval(), steps, steps * recipe.batch_size * recipe.context,
               sum(p.numel() for p in model.parameters()), model.guide.n_bytes, notes | more)


def _build_experts(
    mixing: Mixing, config: ModelConfig | None, recipe: TrainConfig, ngram: Ngram | None,
    text: Tensor, held: int, watch: Watch,
) -> Fit:
    """Counts, a network where there is one, and the gate that joins them. The gate is fitted on
    the bytes before the held-out ones, which nothing else has seen."""
    assert ngram is not None
    end = len(text) - held
    size = min(mixing.fit_bytes, end // 10)
    begin = end - size // _ROW * _ROW if size > _ROW else end - size
    # What the gate is fitted on, with its history, behind what stands before a text.
    history = min(begin, mixing.matches.reach)
    seen = padded(text[begin - history : end])
    first = PADDING + history
    counted = text[begin - int(ngram.share * begin) : begin]
    network: ByteModel | None = None
    if config is None:
        made = Fit(NgramLM(_counted(counted, ngram, watch)), 0, 0, 0, 0, {})
        counts = cast(NgramLM, made.model).ngram
    elif ngram.guide_share:
        made = _build_guided(config, recipe, ngram, text, len(text) - begin, watch)
        network, guide = made.model, cast(GuidedLM, made.model).guide
        assert guide is not None
        counts = guide.ngram
    else:
        model = in_float32(lambda: ByteLM(config)).to(text.device)
        steps, notes = fit(model, model, Windows(text[:begin], recipe.context), recipe, watch)
        network = model.eval()
        made = Fit(model, steps, steps * recipe.batch_size * recipe.context, config.n_parameters,
                   0, notes)
        counts = _counted(counted, ngram, watch)
    tables = [count_contexts(counted, context) for context in mixing.contexts]
    if tables:
        watch.ended("counting other contexts")
    experts = Experts(counts, tuple(n for n in mixing.orders if n <= counts.order), tables,
                      mixing.matches)
    others = None if network is None else _distributions(network, text, begin, end)
    if network is not None:
        watch.ended("asking the network")
    watch.report("fitting the gate")
    gate, bits = fit_gate(
        experts, seen, first, others, hidden=mixing.hidden, steps=mixing.steps, lr=mixing.lr,
        seed=recipe.seed)
    watch.ended("fitting the gate")
    return replace(made, model=ExpertLM(experts, gate, network).eval(),
                   ngram_bytes=experts.n_bytes,
                   notes=made.notes | {"gate_bits_per_byte": bits, "experts": experts.names})


@torch.inference_mode()
def _distributions(model: ByteModel, text: Tensor, begin: int, end: int) -> Tensor:
    """The network's probabilities (end - begin, 1, V) of the bytes text[begin:end], in rows, each
    with some bytes before it; in the arithmetic of training, whose kernels are there, and with
    attention by kernels that torch brings along: for masked rows cuDNN's would be compiled first,
    more than a second for one call."""
    size = min(_ROW, end - begin)
    before = min(_BEFORE, begin - 1)
    starts = torch.arange(begin, end, size, device=text.device) - 1 - before
    rows = text[starts[:, None] + torch.arange(before + size, device=text.device)]
    with autocast(text.device, "auto"), sdpa_kernel(ahead.BROUGHT):
        logits, _ = model(rows.long())
    return torch.softmax(logits[:, before:].float(), -1).flatten(0, 1)[:, None]


def fit(
    model: ByteLM | GuidedLM, network: ByteLM, windows: Windows | GuidedWindows,
    recipe: TrainConfig, watch: Watch,
) -> tuple[int, dict[str, Any]]:
    """Run the recipe; returns the steps done and notes. ``max_seconds`` counts from where the watch
    began. It gets a line every two seconds of steps issued, which the device need not have ended.
    Raises NonFiniteError when it diverges."""
    if len(windows.text) < recipe.context + 1:
        raise UserError(f"context {recipe.context} does not fit into {len(windows.text)} bytes: "
                        "choose a shorter one or a larger corpus")
    if recipe.first_context or recipe.first_batch_size:
        raise UserError("the task trains at one context and batch size: leave first_context and "
                        "first_batch_size at 0")
    on_cuda = network.device.type == "cuda"
    prepare(network, recipe)
    optimizer = make_optimizer(model, recipe, on_device=True)
    step = CapturedStep(model, model.loss, optimizer, windows,
                    window_starts(len(windows.text), recipe), recipe,
                    capture=on_cuda and recipe.step != "eager")
    model.train()
    log = _Log(step, recipe, watch)
    done = optimise(step, lambda number: schedule(number, recipe, log.elapsed), recipe.n_steps,
                    stop=log.stop, after=log.after).steps
    if done % _LOG_EVERY:  # also where the clock ended the run: what was queued is done now
        log.look(done)
    del step, optimizer
    watch.ended("training")
    network.run_layer, network.run_head = without_state, head_loss
    return done, log.notes(done)


class _Log:
    """The clock of a fit, and the losses that are looked at on the way."""

    def __init__(self, step: Step, recipe: TrainConfig, watch: Watch) -> None:
        self.step, self.recipe, self.watch = step, recipe, watch
        self.losses: list[float] = []
        self.elapsed = self._told = 0.0
        self._first: tuple[int, float] | None = None  # step and time of the first look

    def stop(self, done: int) -> str | None:
        cap = self.recipe.max_seconds
        self.elapsed = self.watch.elapsed
        if cap and self.elapsed >= cap:
            return "max_seconds"
        if self.elapsed >= self._told + _TELL_SECONDS:
            self._told = self.elapsed
            self.watch.report(f"step {done + 1} of {self.recipe.n_steps}, {self.elapsed:.0f} s"
                        + (f" of at most {cap:.0f}" if cap else ""))
        return None

    def after(self, done: int) -> None:
        # The host may run ahead of the device by a whole run: look at it now and then.
        if done % _LOG_EVERY == 0:
            self.look(done)
        if done in (1, _LOG_EVERY):  # that it learns, and when
            self.watch.report(f"step {done}: loss {self.step.read().loss:.4f} nats")

    def look(self, done: int) -> None:
        """Keep the last loss; waits for the device. NonFiniteError if one was not finite."""
        self.losses.append(round(self.step.read().loss, 4))
        if self._first is None:
            self._first = done, self.watch.elapsed

    def notes(self, done: int) -> dict[str, Any]:
        found: dict[str, Any] = {"losses_nats": self.losses}
        if self._first is not None and done > self._first[0]:
            first, at = self._first
            found["ms_per_step"] = 1e3 * (self.watch.elapsed - at) / (done - first)
            found["seconds_to_first_log"] = at
        return found


def _weight_on(model: ByteModel, counted: NgramLM, held: bytes) -> float:
    picked = torch.tensor(bytearray(held), device="cpu").long()
    rows = torch.arange(len(held), device="cpu")
    return best_weight(byte_log_probs(model, held)[rows, picked],
                       byte_log_probs(counted, held)[rows, picked])
