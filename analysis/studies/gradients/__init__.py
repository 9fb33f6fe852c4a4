"""Study: is the gradient that crosses a chunk boundary the gradient of the recurrence?"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from analysis.theory.forms import ANY_CHUNK, check_forms
from mambabyte.errors import UserError

TITLE = "Gradients across chunk boundaries"
QUESTION = "Is the gradient that crosses a chunk boundary the gradient of the recurrence?"
NOTEBOOK = "03_chunk_boundary_gradients.ipynb"
DOCUMENT_DIFFERENCE = 0.13  # %, scan against step, as the document measured it


@dataclass(frozen=True)
class Scans:
    """The forms that are compared and the size of their scans; ``length`` and ``chunk`` in steps.
    """

    forms: tuple[str, ...] = (
        "sequential", "chunked", "fused", "corrected_cumsum", "document_chunked", "segment_sum",
        "associative")
    length: int = 128
    chunk: int = 32
    channels: int = 8
    states: int = 16
    seed: int = 0
    # Where the forms run; the recurrence that they are held against runs on the CPU in float64.
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_forms(self.forms)
        if not 1 <= self.chunk < self.length:
            raise UserError(f"chunk {self.chunk} and length {self.length}: there is a boundary "
                            "only with 1 <= chunk < length")
        if min(self.channels, self.states) < 1:
            raise UserError("channels and states must be 1 or more")


@dataclass(frozen=True)
class Parameters(Scans):
    """The scans that are compared, and the sizes of the recall task. Lengths in steps."""

    corpus: str = "stdlib"
    # Draws of the untrained model's weights for the comparison of scan and step.
    draws: int = 3
    # How far the gradient reaches in training for recall; the last is the whole sequence.
    segments: tuple[int, ...] = (4, 8, 32)
    recall_length: int = 32
    recall_far: int = 8
    recall_steps: int = 200
    recall_seeds: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.segments:
            raise UserError("no segments are given: name at least one")
        if min(self.draws, self.recall_steps, self.recall_seeds, *self.segments) < 1:
            raise UserError("draws, recall_steps, recall_seeds and segments must be 1 or more")
        if not 1 <= self.recall_far < self.recall_length - 1:
            raise UserError(f"recall_far {self.recall_far} must lie inside recall_length "
                            f"{self.recall_length}")


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
    checks: pd.DataFrame  # gradcheck, and the comparison that it cannot make
    steps: pd.DataFrame  # scan against step in the untrained model
    recall: pd.DataFrame  # accuracy by distance after truncated training
    learning: pd.DataFrame  # steps to learn, a row a training
