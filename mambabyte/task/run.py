"""The public task: training bytes in, a character model out, under a cap of time and energy.

A *system* is a named recipe from training bytes to a byte model. ``run_task`` trains one from
scratch, measures it as the task does (the clock and the energy counter start with training and
stop when the model is returned; an idle baseline is subtracted), and scores 60,000 characters of
the held-out splits. What a system chooses by looking, it chooses on the end of its *training* text.
"""

from __future__ import annotations

import gc
import time
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from mambabyte.corpus.utf8 import next_begin
from mambabyte.energy import EnergyMeter, total_joules
from mambabyte.errors import NonFiniteError
from mambabyte.evaluate import TASK_CHARACTERS, score
from mambabyte.task.builder import HELD_OUT_BYTES, Fit, Report, build, silent
from mambabyte.task.systems import System
from mambabyte.train.smoke import is_smoke

CAP_SECONDS = 300.0
IDLE_WATTS = 50.0  # what the published figures subtract


def run_task(
    system: System, train_data: bytes | np.ndarray, splits: dict[str, np.ndarray], *,
    device: str = "cpu", seed: int = 0, idle_watts: float = IDLE_WATTS,
    characters: int = TASK_CHARACTERS, report: Report = silent,
) -> dict[str, Any]:
    """Train and score one system with one seed; returns the row of the result table.

    ``splits``: name -> bytes to score, the first ``characters`` characters of each. Besides, the
    held-out end of the training text is scored: the figure to choose by.
    """
    on_cuda = device.startswith("cuda")
    if on_cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    meter, host = EnergyMeter(device, idle_watts), EnergyMeter("cpu")
    parts = _Parts(meter, device)
    try:
        fitted: Fit | None = build(system, train_data, device, seed, report, parts.ended)
        failure = None
        if on_cuda:
            torch.cuda.synchronize(device)
    except NonFiniteError as error:  # a result too: it is what the document's scan comes to
        fitted, failure = None, str(error).split(". ")[0]
    energy = meter.read(at="the end of training")
    total, cpu_joules, cpu_source = total_joules(energy, host.read())
    row: dict[str, Any] = {
        "about": system.about, "smoke": is_smoke(len(train_data)), "seed": seed,
        "device": device, "joules": energy.joules,
        "gross_joules": energy.gross_joules, "idle_watts": idle_watts,
        "energy_source": energy.source, "cpu_joules": cpu_joules, "cpu_source": cpu_source,
        "total_joules": total, "seconds": energy.seconds,
        "within_cap": energy.seconds <= CAP_SECONDS, "failure": failure,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if on_cuda else None,
        "model": None if system.model is None else asdict(system.model),
        "train": asdict(system.train),
        "parts": parts.found,
        "n_steps": 0 if system.model is None else system.train.n_steps,
        "ngram": None if system.ngram is None else asdict(system.ngram),
    }
    if fitted is None:
        return row
    row |= {"steps": fitted.steps, "bytes_seen": fitted.bytes_seen,
            "n_parameters": fitted.n_parameters, "ngram_bytes": fitted.ngram_bytes, **fitted.notes}
    texts: dict[str, bytes | np.ndarray] = {}
    if system.mixing or system.ngram is None or system.ngram.guide_share:  # else it was counted
        held = len(train_data) - min(HELD_OUT_BYTES, len(train_data) // 10)
        texts["held_out"] = train_data[next_begin(train_data, held) :]
    _score_each(row, fitted, {**texts, **splits}, characters, report)
    del fitted
    gc.collect()
    if on_cuda:
        torch.cuda.empty_cache()
    return row


def _score_each(
    row: dict[str, Any], fitted: Fit, texts: dict[str, bytes | np.ndarray], characters: int,
    report: Report,
) -> None:
    """Add to the row what the model scores on each text, up to one where it is not finite."""
    began = time.perf_counter()
    try:
        for name, data in texts.items():
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


class _Parts:
    """Seconds and joules of the parts of a build, each added up where it comes again."""

    def __init__(self, meter: EnergyMeter, device: str) -> None:
        self._meter, self._device = meter, device
        self._last = meter.read()
        self.found: dict[str, dict[str, float | None]] = {}

    def ended(self, part: str) -> None:
        """What went on since the last one, ``part``, has ended."""
        if self._device.startswith("cuda"):
            torch.cuda.synchronize(self._device)
        now, last = self._meter.read(at="the end of a part"), self._last
        self._last = now
        before = self.found.get(part, {"seconds": 0.0, "joules": 0.0})
        self.found[part] = {
            name: None if old is None or new is None or sofar is None else sofar + new - old
            for (name, sofar), old, new in zip(
                before.items(), (last.seconds, last.joules), (now.seconds, now.joules),
                strict=True)}
