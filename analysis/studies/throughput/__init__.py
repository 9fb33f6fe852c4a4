"""Study: time and energy of forms and mixers against length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import pandas as pd

from analysis.theory.sizes import at_size
from mambabyte.config import SPECS, get_preset
from mambabyte.config.checks import (
    Checked,
    Count,
    CountOrNone,
    Device,
    Layers,
    NotNegative,
    Positive,
    Threads,
    entries,
    one_of,
)
from mambabyte.config.mixers import LayerPattern
from mambabyte.config.presets import PresetName
from mambabyte.config.scan_forms import FORMS, OLD_NAMES, FormOrAuto

TITLE = "Throughput and energy"
QUESTION = "How do time and energy per byte grow with length, and who is fastest where?"
NOTEBOOK = "05_throughput_and_energy.ipynb"
TIMED = True

INDEXED = "indexed loop"  # the second document's loop: one index a step, no form of the package
INDEXED_ABOUT = "the recurrence with every step's inputs indexed in the loop, as the second " \
    "document has it"
PASSES = ("forward", "forward+backward")


Letter = Annotated[str, one_of(lambda: SPECS)]
FormOrLoop = Annotated[str, one_of(lambda: [*FORMS, INDEXED], OLD_NAMES)]
Lengths = Annotated[tuple[Count, ...], entries(rising=True)]


@dataclass(frozen=True)
class Parameters(Checked):
    """What is timed. Defaults are the quick profile: a CPU and under a minute."""

    device: Device = "cpu"
    """where it runs: cpu, cuda or cuda:N"""
    threads: Threads = 1
    """of torch on the CPU; 0 leaves torch's own choice"""
    preset: PresetName = "mamba_byte"
    """norm, initialisation and the rest come from here"""
    d_model: Count = 32
    """width"""
    d_state: Count = 16
    """states a channel"""
    n_layer: Layers = 4
    """layers of the streamed and trained models"""
    n_head: Count = 2
    """heads of attention"""
    lengths: Lengths = (64, 128, 256, 512, 1024, 2048)
    """sequence lengths of scans and mixers, rising"""
    batch_size: Count = 1
    """sequences at these lengths"""
    batches: Lengths = (1, 2, 8)
    """batches at one length, rising"""
    batch_length: Count = 128
    """that length"""
    # The repairs of the trick cost what it costs (clamped, epsilon, centred) or a chunk times as
    # much (all pairs).
    forms: Annotated[tuple[FormOrLoop, ...], entries(0)] = (
        "recurrent", "chunked", "fused", "corrected_cumsum", "document_chunked",
        "document_cumsum", "associative", INDEXED)
    """scan forms that are timed; empty is every one, and the second document's loop"""
    mixers: Annotated[tuple[Letter, ...], entries(0)] = ()
    """letters of the mixers timed beside attention; empty is every one"""
    mixer_forms: Annotated[tuple[FormOrAuto, ...], entries()] = ("auto", "chunked")
    """scan forms of whole SSM mixers"""
    rounds: Count = 3
    """rounds of timing, a median over them"""
    guard_seconds: Positive = 0.15
    """a case that would take longer is skipped"""
    allocation_lengths: Annotated[tuple[Count, ...], entries(rising=True)] = (64, 128, 256, 512)
    """lengths at which a backward pass's allocations are counted, rising"""
    stream_positions: Annotated[tuple[CountOrNone, ...], entries(rising=True)] = (
        0, 256, 1024, 4096)
    """bytes seen before a streamed byte is timed, rising"""
    stream_steps: Count = 60
    """streamed bytes that are timed at each"""
    stream_window: Count = 1024
    """keys that windowed attention keeps"""
    patterns: Annotated[tuple[LayerPattern, ...], entries()] = ("M", "MMMA", "MA", "A")
    """layer patterns whose training steps are timed"""
    training_forms: Annotated[tuple[FormOrAuto, ...], entries()] = (
        "auto", "chunked", "document_chunked")
    """scan forms of the training steps of the pure SSM"""
    train_context: Count = 256
    """bytes of a window of a training step"""
    train_batch: Count = 2
    """its windows"""
    train_steps: Count = 4
    """training steps that are timed"""
    train_step: Literal["auto", "eager", "graph", "compile"] = "auto"
    """how a step is run: auto, eager, graph, compile; on a CPU always eager"""
    energy_seconds: NotNegative = 0.1
    """least length of one reading of energy: a GPU's counter is slow"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto, fp32 or bf16; auto is bf16 on a GPU"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for pattern in (*(self.mixers or SPECS), *self.patterns):  # refused if it has no model
            at_size(get_preset(self.preset).model, self.d_model, self.n_layer, self.n_head,
                    d_state=self.d_state, layer_pattern=pattern)


PROFILES = {
    "quick": Parameters(),
    "full": Parameters(
        device="cuda", d_model=192, n_head=3, forms=(),
        lengths=(128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536),
        batches=(1, 4, 16, 64), batch_length=1024, rounds=5, guard_seconds=1.0, threads=0,
        allocation_lengths=(128, 256, 512, 1024),
        mixer_forms=("auto", "chunked", "recurrent"),
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
    crossovers: pd.DataFrame  # the length from which a mixer beats attention
    streaming: pd.DataFrame  # latency of one byte against bytes seen
    training: pd.DataFrame  # whole training steps: bytes/s, joules per megabyte
    peers: pd.DataFrame  # the scan against other implementations, recorded on a GPU
    peers_machine: str  # that machine, and the day
