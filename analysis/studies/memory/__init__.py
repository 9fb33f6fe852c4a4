"""Study: how many bytes one training step needs, where they go, and what fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pandas as pd

from analysis.theory.forms import check_forms
from mambabyte.errors import UserError

TITLE = "Memory footprint"
QUESTION = "How many bytes does one training step need, where do they go, and what fits?"
NOTEBOOK = "01_memory_footprint.ipynb"

Autocast = Literal["fp32", "bf16", "fp16"]
AUTOCASTS: tuple[Autocast, ...] = ("fp32", "bf16", "fp16")
AS_CODED = "in the script's own order"  # (delta x B) u, see mambabyte.ops.scan.cumsum
# What the tables of whole steps show. All pairs of a chunk would be ten times off their scale.
SCAN_FORMS = (
    "sequential", "chunked", "corrected_cumsum", "document_chunked", "document_cumsum", "fused",
)


@dataclass(frozen=True)
class Parameters:
    """Sizes at which the closed form is held against the counts.

    ``batch``, ``context``, ``d_model`` and ``n_layer`` are those of the measured steps; the
    tables of the document's configurations and of the devices do not depend on them.
    """

    forms: tuple[str, ...] = SCAN_FORMS
    patterns: tuple[str, ...] = ("M", "A", "MMMA")
    autocasts: tuple[Autocast, ...] = AUTOCASTS
    batch: int = 2
    context: int = 64
    d_model: int = 64
    n_layer: int = 2
    # Lengths of the scan whose backward allocations are counted, slices against split.
    slice_lengths: tuple[int, ...] = (128, 512, 2048)
    # Layers of the document's original step (64 x 2048) that are counted on shapes alone.
    counted_layers: int = 4
    # Kept bytes and peaks by the allocator of this machine's GPU: "auto" where there is one. The
    # other machines show those that are recorded.
    cuda: Literal["auto", "on", "off"] = "off"

    def __post_init__(self) -> None:
        check_forms(self.forms)
        for name in ("patterns", "autocasts"):
            if not getattr(self, name):
                raise UserError(f"{name} is empty: name at least one")
        if len(set(self.slice_lengths)) < 2:
            raise UserError(f"slice_lengths {self.slice_lengths}: growth shows only between two "
                            "lengths, give at least two")
        if set(self.autocasts) - set(AUTOCASTS):
            raise UserError(f"autocasts {self.autocasts}: choose from {', '.join(AUTOCASTS)}")
        sizes = (self.batch, self.context, self.d_model, self.n_layer, self.counted_layers,
                 *self.slice_lengths)
        if min(sizes) < 1:
            raise UserError("batch, context, d_model, n_layer, counted_layers and slice_lengths "
                            "must be 1 or more")


PROFILES = {
    "quick": Parameters(),
    "full": Parameters(patterns=("M", "A", "MA", "MMMA"), batch=4, context=256, d_model=192,
                       n_layer=4, slice_lengths=(128, 256, 512, 1024, 2048, 4096, 8192),
                       cuda="auto"),
}


@dataclass(frozen=True)
class Results:
    """What the study found; every frame has its units in the column names."""

    saved: pd.DataFrame  # closed form against count, each form, pattern and autocast state
    peaks: pd.DataFrame  # closed form against the profiler
    full_tensors: pd.DataFrame  # (B, L, D, N) tensors that each form keeps
    five_to_seven: pd.DataFrame  # those of the document's form alive at each moment
    terms: pd.DataFrame  # each tensor of one layer of the document's original step
    budgets: pd.DataFrame  # categories, document's two configurations, every form
    state: pd.DataFrame  # streaming state against KV cache
    slices: pd.DataFrame  # bytes that the backward pass of slices allocates
    devices: pd.DataFrame  # the largest batch that fits each common device
    device_contexts: pd.DataFrame  # the largest context that does
    document: pd.DataFrame  # the document's statements in numbers
    cuda: pd.DataFrame  # closed form against a GPU's allocator: this machine's, or a record's
    libraries: pd.DataFrame  # the closed form's one fitted constant, judged by other steps
    gpu: str  # whose allocator that was
