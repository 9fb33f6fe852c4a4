"""Study: time and energy of forms and mixers against length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pandas as pd

from mambabyte.config.scan_forms import FORMS
from mambabyte.errors import UserError

TITLE = "Throughput and energy"
QUESTION = "How do time and energy per byte grow with length, and who is fastest where?"
NOTEBOOK = "05_throughput_and_energy.ipynb"

INDEXED = "indexed loop"  # the second document's loop: one index a step, no form of the package
INDEXED_ABOUT = "the recurrence with every step's inputs indexed in the loop, as the second " \
    "document has it"
PASSES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Parameters:
    """What is timed. Defaults are the quick profile: a CPU and under a minute."""

    device: str = "cpu"
    threads: int = 1  # of torch on the CPU; 0 leaves torch's own choice
    preset: str = "mamba_byte"
    d_model: int = 32
    d_state: int = 16
    n_layer: int = 4
    n_head: int = 2
    lengths: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    batch_size: int = 1
    batches: tuple[int, ...] = (1, 4, 16)
    batch_length: int = 128
    # Empty: every form there is, and the second document's loop. The repairs of the trick cost
    # what it costs (clamped, epsilon, centred) or a chunk times as much (all pairs).
    forms: tuple[str, ...] = ("sequential", "chunked", "fused", "corrected_cumsum",
                              "document_chunked", "document_cumsum", "associative", INDEXED)
    mixer_forms: tuple[str, ...] = ("auto", "chunked")
    rounds: int = 5
    guard_seconds: float = 0.25
    allocation_lengths: tuple[int, ...] = (64, 128, 256, 512)
    stream_positions: tuple[int, ...] = (0, 256, 1024, 4096)
    stream_steps: int = 60
    stream_window: int = 1024
    patterns: tuple[str, ...] = ("M", "MMMA", "MA", "A")
    # Scan form of whole training steps: those beside "auto" show what the form is worth.
    training_forms: tuple[str, ...] = ("auto", "chunked", "document_chunked")
    train_context: int = 256
    train_batch: int = 4
    train_steps: int = 4
    # As TrainConfig.step; on a CPU always eager.
    train_step: Literal["auto", "eager", "graph", "compile"] = "auto"
    energy_seconds: float = 0.1  # least length of one reading of energy; a GPU's counter is slow
    precision: Literal["auto", "fp32", "bf16"] = "auto"

    def __post_init__(self) -> None:
        for name in self.forms:
            if name not in FORMS and name != INDEXED:
                raise UserError(f"scan form {name!r} is unknown: choose {', '.join(FORMS)} or "
                                f"{INDEXED}")
        if list(self.lengths) != sorted(set(self.lengths)) or not self.lengths:
            raise UserError(f"lengths are {self.lengths}: give them in rising order, each once")
        for name in ("mixer_forms", "allocation_lengths", "stream_positions"):
            if not getattr(self, name):
                raise UserError(f"{name} is empty: name at least one")


PROFILES = {
    "quick": Parameters(),
    "full": Parameters(
        device="cuda", d_model=192, n_head=3, forms=(),
        lengths=(128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536),
        batches=(1, 4, 16, 64), batch_length=1024, rounds=5, guard_seconds=1.0, threads=0,
        allocation_lengths=(128, 256, 512, 1024),
        mixer_forms=("auto", "chunked", "sequential"),
        stream_positions=(0, 1024, 4096, 16384, 65536), stream_steps=50,
        train_context=1024, train_batch=16, train_steps=5,
        train_step="compile", energy_seconds=0.5),
}


@dataclass(frozen=True)
class Results:
    """Tables of the study; None in a cell means that it was not measured."""

    scans: pd.DataFrame  # every form, pass, length and batch
    mixers: pd.DataFrame  # whole mixers
    exponents: pd.DataFrame  # fitted to both
    allocations: pd.DataFrame  # bytes that a backward pass makes, by form and length
    allocation_exponents: pd.DataFrame  # of all bytes, and of the zero-filled ones
    crossovers: pd.DataFrame  # the length from which an SSM mixer beats attention
    streaming: pd.DataFrame  # latency of one byte against bytes seen
    training: pd.DataFrame  # whole training steps: bytes/s, joules per megabyte
    peers: pd.DataFrame  # the scan against other implementations, recorded on a GPU
    peers_machine: str  # that machine, and the day
