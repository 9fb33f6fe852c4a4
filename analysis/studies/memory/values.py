"""The memory study's answer in named values, for the report's prose and the claims ledger."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from analysis.runs.folders import Value
from analysis.studies.memory import AS_CODED, Parameters, Results
from analysis.theory.step_memory import LIBRARY_BYTES, state_bytes
from mambabyte.config import PRESETS

MB = 1e6
# The document's statements in our numbers: key -> unit, what it is.
DOCUMENT = {
    "tensor_gb": ("GB", "one full tensor at 64 x 2048"),
    "kept_per_layer": ("", "full tensors kept per layer"),
    "live_per_layer": ("", "full tensors alive in a layer at the peak of its backward pass"),
    "scan_kept_before_gb": ("GB", "full tensors kept, four layers, 64 x 2048"),
    "kept_before_gb": ("GB", "all kept, float32, 64 x 2048"),
    "kept_before_bf16_gb": ("GB", "all kept, bf16 autocast, 64 x 2048"),
    "scan_kept_before_bf16_gb": ("GB", "full tensors kept under bf16 autocast, 64 x 2048"),
    "scan_kept_after_gb": ("GB", "full tensors kept, four layers, 16 x 1024"),
    "scan_cut": ("times", "cut of the scan's memory by the fix"),
    "without_concatenation": ("", "full tensors kept without concatenation, relative to with"),
    "counted_at_size": ("", "counted / closed form at 64 x 2048"),
    "peak_before_gb": ("GB", "peak at 64 x 2048, bf16 autocast"),
    "peak_after_gb": ("GB", "peak at 16 x 1024, bf16 autocast"),
    "margin": ("times", "40 GB over that peak"),
}
# What is said of the script's own order of the products too.
CODED = ("kept_per_layer", "live_per_layer", "scan_kept_before_gb", "peak_before_gb",
         "peak_after_gb", "margin")


def values(found: Results, p: Parameters) -> dict[str, Value]:
    """The study's answer in named numbers."""
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
        "worst_cuda_error": Value(_worst_error(found.cuda.dropna()), "",
                                  "largest |closed form / measured - 1| of the peak on a GPU"),
        "worst_cuda_kept_error": Value(
            float((found.cuda["kept, closed form / measured"].dropna() - 1).abs().max()), "",
            "the same of the bytes kept"),
        "cuda_cases": Value(len(found.cuda), "", "cases measured on a GPU"),
        "cuda_gpu": Value(found.gpu, "", "that GPU"),
        "libraries_mb": Value(
            LIBRARY_BYTES / MB, "MB", "held by the matrix libraries on a GPU, the "
            "one constant that was read off the measurements"),
        "libraries_fitted_mb": Value(libraries.loc["smaller half", "constant, MB"], "MB",
                                     "the same fitted to the smaller half of the steps"),
        "libraries_larger_error": Value(
            libraries.loc["smaller half", "largest error of their peaks"], "",
            "largest error of the peak of the larger half with that constant"),
        "libraries_low_mb": Value(
            libraries["constant, MB"].min(), "MB", "least constant of any fit"),
        "libraries_high_mb": Value(libraries["constant, MB"].max(), "MB", "largest of any fit"),
        "libraries_left_out_error": Value(
            libraries["largest error of their peaks"].max(), "",
            "largest error of the peak of steps that had no part in the fit, over all fits"),
        "libraries_none_error": Value(libraries["the same with no constant"].max(), "",
                                      "largest error of the peak without any constant"),
        "worst_saved_error": Value(_worst_error(found.saved), "",
                                   "largest |predicted / counted - 1| of the kept bytes"),
        "worst_peak_error": Value(_worst_error(found.peaks), "",
                                  "largest |predicted / profiled - 1| of the peak on the CPU"),
        **{key: Value(float(document[key]), unit, about)
           for key, (unit, about) in DOCUMENT.items()},
        **{f"coded_{key}": Value(float(as_coded[key]), DOCUMENT[key][0],
                                 f"{DOCUMENT[key][1]}, in the script's own order")
           for key in CODED},
        "with_log_decay": Value(
            alive[1], "", "such tensors with log_decay, until the layer's forward " "pass ends"),
        "with_gradients": Value(alive[3], "", "such tensors with the gradients of b and log_decay"),
        "live_measured": Value(found.five_to_seven["measured, full tensors"].iloc[-1], "",
                               "full tensors at the peak of the backward pass, by the profiler"),
        "fused_peak_before_gb": Value(fused, "GB", "peak at 64 x 2048 with the fused scan, bf16"),
        "slices_exponent": Value(slope["slices in a loop"], "",
                                 "growth exponent of bytes allocated backward, slices"),
        "split_exponent": Value(slope["split"], "", "the same with split"),
        "ssm_state_bytes": Value(state, "B", "streaming state of mamba_byte, float32, any length"),
        "crossover_bytes": Value(state / state_bytes(attention, 1)["kv_cache"], "B",
                                 "bytes seen at which a full KV cache outgrows that state"),
    }


def _worst_error(frame: pd.DataFrame) -> float:
    """Largest |ratio - 1| of a frame whose last column is predicted over measured."""
    return float((frame[frame.columns[-1]].astype(float) - 1).abs().max())


def _slope(x: pd.Series, y: pd.Series) -> float:
    """Growth exponent of y over x between the two largest x: 1 linear, 2 quadratic."""
    (x0, x1), (y0, y1) = x.nlargest(2).iloc[::-1], y.nlargest(2).iloc[::-1]
    return float(np.log(y1 / y0) / np.log(x1 / x0))
