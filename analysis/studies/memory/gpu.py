r"""Training steps on a GPU, kept bytes and peak by CUDA's allocator, beside the closed form.

Where there is no GPU, what one has recorded is held against the closed form as it is today
(``recorded_frame``): of the record's table the columns that name the case and those that were
measured are read, the closed form beside them is computed anew. The record is made by

    mambabyte study memory --profile full --record data/records/memory/h200-memory \
        --keep cuda --keep '*cuda*' --keep 'librar*'

One constant of the closed form, LIBRARY_BYTES, was read off such a record. How much of the
agreement that makes is the question of ``libraries_frame``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from analysis.measure.allocations import autocast_to, build_model
from analysis.runs.frames import not_measured
from analysis.runs.records import DATA, load_record, machine_name
from analysis.theory.kept_tensors import Autocast, saved_terms
from analysis.theory.step_memory import LIBRARY_BYTES, budget
from mambabyte.config import PRESETS, ModelConfig, TrainConfig
from mambabyte.errors import UserError
from mambabyte.model.families.mamba import resolve_form
from mambabyte.train import EagerStep
from mambabyte.train.optim import make_optimizer

MB = 1e6
# Peaks and kept bytes of the cases of ``cuda_cases``, by the allocator of another machine's GPU.
RECORDED = "records/memory/h200-memory/run.json"
MEASURED = ("kept, measured, MB", "peak, measured, MB")
# Steps that fit say this in the column "outcome"; the others that they ran out of memory.
FITS, TOO_LARGE = "measured", "out of memory"
Case = tuple[ModelConfig, int, int, Autocast, bool]


def cuda_cases() -> list[Case]:
    """What a GPU machine measures: both document configurations and sizes around them.

    The recurrent form launches kernels step by step and the whole-sequence form is small work
    that says no more when it is larger, so both are measured at small sizes alone.
    """
    model = PRESETS["mamba_byte"].model
    small, medium, large, document = (8, 512), (16, 1024), (32, 1024), (64, 2048)
    forms: dict[str, tuple[tuple[int, int], ...]] = {
        **dict.fromkeys(("document_chunked", "chunked", "corrected_cumsum", "fused"),
                        (small, medium, large, document)),
        "document_cumsum": (small, medium), "recurrent": (small,)}
    cases: list[Case] = []
    for form, sizes in forms.items():
        config = replace(model, scan_form=form)
        for size in sizes:
            cases += [(config, *size, "bf16", False), (config, *size, "fp32", False)]
        if document in sizes:
            cases.append((config, *document, "bf16", True))
    for form in ("chunked", "fused"):
        # The hybrid's layers without what joins them: the record is of these.
        hybrid = replace(PRESETS["hybrid_3_1"].model, scan_form=form, block_scales=False,
                         residual_mix=False, unet_skips=False, qk_gain=0.0, embed_norm=False,
                         embed_norm_gain=False)
        cases += [(hybrid, 8, 1024, "bf16", False), (hybrid, 8, 1024, "bf16", True)]
    for form in ("document_chunked", "fused"):
        mixed = replace(model, layer_pattern="MMMA", scan_form=form)
        cases += [(mixed, *medium, "bf16", False), (mixed, *medium, "fp32", False),
                  (mixed, *medium, "bf16", True)]
        cases.append((replace(model, scan_form=form), *medium, "fp16", False))
    attention = replace(model, layer_pattern="A", attention_window=document[1])
    for size in (small, medium, document):
        cases += [(attention, *size, "bf16", False), (attention, *size, "fp32", False)]
    cases += [(attention, *medium, "fp16", False), (attention, *document, "bf16", True)]
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
    optimizer included. A step that does not fit says so in "outcome" and has no bytes.
    """
    row: dict[str, Any] = {
        **case_columns(config, batch, length, autocast, checkpointing),
        **dict.fromkeys(MEASURED), "outcome": TOO_LARGE,
    }
    torch.cuda.empty_cache()
    try:
        taken = _cuda_step(config, batch, length, autocast, checkpointing)
    except torch.cuda.OutOfMemoryError:
        return row
    return row | {"outcome": FITS} | {
        name: n / MB for name, n in zip(MEASURED, taken, strict=True)}


