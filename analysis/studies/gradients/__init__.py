"""Study: is the gradient that crosses a chunk boundary the gradient of the recurrence?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pandas as pd

from analysis.theory.forms import ANY_CHUNK
from mambabyte.config.checks import Checked, Count, Device, Seed, between, entries
from mambabyte.config.scan_forms import ScanForm
from mambabyte.errors import UserError

TITLE = "Gradients across chunk boundaries"
QUESTION = "Is the gradient that crosses a chunk boundary the gradient of the recurrence?"
NOTEBOOK = "03_chunk_boundary_gradients.ipynb"
DOCUMENT_DIFFERENCE = 0.13  # %, scan against step, as the document measured it


@dataclass(frozen=True)
class Scans(Checked):
    """The forms that are compared and the size of their scans."""

    forms: Annotated[tuple[ScanForm, ...], entries()] = (
        "recurrent", "chunked", "fused", "corrected_cumsum", "document_chunked", "segment_sum",
        "associative")
    """scan forms that are compared"""
    length: Count = 128
    """steps of a scan, more than a chunk"""
    chunk: Count = 32
    """steps of a chunk"""
    channels: Count = 8
    """channels of a scan"""
    states: Count = 16
    """states a channel"""
    seed: Seed = 0
    """of inputs, models and trainings"""
    device: Device = "cpu"
    """where the forms run; the definition is the CPU's, in float64"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk >= self.length:
            raise UserError(f"chunk is {self.chunk} and length {self.length}: expected a chunk "
                            "shorter than the length, as there is no boundary otherwise")


@dataclass(frozen=True)
class Parameters(Scans):
    """The scans that are compared, and the sizes of the recall task. Lengths in steps."""

    corpus: str = "stdlib"
    """text: stdlib, wikitext103, a folder or a file"""
    draws: Count = 3
    """draws of the untrained model's weights, scan against step"""
    segments: Annotated[tuple[Count, ...], entries(rising=True)] = (4, 8, 32)
    """how far the gradient reaches in training, steps; the last is the whole sequence"""
    recall_length: Annotated[int, between(3, 10**6)] = 32
    """steps of a recall sequence"""
    recall_far: Count = 8
    """distance beyond which the far symbol lies"""
    recall_steps: Count = 200
    """training steps of recall"""
    recall_seeds: Count = 1
    """trainings of each kind"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recall_far >= self.recall_length - 1:
            raise UserError(f"recall_far is {self.recall_far}: expected to lie inside "
                            f"recall_length, {self.recall_length}")


PROFILES = {
    "quick": Parameters(),
    "full": Parameters(
        forms=ANY_CHUNK, length=512, channels=16, draws=20, segments=(2, 4, 8, 16, 48),
        recall_length=48, recall_far=16, recall_steps=600, recall_seeds=5),
}


@dataclass(frozen=True)
class Results:
    """What the study found."""

    boundaries: pd.DataFrame  # error of each gradient at every boundary
    distances: pd.DataFrame  # size and error of the gradient by distance
    mixers: pd.DataFrame  # every mixer at one boundary
    checks: pd.DataFrame  # gradcheck, and the comparison that it cannot make
    steps: pd.DataFrame  # scan against step in the untrained model
    recall: pd.DataFrame  # accuracy by distance after truncated training
    learning: pd.DataFrame  # steps to learn, a row a training
