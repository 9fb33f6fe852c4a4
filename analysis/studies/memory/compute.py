"""Study: the closed form of a training step's memory against what is counted and measured.

The closed form is analysis.theory.step_memory. Three instruments stand beside it: hooks on the
tensors that autograd saves and torch's profiler for the peak on the CPU
(analysis.measure.allocations), and CUDA's allocator for the peak on a GPU, this machine's or a
recorded one (analysis.studies.memory.gpu).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd
import torch

from analysis.measure.allocations import measure_peak, measure_saved
from analysis.measure.scans import check_forms, runnable
from analysis.measure.threads import threads
from analysis.studies.memory.gpu import gpu_frame, libraries_frame
from analysis.studies.memory.scans import (
    five_to_seven_frame,
    full_tensors_frame,
    kept_without_concatenation,
    slices_frame,
)
from analysis.studies.memory.tables import budgets_frame, device_frames, state_frame, terms_frame
from analysis.theory.kept_tensors import AUTOCASTS, Autocast, saved_terms
from analysis.theory.step_memory import LIBRARY_BYTES, budget, state_bytes
from mambabyte.config import PRESETS, ModelConfig, TrainConfig
from mambabyte.config.mixers import uses_scan_form
from mambabyte.errors import UserError
from mambabyte.ops.scan.memory import FLOAT32, scan_workspace

MB, GB = 1e6, 1e9
# What the tables of whole steps show. All pairs of a chunk would be ten times off their scale.
AS_CODED = "in the script's own order"  # (delta x B) u, see mambabyte.ops.scan.cumsum
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
class Memory:
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


def run(p: Parameters, report: Callable[[str], None]) -> Memory:
    """Closed form, counts, and what follows from them. The same numbers on every run."""
    with threads(1):
        report("counting saved tensors")
        saved = _saved_frame(p)
        report("measuring peaks with the profiler")
        peaks = _peaks_frame(p)
        report("counting what slices in a loop allocate")
        slices = slices_frame(p.slice_lengths)
        report("the document's configurations")
        on_gpu = p.cuda == "on" or (p.cuda == "auto" and torch.cuda.is_available())
        gpu, cuda = gpu_frame(on_gpu, report)
        return Memory(
            saved, peaks, full_tensors_frame(), five_to_seven_frame(), terms_frame(),
            budgets_frame(p.forms),
            state_frame(), slices, *device_frames(p.forms), _document_frame(p.counted_layers), cuda,
            libraries_frame(cuda), gpu)


def _worst_error(frame: pd.DataFrame) -> float:
    """Largest |ratio - 1| of a frame whose last column is predicted over measured."""
    return float((frame[frame.columns[-1]].astype(float) - 1).abs().max())


def headline(found: Memory) -> dict[str, tuple[float | bool | None, str, str]]:
    """The study's answer in named values: name -> (value, unit, about)."""
    document, as_coded = (found.document.set_index("key")[name] for name in ("ours", AS_CODED))
    libraries = found.libraries.set_index("fitted to")
    alive = found.five_to_seven["closed form, full tensors"]
    budgets = found.budgets[(found.budgets["autocast"] == "bf16")
                            & ~found.budgets["checkpointing"]]
    peak = budgets.set_index(["configuration", "form"])["peak, GB"]
    state = state_bytes(PRESETS["mamba_byte"].model, 1)["ssm"]
    attention = replace(PRESETS["mamba_byte"].model, layer_pattern="A", attention_window=2**21)
    fused = float(peak["64 x 2048", "fused"]) if "fused" in found.budgets["form"].values else None
    slope = {how: _slope(rows["length, steps"], rows["allocated in backward, B"])
             for how, rows in found.slices.groupby("how")}
    return {
        "worst_cuda_error": (_worst_error(found.cuda.dropna()), "",
                             "largest |closed form / measured - 1| of the peak on a GPU"),
        "worst_cuda_kept_error": (
            float((found.cuda["kept, closed form / measured"].dropna() - 1).abs().max()), "",
            "the same of the bytes kept"),
        "cuda_cases": (len(found.cuda), "", "cases measured on a GPU"),
        "libraries_mb": (LIBRARY_BYTES / MB, "MB", "held by the matrix libraries on a GPU, the "
                         "one constant that was read off the measurements"),
        "libraries_fitted_mb": (libraries.loc["smaller half", "constant, MB"], "MB",
                                "the same fitted to the smaller half of the steps"),
        "libraries_larger_error": (
            libraries.loc["smaller half", "largest error of their peaks"], "",
            "largest error of the peak of the larger half with that constant"),
        "libraries_low_mb": (libraries["constant, MB"].min(), "MB", "least constant of any fit"),
        "libraries_high_mb": (libraries["constant, MB"].max(), "MB", "largest of any fit"),
        "libraries_left_out_error": (
            libraries["largest error of their peaks"].max(), "",
            "largest error of the peak of steps that had no part in the fit, over all fits"),
        "libraries_none_error": (libraries["the same with no constant"].max(), "",
                                 "largest error of the peak without any constant"),
        "worst_saved_error": (_worst_error(found.saved), "",
                              "largest |predicted / counted - 1| of the kept bytes"),
        "worst_peak_error": (_worst_error(found.peaks), "",
                             "largest |predicted / profiled - 1| of the peak on the CPU"),
        "tensor_gb": (document["tensor_gb"], "GB", "one full tensor at 64 x 2048"),
        **{f"coded_{key}": (float(as_coded[key]), unit, f"{about}, in the script's own order")
           for key, unit, about in (
               ("kept_per_layer", "", "full tensors kept per layer"),
               ("live_per_layer", "", "full tensors alive in a layer at its peak"),
               ("scan_kept_before_gb", "GB", "full tensors kept, four layers, 64 x 2048"),
               ("peak_before_gb", "GB", "peak at 64 x 2048, bf16 autocast"),
               ("peak_after_gb", "GB", "peak at 16 x 1024, bf16 autocast"),
               ("margin", "times", "40 GB over that peak"))},
        "kept_per_layer": (document["kept_per_layer"], "", "full tensors kept per layer"),
        "live_per_layer": (document["live_per_layer"], "",
                           "full tensors alive in a layer at the peak of its backward pass"),
        "with_log_decay": (alive[1], "", "such tensors with log_decay, until the layer's forward "
                           "pass ends"),
        "with_gradients": (alive[3], "", "such tensors with the gradients of b and log_decay"),
        "live_measured": (found.five_to_seven["measured, full tensors"].iloc[-1], "",
                          "full tensors at the peak of the backward pass, by the profiler"),
        "scan_kept_before_gb": (document["scan_kept_before_gb"], "GB",
                                "full tensors kept, four layers, 64 x 2048"),
        "kept_before_gb": (document["kept_before_gb"], "GB", "all kept, float32, 64 x 2048"),
        "kept_before_bf16_gb": (document["kept_before_bf16_gb"], "GB",
                                "all kept, bf16 autocast, 64 x 2048"),
        "scan_kept_before_bf16_gb": (document["scan_kept_before_bf16_gb"], "GB",
                                     "full tensors kept under bf16 autocast, 64 x 2048"),
        "scan_kept_after_gb": (document["scan_kept_after_gb"], "GB",
                               "full tensors kept, four layers, 16 x 1024"),
        "scan_cut": (document["scan_cut"], "times", "cut of the scan's memory by the fix"),
        "without_concatenation": (document["without_concatenation"], "",
                                  "full tensors kept without concatenation, relative to with"),
        "counted_at_size": (document["counted_at_size"], "",
                            "counted / closed form at 64 x 2048"),
        "peak_before_gb": (document["peak_before_gb"], "GB", "peak at 64 x 2048, bf16 autocast"),
        "peak_after_gb": (document["peak_after_gb"], "GB", "peak at 16 x 1024, bf16 autocast"),
        "margin": (document["margin"], "times", "40 GB over that peak"),
        "fused_peak_before_gb": (fused, "GB", "peak at 64 x 2048 with the fused scan, bf16"),
        "slices_exponent": (slope["slices in a loop"], "",
                            "growth exponent of bytes allocated backward, slices"),
        "split_exponent": (slope["split"], "", "the same with split"),
        "ssm_state_bytes": (state, "B", "streaming state of mamba_byte, float32, any length"),
        "crossover_bytes": (state / state_bytes(attention, 1)["kv_cache"], "B",
                            "bytes seen at which a full KV cache outgrows that state"),
    }


