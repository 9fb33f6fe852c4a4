"""Study: the closed form of a training step's memory against what is counted and measured.

The closed form is analysis.theory.step_memory. Three instruments stand beside it: hooks on the
tensors that autograd saves and torch's profiler for the peak on the CPU
(analysis.measure.allocations), and CUDA's allocator for the peak on a GPU, this machine's or a
recorded one (analysis.studies.memory.gpu).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pandas as pd
import torch

from analysis.measure.allocations import measure_peak, measure_saved
from analysis.measure.scans import runnable
from analysis.measure.threads import threads
from analysis.studies.memory import AS_CODED, Parameters, Results
from analysis.studies.memory.closed_form import (
    budgets_frame,
    device_frames,
    state_frame,
    terms_frame,
)
from analysis.studies.memory.gpu import gpu_frame, libraries_frame
from analysis.studies.memory.scans import (
    five_to_seven_frame,
    full_tensors_frame,
    kept_without_concatenation,
    slices_frame,
)
from analysis.theory.kept_tensors import Autocast, saved_terms
from analysis.theory.sizes import at_size
from analysis.theory.step_memory import budget
from mambabyte.config import PRESETS, SPECS, ModelConfig, TrainConfig
from mambabyte.config.mixers import kind_of, uses_scan_form
from mambabyte.ops.scan.memory import FLOAT32, scan_workspace

GB = 1e9


def run(p: Parameters, report: Callable[[str], None]) -> Results:
    """Closed form, counts, and what follows from them. The same numbers on every run."""
    with threads(1):
        report("counting saved tensors, measuring peaks with the profiler")
        saved, peaks = _counted_frames(p)
        report("every mixer against length")
        mixers = _mixers_frame(p)
        report("counting what slices in a loop allocate")
        slices = slices_frame(p.slice_lengths)
        report("the document's configurations")
        gpu, cuda = gpu_frame(measures_gpu(p.cuda), report)
        return Results(
            saved, peaks, mixers, full_tensors_frame(), five_to_seven_frame(), terms_frame(),
            budgets_frame(p.forms),
            state_frame(), slices, *device_frames(p.forms), _document_frame(p.counted_layers), cuda,
            libraries_frame(cuda), gpu)


def measures_gpu(cuda: str) -> bool:
    """Whether a GPU is measured, by the parameter ``cuda``; "auto" is where there is one."""
    return cuda == "on" or (cuda == "auto" and torch.cuda.is_available())


def _config(p: Parameters, form: str, pattern: str) -> ModelConfig:
    return at_size(ModelConfig(), p.d_model, max(p.n_layer, len(pattern)), 4,
                   layer_pattern=pattern, scan_form=form)


def _cases(p: Parameters) -> list[tuple[str, str, Autocast, bool]]:
    """(form, pattern, autocast, checkpointing) of every step that is counted and profiled."""
    cases: list[tuple[str, str, Autocast, bool]] = []
    for pattern in p.patterns:
        for form in runnable(p.forms) if uses_scan_form(pattern) else ("recurrent",):
            for autocast in p.autocasts:
                cases += [(form, pattern, autocast, False), (form, pattern, autocast, True)]
    return cases


def _counted_frames(p: Parameters) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Kept bytes and peaks of every case: closed form, count by hooks, peak by the profiler."""
    saved, peaks = [], []
    for form, pattern, autocast, checkpointing in _cases(p):
        key = {"form": form if uses_scan_form(pattern) else "none", "pattern": pattern,
               "autocast": autocast, "checkpointing": checkpointing}
        sizes = (_config(p, form, pattern), p.batch, p.context, autocast)
        kept, counted = _kept(*sizes, checkpointing)
        saved.append({**key, "predicted, B": kept, "counted, B": counted,
                      "predicted / counted": kept / counted})
        moment, peak, profiled = _peak(*sizes, checkpointing)
        peaks.append({**key, "worst moment": moment, "predicted, B": peak, "profiled, B": profiled,
                      "predicted / profiled": peak / profiled})
    return pd.DataFrame(saved), pd.DataFrame(peaks)


def _mixers_frame(p: Parameters) -> pd.DataFrame:
    """A row a registered mixer and context: what a step of one layer keeps and takes in float32."""
    rows = []
    for letter in SPECS:
        config = at_size(ModelConfig(), p.d_model, 1, 4, layer_pattern=letter)
        for context in (p.context, 4 * p.context):
            kept, counted = _kept(config, p.batch, context)
            _, peak, profiled = _peak(config, p.batch, context)
            rows.append({
                "mixer": kind_of(letter), "context, bytes": context, "kept, B": kept,
                "kept, predicted / counted": kept / counted, "peak, B": peak,
                "peak, predicted / profiled": peak / profiled})
    return pd.DataFrame(rows)


def _kept(
    config: ModelConfig, batch: int, context: int, autocast: Autocast = "fp32",
    checkpointing: bool = False,
) -> tuple[int, int]:
    """Bytes kept for the backward pass by the closed form, and as counted."""
    terms = saved_terms(config, batch, context, autocast, checkpointing=checkpointing)
    return (sum(t.bytes for t in terms),
            measure_saved(config, batch, context, autocast, checkpointing))


def _peak(
    config: ModelConfig, batch: int, context: int, autocast: Autocast = "fp32",
    checkpointing: bool = False,
) -> tuple[str, int, int]:
    """The moment and the bytes of the peak above weights and optimizer by the closed form, and
    as profiled."""
    step = budget(config, batch, context, autocast, checkpointing=checkpointing)
    return (step.worst_moment, step.peak - step.weights - step.optimizer,
            measure_peak(config, batch, context, autocast, checkpointing))


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