def case_columns(
    config: ModelConfig, batch: int, length: int, autocast: str, checkpointing: bool
) -> dict[str, Any]:
    """The columns that name a case, in a record as in the study's table."""
    form = resolve_form(config, "cuda") if config.uses_scan_form else "none"
    return {"layers": config.layers, "d_model": config.d_model,
            "form": form, "batch": batch, "context": length,
            "autocast": autocast, "checkpointing": checkpointing}


def _cuda_step(
    config: ModelConfig, batch: int, length: int, autocast: Autocast, checkpointing: bool
) -> tuple[int, int]:
    """Allocated bytes that a loss holds, and the peak of a step, on the GPU."""
    model = build_model(config, checkpointing, "cuda")
    tokens = torch.randint(0, config.vocab_size, (batch, length + 1), device="cuda")
    kept = 0

    def loss(tokens: Tensor) -> Tensor:
        nonlocal kept
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with autocast_to("cuda", autocast):  # fp16 too, which no recipe has
            value = model.loss(tokens)
        kept = torch.cuda.memory_allocated() - before
        return value

    recipe = TrainConfig(precision="fp32")
    step = EagerStep(model, make_optimizer(model, recipe), lambda _: (tokens,), recipe, loss=loss)
    for _ in range(3):
        step(1.0)
    return kept, torch.cuda.max_memory_allocated()


def beside_closed_form(measured: pd.DataFrame) -> pd.DataFrame:
    """Rows that a GPU measured, of ``cuda_cases`` at any time, beside the closed form of today.

    A step that did not fit stays in the table, and says so. UserError for a row of no case.
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
        kept_measured, peak_measured = (row[name] for name in MEASURED)
        fits = row["outcome"] == FITS
        rows.append({
            **{key: row[key] for key in keys}, "outcome": row["outcome"],
            "worst moment": step.worst_moment,
            "kept, closed form, MB": kept / MB, "kept, measured, MB": kept_measured,
            "kept, closed form / measured": kept / MB / kept_measured if fits else None,
            "peak, closed form, MB": step.peak / MB, "peak, measured, MB": peak_measured,
            "peak, closed form / measured": step.peak / MB / peak_measured if fits else None})
    return not_measured(pd.DataFrame(rows))


def recorded_frame() -> pd.DataFrame:
    """The record RECORDED beside the closed form of today; columns of ``beside_closed_form``."""
    return beside_closed_form(load_record((DATA / RECORDED).parent).tables["cuda"].frame)


def libraries_frame(found: pd.DataFrame) -> pd.DataFrame:
    """The one fitted constant, from some of the cases ``found``, judged by the others.

    In turn it is fitted to the smaller half of the steps, to every second one, and to all scan
    forms but one (attention counts as a form); the errors are those of the peaks left out, with
    the constant that was fitted and with none.
    """
    cases = found[found["outcome"] == FITS]
    bare = cases["peak, closed form, MB"] - LIBRARY_BYTES / MB
    measured = cases["peak, measured, MB"].astype(float)
    rank = bare.rank(method="first")
    splits = [("smaller half", "larger half", rank <= len(cases) / 2),
              ("every second by size", "the others", rank % 2 == 1)]
    for form in dict.fromkeys(cases["form"]):
        name = "attention alone" if form == "none" else form
        splits.append((f"all but {name}", name, cases["form"] != form))
    rows = []
    for fitted, judged, mask in splits:
        # Least squares of the relative error.
        weight = 1 / measured[mask] ** 2
        constant = ((measured - bare)[mask] * weight).sum() / weight.sum()
        rows.append({
            "fitted to": fitted, "steps fitted": int(mask.sum()), "constant, MB": constant,
            "judged by": judged, "steps judged": int((~mask).sum()),
            "largest error of their peaks":
                ((bare + constant) / measured - 1)[~mask].abs().max(),
            "the same with no constant": (bare / measured - 1)[~mask].abs().max()})
    return pd.DataFrame(rows)


def gpu_frame(measure: bool, report: Callable[[str], None]) -> tuple[str, pd.DataFrame]:
    """Name of the GPU, and its cases beside the closed form: this machine's, or the record's."""
    if measure:
        found = beside_closed_form(measure_on_cuda(report))
        return torch.cuda.get_device_name(), found
    return machine_name(load_record((DATA / RECORDED).parent)), recorded_frame()
