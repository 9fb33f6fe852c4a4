"""Study: where each form of the scan goes wrong, how it shows, and whether training gets there."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from analysis.theory.forms import ANY_CHUNK, check_forms
from mambabyte.errors import UserError

TITLE = "Overflow versus chunk size"
QUESTION = "At which chunk size and decay does each form of the scan go wrong, and is it silent?"
NOTEBOOK = "02_overflow_vs_chunk_size.ipynb"

# The last two: u, delta, B and C rounded to that type, all arithmetic in float32.
PRECISIONS = ("float32", "bfloat16", "float16", "bf16 inputs", "fp16 inputs")
KINDS = ("constant", "data-dependent")


@dataclass(frozen=True)
class Grid:
    """The cells of the map, and the size of the scans in them.

    ``chunks`` in steps, ``decays`` in nats a step, ``length`` the sequence in steps. Precisions
    other than float32 are mapped for ``low_precision_forms``.
    """

    forms: tuple[str, ...] = ANY_CHUNK
    low_precision_forms: tuple[str, ...] = ("sequential", "corrected_cumsum", "segment_sum")
    precisions: tuple[str, ...] = PRECISIONS
    kinds: tuple[str, ...] = KINDS
    chunks: tuple[int, ...] = (4, 8, 16, 32, 48, 64, 96, 128)
    decays: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8)
    length: int = 128
    channels: int = 2
    states: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        check_forms(self.forms)
        if self.low_precision_forms:
            check_forms(self.low_precision_forms)
        if not self.precisions or set(self.precisions) - set(PRECISIONS):
            raise UserError(f"precisions {self.precisions}: choose from {', '.join(PRECISIONS)}")
        if not self.kinds or set(self.kinds) - set(KINDS):
            raise UserError(f"kinds {self.kinds}: choose from {', '.join(KINDS)}")
        if not self.decays or min(self.decays) <= 0:
            raise UserError("decays are nats a step, each above 0, at least one")
        if min(self.chunks, default=0) < 1 or min(self.length, self.channels, self.states) < 1:
            raise UserError("chunks, length, channels and states must be 1 or more")


@dataclass(frozen=True)
class Parameters(Grid):
    """The grid of the error map, and how far the training is followed."""

    corpus: str = "stdlib"
    fraction_lengths: tuple[int, ...] = (16, 32, 48, 56, 57, 64, 96, 128, 256, 512, 1024)
    # Exponents of one channel when a training step crosses the bound on purpose.
    crossings: tuple[float, ...] = (60.0, 87.0, 90.0, 120.0)
    # The model that is trained: its width, layers, and how much of the schedule is done. 0 (of
    # workers too) and an empty trained_steps stand for what the device is fit for.
    d_model: int = 32
    n_layer: int = 2
    batch: int = 4
    context: int = 64
    schedule_steps: int = 4000
    # Scan forms that are trained with, and the steps of the schedule that each does at most.
    trained_forms: tuple[str, ...] = ("auto", "corrected_cumsum", "document_chunked")
    trained_steps: tuple[int, ...] = (600, 400, 400)
    every: int = 20
    # Where the training runs: cpu, cuda, or auto, the GPU if there is one. The map is made on the
    # CPU in any case.
    device: str = "cpu"
    workers: int = 1  # trainings beside each other: a GPU has room for all three

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1 or min(self.fraction_lengths, default=0) < 1:
            raise UserError("every must be 1 or more, and each of fraction_lengths, at least one")
        if not self.crossings or min(self.crossings) <= 0:
            raise UserError("crossings are nats, each above 0, at least one")
        if self.device not in ("auto", "cpu", "cuda"):
            raise UserError(f"device {self.device!r}: choose auto, cpu or cuda")
        if not self.trained_forms or len(self.trained_steps) not in (0, len(self.trained_forms)):
            raise UserError(f"trained_forms has {len(self.trained_forms)} entries and "
                            f"trained_steps {len(self.trained_steps)}: one number a form")


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
    pairs: pd.DataFrame  # share of pairs past the bound, by length
    followed: pd.DataFrame  # exponents while training, by form
    endings: pd.DataFrame  # how each training ended
    extrapolated: pd.DataFrame  # exponents at the end of the document's schedule
    crossing: pd.DataFrame  # what a step across the bound does
    document: pd.DataFrame  # the document's statements in numbers
