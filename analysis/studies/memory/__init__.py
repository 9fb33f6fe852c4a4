"""Study: how many bytes one training step needs, where they go, and what fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import pandas as pd

from mambabyte.config.checks import Checked, Count, Layers, entries, multiple_of
from mambabyte.config.mixers import LayerPattern
from mambabyte.config.scan_forms import ScanForm

TITLE = "Memory footprint"
QUESTION = "How many bytes does one training step need, where do they go, and what fits?"
NOTEBOOK = "01_memory_footprint.ipynb"

Autocast = Literal["fp32", "bf16", "fp16"]
AUTOCASTS: tuple[Autocast, ...] = ("fp32", "bf16", "fp16")
AS_CODED = "in the script's own order"  # (delta x B) u, see mambabyte.ops.scan.cumsum
# What the tables of whole steps show. All pairs of a chunk would be ten times off their scale.
SCAN_FORMS = (
    "recurrent", "chunked", "corrected_cumsum", "document_chunked", "document_cumsum", "fused",
)


@dataclass(frozen=True)
class Parameters(Checked):
    """Sizes at which the closed form is held against the counts.

    ``batch``, ``context``, ``d_model`` and ``n_layer`` are those of the measured steps; the
    tables of the document's configurations and of the devices do not depend on them.
    """

    forms: Annotated[tuple[ScanForm, ...], entries()] = SCAN_FORMS
    """scan forms in the tables of whole steps"""
    patterns: Annotated[tuple[LayerPattern, ...], entries()] = ("M", "A", "MMMA")
    """layer patterns of the measured steps"""
    autocasts: Annotated[tuple[Autocast, ...], entries()] = ("fp32", "bf16")
    """autocast of the measured steps: fp32, bf16, fp16"""
    batch: Count = 2
    """sequences of a measured step"""
    context: Count = 64
    """bytes of a sequence"""
    d_model: Annotated[int, multiple_of(8)] = 64
    """width, a multiple of 8: attention has 4 heads"""
    n_layer: Layers = 2
    """layers, at least as many as a pattern has letters"""
    slice_lengths: Annotated[tuple[Count, ...], entries(2, rising=True)] = (128, 512, 2048)
    """lengths whose backward allocations are counted, slices against split"""
    counted_layers: Layers = 2
    """layers of the document's original step that are counted on shapes alone"""
    cuda: Literal["auto", "on", "off"] = "off"
    """whether this machine's GPU is measured: auto, on, off"""


PROFILES = {
    "quick": Parameters(),
    "full": Parameters(patterns=("M", "A", "MA", "MMMA"), autocasts=AUTOCASTS, batch=4,
                       context=256, d_model=192, n_layer=4,
                       slice_lengths=(128, 256, 512, 1024, 2048, 4096, 8192), counted_layers=4,
                       cuda="auto"),
}


@dataclass(frozen=True)
class Results:
    """What the study found; every frame has its units in the column names."""

    saved: pd.DataFrame  # closed form against count, each form, pattern and autocast state
    peaks: pd.DataFrame  # closed form against the profiler
    mixers: pd.DataFrame  # kept bytes and peak of every mixer, at two lengths
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
