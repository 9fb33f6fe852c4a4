"""The public task: training bytes in, a character model out, under a cap of time and energy.

A *system* is a named recipe from training bytes to a byte model. ``run_task`` trains one from
scratch, measures it as the task does (the clock and the energy counter start with training and
stop when the model is returned; an idle baseline is subtracted), and scores 60,000 characters of
the held-out splits. What a system chooses by looking, it chooses on the end of its *training* text.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mambabyte.config import ModelConfig, TrainConfig
from mambabyte.corpus.files import present
from mambabyte.corpus.utf8 import next_begin
from mambabyte.energy import EnergyMeter
from mambabyte.errors import NonFiniteError, UserError
from mambabyte.evaluate import TASK_CHARACTERS, byte_log_probs, score
from mambabyte.model import ByteLM, head_loss, without_state
from mambabyte.stream import ByteModel
from mambabyte.task.guide import Guide, GuidedLM, GuidedWindows
from mambabyte.task.mixture import Mixture, NgramLM, best_weight
from mambabyte.task.ngram import count
from mambabyte.task.systems import Ngram, System
from mambabyte.train import Step, optimise
from mambabyte.train.captured import CapturedStep, Windows, prepare, window_starts
from mambabyte.train.optim import make_optimizer
from mambabyte.train.schedule import schedule
from mambabyte.train.smoke import is_smoke, smoke_configs

CAP_SECONDS = 300.0
IDLE_WATTS = 50.0  # what the published figures subtract
HELD_OUT_BYTES = 200_000  # end of the training text: kept for choices, no network trains on it
_LOG_EVERY = 50
_TELL_SECONDS = 2.0


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


def _silent(line: str) -> None:
    pass


def build(
    system: System, data: bytes | np.ndarray, device: str = "cpu", seed: int = 0,
    report: Report = _silent,
) -> Fit:
    """Train ``system`` on ``data``, all of it counted from this call on. Deterministic but for the
    clock. A tiny corpus, or SMOKE_TEST_ONLY=1, selects the smoke configuration. ``report`` gets a
    line now and then while it trains."""
    began = time.perf_counter()
    data = present(data) if isinstance(data, np.ndarray) else np.frombuffer(data, np.uint8)
    if len(data) < 64:
        raise UserError(f"{len(data)} training bytes: expected at least 64")
    config, recipe, ngram = system.model, replace(system.train, seed=seed), system.ngram
    if is_smoke(len(data)):
        report(f"SMOKE mode ({len(data)} training bytes): a tiny model in place of the system's")
        if config is not None:
            config, recipe = smoke_configs(config, len(data))
        if ngram is not None:
            ngram = replace(ngram, order=min(ngram.order, 5))
    held = min(HELD_OUT_BYTES, len(data) // 10)
    text = torch.from_numpy(np.array(data)).to(device)
    torch.manual_seed(seed)
    if config is None:
        assert ngram is not None
        report(f"counting {len(text):,} bytes")
        counts = count(text, ngram.order, ngram.discount, device, continuation=ngram.continuation)
        return Fit(NgramLM(counts).eval(), 0, 0, 0, counts.n_bytes, {})
    if ngram is not None and ngram.guide_share:
        return _build_guided(config, recipe, ngram, text, held, began, report)

    model = ByteLM(config).to(device)
    steps, notes = fit(model, model,
                       Windows(text[: len(text) - held], recipe.context), recipe, began, report)
    result: ByteModel = model
    table_bytes = 0
    if ngram is not None:
        weight = ngram.weight
        if weight is None:
            part = count(text[: len(text) - held], ngram.order, ngram.discount, device,
                         continuation=ngram.continuation)
            weight = _weight_on(model, NgramLM(part), bytes(data[len(data) - held :]))
            del part
            notes["ngram_weight"] = weight
        report(f"counting {len(text):,} bytes")
        counts = count(text, ngram.order, ngram.discount, device, continuation=ngram.continuation)
        table_bytes = counts.n_bytes
        result = Mixture(model, counts, weight)
    return Fit(result.eval(), steps, steps * recipe.batch_size * recipe.context,
               config.n_parameters, table_bytes, notes)


def _build_guided(
    config: ModelConfig, recipe: TrainConfig, ngram: Ngram, text: Tensor, held: int, began: float,
    report: Report,
) -> Fit:
    def counted(data: Tensor) -> Guide:
        report(f"counting {len(data):,} bytes")
        return Guide(count(data, ngram.order, ngram.discount, text.device,
                           continuation=ngram.continuation))

    cut = int(ngram.guide_share * len(text))
    end = len(text) - held
    guide = counted(text[:cut])
    model = GuidedLM(config, guide.n_kinds).to(text.device)
    windows = GuidedWindows(text[cut:end], guide, recipe.context)
    notes = {"seconds_before_training": time.perf_counter() - began,
             "hint_bytes": windows.n_bytes}
    steps, more = fit(model, model.lm, windows, recipe, began, report)
    del windows
    if ngram.recount:
        del guide
        guide = counted(text[:end])
    model.guide = guide
    return Fit(model.eval(), steps, steps * recipe.batch_size * recipe.context,
               sum(p.numel() for p in model.parameters()), model.guide.n_bytes, notes | more)


def fit(
    model: ByteLM | GuidedLM, network: ByteLM, windows: Windows | GuidedWindows,
    recipe: TrainConfig, began: float, report: Report = _silent,
) -> tuple[int, dict[str, Any]]:
    """Run the recipe; returns the steps done and notes. ``began``: perf_counter at the start, from
    which ``max_seconds`` counts. ``report`` gets a line every two seconds of steps issued, which
    the device need not have ended. Raises NonFiniteError when it diverges."""
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
    log = _Log(step, recipe, began, report)
    done = optimise(step, lambda number: schedule(number, recipe, log.elapsed), recipe.n_steps,
                    stop=log.stop, after=log.after).steps
    if done % _LOG_EVERY:  # also where the clock ended the run: what was queued is done now
        log.look(done)
    del step, optimizer
    network.run_layer, network.run_head = without_state, head_loss
    return done, log.notes(done)


class _Log:
    """The clock of a fit, and the losses that are looked at on the way."""

    def __init__(self, step: Step, recipe: TrainConfig, began: float, report: Report) -> None:
        self.step, self.recipe, self.began, self.report = step, recipe, began, report
        self.losses: list[float] = []
        self.elapsed = self._told = 0.0
        self._first: tuple[int, float] | None = None  # step and time of the first look

    def stop(self, done: int) -> str | None:
        cap = self.recipe.max_seconds
        self.elapsed = time.perf_counter() - self.began
        if cap and self.elapsed >= cap:
            return "max_seconds"
        if self.elapsed >= self._told + _TELL_SECONDS:
            self._told = self.elapsed
            self.report(f"step {done + 1} of {self.recipe.n_steps}, {self.elapsed:.0f} s"
                        + (f" of at most {cap:.0f}" if cap else ""))
        return None

    def after(self, done: int) -> None:
        # The host may run ahead of the device by a whole run: look at it now and then.
        if done % _LOG_EVERY == 0:
            self.look(done)
        if done in (1, _LOG_EVERY):  # that it learns, and when
            self.report(f"step {done}: loss {self.step.read().loss:.4f} nats")

    def look(self, done: int) -> None:
        """Keep the last loss; waits for the device. NonFiniteError if one was not finite."""
        self.losses.append(round(self.step.read().loss, 4))
        if self._first is None:
            self._first = done, time.perf_counter()

    def notes(self, done: int) -> dict[str, Any]:
        found: dict[str, Any] = {"losses_nats": self.losses}
        if self._first is not None and done > self._first[0]:
            first, at = self._first
            found["ms_per_step"] = 1e3 * (time.perf_counter() - at) / (done - first)
            found["seconds_to_first_log"] = at - self.began
        return found


def _weight_on(model: ByteModel, counted: NgramLM, held: bytes) -> float:
    picked = torch.tensor(bytearray(held)).long()
    rows = torch.arange(len(held))
    return best_weight(byte_log_probs(model, held)[rows, picked],
                       byte_log_probs(counted, held)[rows, picked])


def run_task(
    system: System, train_data: bytes | np.ndarray, splits: dict[str, np.ndarray], *,
    device: str = "cpu", seed: int = 0, idle_watts: float = IDLE_WATTS,
    characters: int = TASK_CHARACTERS, report: Report = _silent,
) -> dict[str, Any]:
    """Train and score one system with one seed; returns the row of the result table.

    ``splits``: name -> bytes to score, the first ``characters`` characters of each. Besides, the
    held-out end of the training text is scored: the figure to choose by.
    """
    on_cuda = device.startswith("cuda")
    if on_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    meter = EnergyMeter(device, idle_watts)
    try:
        fitted: Fit | None = build(system, train_data, device, seed, report)
        failure = None
        if on_cuda:
            torch.cuda.synchronize()
    except NonFiniteError as error:  # a result too: it is what the document's scan comes to
        fitted, failure = None, str(error).split(". ")[0]
    energy = meter.read(at="the end of training")
    row: dict[str, Any] = {
        "about": system.about, "smoke": is_smoke(len(train_data)), "seed": seed,
        "device": device, "joules": energy.joules,
        "gross_joules": energy.gross_joules, "idle_watts": idle_watts,
        "energy_source": energy.source, "seconds": energy.seconds,
        "within_cap": energy.seconds <= CAP_SECONDS, "failure": failure,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_cuda else None,
        "model": None if system.model is None else asdict(system.model),
        "train": asdict(system.train), "n_steps": system.train.n_steps,
        "ngram": None if system.ngram is None else asdict(system.ngram),
    }
    if fitted is None:
        return row
    row |= {"steps": fitted.steps, "bytes_seen": fitted.bytes_seen,
            "n_parameters": fitted.n_parameters, "ngram_bytes": fitted.ngram_bytes, **fitted.notes}
    began = time.perf_counter()
    texts: dict[str, bytes | np.ndarray] = {}
    if system.ngram is None or system.ngram.guide_share:  # a mixture has counted it
        held = len(train_data) - min(HELD_OUT_BYTES, len(train_data) // 10)
        texts["held_out"] = train_data[next_begin(train_data, held) :]
    try:
        for name, data in (texts | splits).items():
            report(f"scoring {name}")
            result = score(fitted.model, data, characters)
            row |= {f"{name}_accuracy": result.char_accuracy,
                    f"{name}_accuracy_error": result.accuracy_error,
                    f"{name}_bits_per_byte": result.bits_per_byte,
                    f"{name}_characters": result.characters, f"{name}_bytes": result.bytes,
                    f"{name}_bytes_not_utf8": result.bytes_not_utf8}
            report(f"{name}: {result.char_accuracy:.4f}, {result.bits_per_byte:.4f} bits/byte")
    except NonFiniteError as error:
        row["failure"] = str(error)
    row["scoring_seconds"] = time.perf_counter() - began
    del fitted
    gc.collect()
    if on_cuda:
        torch.cuda.empty_cache()
    return row