def _slope(x: pd.Series, y: pd.Series) -> float:
    """Growth exponent of y over x between the two largest x: 1 linear, 2 quadratic."""
    (x0, x1), (y0, y1) = x.nlargest(2).iloc[::-1], y.nlargest(2).iloc[::-1]
    return float(np.log(y1 / y0) / np.log(x1 / x0))


def _config(p: Parameters, form: str, pattern: str) -> ModelConfig:
    n_layer = max(p.n_layer, len(pattern))
    return ModelConfig(d_model=p.d_model, n_layer=n_layer, layer_pattern=pattern, n_head=4,
                       n_kv_head=4, scan_form=form)


def _cases(p: Parameters) -> list[tuple[str, str, Autocast, bool]]:
    """(form, pattern, autocast, checkpointing) of every step that is counted and profiled."""
    cases: list[tuple[str, str, Autocast, bool]] = []
    for pattern in p.patterns:
        for form in runnable(p.forms) if uses_scan_form(pattern) else ("sequential",):
            for autocast in p.autocasts:
                cases += [(form, pattern, autocast, False), (form, pattern, autocast, True)]
    return cases


def _saved_frame(p: Parameters) -> pd.DataFrame:
    rows = []
    for form, pattern, autocast, checkpointing in _cases(p):
        config = _config(p, form, pattern)
        predicted = sum(t.bytes for t in saved_terms(
            config, p.batch, p.context, autocast, checkpointing=checkpointing))
        measured = measure_saved(config, p.batch, p.context, autocast, checkpointing)
        rows.append({
            "form": form if uses_scan_form(pattern) else "none", "pattern": pattern,
            "autocast": autocast,
            "checkpointing": checkpointing, "predicted, B": predicted, "counted, B": measured,
            "predicted / counted": predicted / measured})
    return pd.DataFrame(rows)


