"""Training steps on a GPU, kept bytes and peak by CUDA's allocator, beside the closed form.

Where there is no GPU, what one has recorded is held against the closed form as it is today
(``recorded_frame``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from torch import nn

from analysis.allocations import autocast_to, build_model
from analysis.footprint import budget
from analysis.kept_tensors import Autocast, resolve_form, saved_terms
from analysis.records import DATA, load_record
from mambabyte.config import PRESETS, ModelConfig, TrainConfig
from mambabyte.errors import UserError
from mambabyte.optim import make_optimizer

MB = 1e6
# Peaks and kept bytes of the cases of ``cuda_cases``, by the allocator of another machine's GPU.
RECORDED = "measurements/h200-memory.json"
MEASURED = ("measured peak (MB)", "measured kept (MB)")


def cuda_cases() -> list[tuple[ModelConfig, int, int, Autocast, bool]]:
    """What a GPU machine measures: both document configurations and sizes around them."""
    model = PRESETS["mamba_byte"].model
    hybrid = PRESETS["hybrid_3_1"].model
    cases: list[tuple[ModelConfig, int, int, Autocast, bool]] = []
    for form in ("document_chunked", "chunked", "corrected_cumsum", "fused"):
        config = replace(model, scan_form=form)
        for batch, length in ((8, 512), (16, 1024), (32, 1024), (64, 2048)):
            cases += [(config, batch, length, "bf16", False),
                      (config, batch, length, "fp32", False)]
        cases.append((config, 64, 2048, "bf16", True))
    cases += [(replace(hybrid, scan_form=form), 8, 1024, "bf16", False)
              for form in ("chunked", "fused")]
    cases.append((replace(model, layer_pattern="A"), 16, 1024, "bf16", False))
    return cases


def measure_on_cuda(report: Callable[[str], None]) -> pd.DataFrame:
    """Every case of ``cuda_cases`` on this machine's GPU, by its allocator."""
    if not torch.cuda.is_available():
        raise UserError("no CUDA device is available: this measurement needs one")
    rows = []
    for case in cuda_cases():
        row = measure_cuda_peak(*case)
        rows.append(row)
        report(" ".join(str(value) for value in row.values() if value is not None))
    return pd.DataFrame(rows)


def measure_cuda_peak(
    config: ModelConfig, batch: int, length: int, autocast: Autocast = "bf16",
    checkpointing: bool = False,
) -> dict[str, Any]:
    """One case on a GPU: the bytes kept for the backward pass, and the peak of a whole step.

    Three steps with AdamW and clipping as in training; the peak of the last, weights and
    optimizer included. A step that does not fit says so in "error" and has no peak.
    """
    row: dict[str, Any] = {
        **case_columns(config, batch, length, autocast, checkpointing),
        **dict.fromkeys((*MEASURED, "error")),
    }
    torch.cuda.empty_cache()
    try:
        kept, peak = _cuda_step(config, batch, length, autocast, checkpointing)
    except torch.cuda.OutOfMemoryError as error:
        return row | {"error": str(error).splitlines()[0]}
    return row | dict(zip(MEASURED, (peak / MB, kept / MB), strict=True))


def case_columns(
    config: ModelConfig, batch: int, length: int, autocast: str, checkpointing: bool
) -> dict[str, Any]:
    """The columns that name a case, in a record as in the study's table."""
    return {"layers": config.layers, "d_model": config.d_model,
            "form": resolve_form(config, "cuda"), "batch": batch, "context": length,
            "autocast": autocast, "checkpointing": checkpointing}


def _cuda_step(
    config: ModelConfig, batch: int, length: int, autocast: Autocast, checkpointing: bool
) -> tuple[int, int]:
    """Allocated bytes that a loss holds, and the peak of a step, on the GPU."""
    model = build_model(config, checkpointing, "cuda")
    optimizer = make_optimizer(model, TrainConfig())
    tokens = torch.randint(0, config.vocab_size, (batch, length + 1), device="cuda")
    kept = 0
    for _ in range(3):
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with autocast_to("cuda", autocast):
            loss = model.loss(tokens)
        kept = torch.cuda.memory_allocated() - before
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        del loss
    return kept, torch.cuda.max_memory_allocated()


def beside_closed_form(measured: pd.DataFrame) -> pd.DataFrame:
    """Rows that a GPU measured, of ``cuda_cases`` at any time, beside the closed form of today.

    A row that could not be measured stays, with its "error". UserError for a row of no case.
    """
    cases = {tuple(case_columns(*case).values()): case for case in cuda_cases()}
    keys = list(case_columns(*cuda_cases()[0]))
    rows = []
    for row in measured.to_dict("records"):
        case = cases.get(tuple(row[key] for key in keys))
        if case is None:
            raise UserError(f"{RECORDED} has a row that is no case of this study: "
                            f"{ {key: row[key] for key in keys} }")
        config, batch, context, autocast, checkpointing = case
        step = budget(config, batch, context, autocast, "cuda", checkpointing)
        kept = sum(t.bytes for t in saved_terms(
            config, batch, context, autocast, "cuda", checkpointing))
        peak_measured, kept_measured = (row[name] for name in MEASURED)
        rows.append({
            **{key: row[key] for key in keys}, "worst moment": step.worst_moment,
            "kept, closed form, MB": kept / MB, "kept, measured, MB": kept_measured,
            "kept, closed form / measured": kept / MB / kept_measured if kept_measured else None,
            "peak, closed form, MB": step.peak / MB, "peak, measured, MB": peak_measured,
            "peak, closed form / measured":
                step.peak / MB / peak_measured if peak_measured else None})
    return pd.DataFrame(rows)


def recorded_frame() -> pd.DataFrame:
    """The record RECORDED beside the closed form of today; columns of ``beside_closed_form``."""
    return beside_closed_form(load_record(DATA / RECORDED).run.tables["cuda"].frame)
