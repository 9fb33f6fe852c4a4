"""Study: where each form of the scan goes wrong, how it shows, and whether training gets there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import pandas as pd

from analysis.theory.forms import ANY_CHUNK
from mambabyte.config.checks import (
    Checked,
    Count,
    CountOrNone,
    Positive,
    Seed,
    between,
    entries,
)
from mambabyte.config.scan_forms import FormOrAuto, ScanForm
from mambabyte.errors import UserError

TITLE = "Overflow versus chunk size"
QUESTION = "At which chunk size and decay does each form of the scan go wrong, and is it silent?"
NOTEBOOK = "02_overflow_vs_chunk_size.ipynb"

# The last two: u, delta, B and C rounded to that type, all arithmetic in float32.
Precision = Literal["float32", "bfloat16", "float16", "bf16 inputs", "fp16 inputs"]
Kind = Literal["constant", "data-dependent"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
KINDS: tuple[Kind, ...] = get_args(Kind)
Lengths = Annotated[tuple[Count, ...], entries(rising=True)]
Nats = Annotated[tuple[Positive, ...], entries(rising=True)]


@dataclass(frozen=True)
class Grid(Checked):
    """The cells of the map, and the size of the scans in them."""

    forms: Annotated[tuple[ScanForm, ...], entries()] = ANY_CHUNK
    """scan forms of the map in float32"""
    low_precision_forms: Annotated[tuple[ScanForm, ...], entries(0)] = (
        "recurrent", "corrected_cumsum", "segment_sum")
    """scan forms of the map in the other precisions"""
    precisions: Annotated[tuple[Precision, ...], entries()] = PRECISIONS
    """precisions of the map"""
    kinds: Annotated[tuple[Kind, ...], entries()] = KINDS
    """decay the same at every step, or with a random factor"""
    chunks: Lengths = (4, 8, 16, 32, 48, 64, 96, 128)
    """chunk sizes of the map, steps, rising"""
    decays: Nats = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8)
    """decays of the map, nats a step, rising"""
    length: Count = 128
    """steps of a scan of the map"""
    channels: Count = 2
    """its channels"""
    states: Count = 2
    """its states a channel"""
    seed: Seed = 0
    """of inputs, models and trainings"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.low_precision_forms and "float32" not in self.precisions:
            raise UserError("low_precision_forms is empty: expected one or more, or float32 among "
                            "the precisions, as the map would have no cell")


@dataclass(frozen=True)
class Parameters(Grid):
    """The grid of the error map, and how far the training is followed. 0 of a size of the model
    that is trained, of workers, and an empty trained_steps stand for what the device is fit for."""

    corpus: str = "stdlib"
    """text: stdlib, wikitext103, a folder or a file"""
    fraction_lengths: Lengths = (16, 32, 48, 56, 57, 64, 96, 128, 256, 512, 1024)
    """lengths at which pairs past the bound are counted, rising"""
    crossings: Nats = (60.0, 87.0, 90.0, 120.0)
    """exponents of one channel when a step crosses the bound on purpose, rising"""
    d_model: CountOrNone = 32
    """width of the model that is trained; 0 as the device allows"""
    n_layer: Annotated[int, between(0, 10_000)] = 2
    """its layers; 0 as the device allows"""
    batch: CountOrNone = 4
    """sequences of a training step; 0 as the device allows"""
    context: CountOrNone = 64
    """bytes of a sequence; 0 as the device allows"""
    schedule_steps: Count = 4000
    """steps of the whole schedule"""
    trained_forms: Annotated[tuple[FormOrAuto, ...], entries()] = (
        "auto", "corrected_cumsum", "document_chunked")
    """scan forms that are trained with"""
    trained_steps: Annotated[tuple[Count, ...], entries(0, once=False)] = (400, 400, 400)
    """steps that each of them does at most; empty as the device allows"""
    every: Count = 20
    """steps between two readings of the exponent"""
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    """where the training runs: cpu, cuda or auto; the map is the CPU's"""
    workers: Annotated[int, between(0, 1024)] = 1
    """trainings beside each other; 0 as the device allows"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.trained_steps) not in (0, len(self.trained_forms)):
            raise UserError(f"trained_steps has {len(self.trained_steps)} entries: expected one "
                            f"for each of the {len(self.trained_forms)} trained_forms, or none")


PROFILES = {
    "quick": Parameters(),
    "full": Parameters(
        low_precision_forms=tuple(form for form in ANY_CHUNK if form != "fused"),
        chunks=(2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256),
        decays=tuple(float(f"{10 ** (k / 5):.2g}") for k in range(-10, 7)),  # 0.01 to 16
        length=256, fraction_lengths=(*range(2, 65), 96, 128, 192, 256, 512, 1024, 2048),
        crossings=(60.0, 80.0, 87.0, 88.0, 89.0, 90.0, 95.0, 104.0, 120.0, 500.0),
        device="auto", d_model=0, n_layer=0, batch=0, context=0, trained_steps=(), workers=0,
        every=50),
}


@dataclass(frozen=True)
class Results:
    """What the study found."""

    outcomes: pd.DataFrame  # the map: what each cell comes to, a column a decay
    errors: pd.DataFrame  # the same in numbers
    noise: pd.DataFrame  # the error of the gradient of A at one chunk size
    inside: pd.DataFrame  # cells of the trick within its bound
    first: pd.DataFrame  # first chunk size at which each thing happens to value and gradients
    verdicts: pd.DataFrame  # one row a form
    mixers: pd.DataFrame  # every mixer under strong decay: exponents, errors of its operator
    pairs: pd.DataFrame  # share of pairs past the bound, by length
    followed: pd.DataFrame  # exponents while training, by form
    endings: pd.DataFrame  # how each training ended
    extrapolated: pd.DataFrame  # exponents at the end of the document's schedule
    crossing: pd.DataFrame  # what a step across the bound does
    document: pd.DataFrame  # the document's statements in numbers