def _peaks_frame(p: Parameters) -> pd.DataFrame:
    rows = []
    for form, pattern, autocast, checkpointing in _cases(p):
        config = _config(p, form, pattern)
        step = budget(config, p.batch, p.context, autocast, checkpointing=checkpointing)
        predicted = step.peak - step.weights - step.optimizer
        measured = measure_peak(config, p.batch, p.context, autocast, checkpointing)
        rows.append({
            "form": form if uses_scan_form(pattern) else "none", "pattern": pattern,
            "autocast": autocast,
            "checkpointing": checkpointing, "worst moment": step.worst_moment,
            "predicted, B": predicted, "profiled, B": measured,
            "predicted / profiled": predicted / measured})
    return pd.DataFrame(rows)


def _document_frame(counted_layers: int) -> pd.DataFrame:
    """The document's statements about memory: in its numbers, in ours, and with the scan's inputs
    made in the order of the published script, which keeps one full tensor more."""
    ours, as_coded = (_document_numbers(form, counted_layers)
                      for form in ("document_chunked", "document_as_coded"))
    rows = [
        ("tensor_gb", "one (B, L, D, N) float32 tensor at 64 x 2048, GB", "3.2"),
        ("kept_per_layer", "such tensors kept per layer", "5 to 7"),
        ("live_per_layer", "such tensors alive in a layer at its peak", "5 to 7"),
        ("scan_kept_before_gb", "such tensors of four layers at 64 x 2048, GB", "64"),
        ("kept_before_gb", "everything kept at 64 x 2048, float32, GB", None),
        ("kept_before_bf16_gb", "everything kept at 64 x 2048, bf16 autocast, GB", None),
        ("scan_kept_before_bf16_gb", "such tensors at 64 x 2048, bf16 autocast, GB",
         "smaller than in float32"),
        ("scan_kept_after_gb", "such tensors at 16 x 1024, GB", "8"),
        ("scan_cut", "cut of the scan's memory by the fix, times", "16"),
        ("without_concatenation", "such tensors kept without concatenation, relative to with",
         "fewer"),
        ("counted_at_size", f"counted / closed form at 64 x 2048, {counted_layers} layers", None),
        ("peak_before_gb", "peak of a step at 64 x 2048, bf16 autocast, GB", "more than 40"),
        ("peak_after_gb", "peak of a step at 16 x 1024, bf16 autocast, GB", "8 and the rest"),
        ("margin", "40 GB over that peak, times", "4"),
    ]
    frame = pd.DataFrame(
        [(*row, ours[row[0]], as_coded[row[0]]) for row in rows],
        columns=["key", "statement", "document", "ours", AS_CODED])
    return frame.fillna({"document": "not stated"})


def _document_numbers(form: str, counted_layers: int) -> dict[str, float]:
    """The same statements by key, for one form of the document's scan."""
    before, after = PRESETS["mamba_byte_original"], PRESETS["mamba_byte"]
    config = replace(before.model, scan_form=form)

    def tensor(train: TrainConfig) -> int:
        return (train.batch_size * train.context * config.d_inner * config.d_state * FLOAT32)

    def kept(train: TrainConfig, autocast: Autocast, part: str = "") -> int:
        return sum(t.bytes for t in saved_terms(config, train.batch_size, train.context, autocast)
                   if part in ("", t.part))

    step = (replace(config, n_layer=counted_layers), before.train.batch_size, before.train.context)
    counted = measure_saved(*step, shapes_only=True)
    predicted = sum(t.bytes for t in saved_terms(*step))
    old, new = (budget(config, t.batch_size, t.context, "bf16", "cuda")
                for t in (before.train, after.train))
    _, backward = scan_workspace(form, before.train.batch_size, before.train.context,
                                 config.d_inner, config.d_state, 32)
    full = tensor(before.train)
    per_layer = kept(before.train, "fp32", "scan") / full / before.model.n_layer
    return {
        "tensor_gb": full / GB,
        "kept_per_layer": per_layer,
        "live_per_layer": per_layer + backward / full,
        "scan_kept_before_gb": kept(before.train, "fp32", "scan") / GB,
        "kept_before_gb": kept(before.train, "fp32") / GB,
        "kept_before_bf16_gb": kept(before.train, "bf16") / GB,
        "scan_kept_before_bf16_gb": kept(before.train, "bf16", "scan") / GB,
        "scan_kept_after_gb": kept(after.train, "fp32", "scan") / GB,
        "scan_cut": kept(before.train, "fp32", "scan") / kept(after.train, "fp32", "scan"),
        "without_concatenation": kept_without_concatenation(form),
        "counted_at_size": counted / predicted,
        "peak_before_gb": old.peak / GB,
        "peak_after_gb": new.peak / GB,
        "margin": 40 * GB / new.peak,
    }
