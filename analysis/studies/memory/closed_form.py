"""The closed form in tables: what a layer keeps, budgets of whole steps, states, devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import pandas as pd

from analysis.theory.fit import ALLOWANCE_BYTES, DEVICES_GB, LARGEST, fit
from analysis.theory.kept_tensors import saved_terms
from analysis.theory.step_memory import budget, state_bytes
from mambabyte.config import PRESETS, SPECS, ModelConfig
from mambabyte.config.mixers import uses_scan_form

GB = 1e9
MIXED = "MMMA"  # the pattern of the field's hybrids
# The recipes' own. fp16 autocast has the bytes of bf16, but for the states that the fused scan
# leaves for its backward pass on a GPU: kept in float32 they are twice as large.
PRECISIONS: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")


def terms_frame() -> pd.DataFrame:
    """Every tensor kept by one layer of the document's original step, largest first."""
    preset = PRESETS["mamba_byte_original"]
    config = replace(preset.model, scan_form="document_chunked")
    batch, context = preset.train.batch_size, preset.train.context
    rows = []
    for autocast in PRECISIONS:
        for t in saved_terms(config, batch, context, autocast):
            if t.layer == 0 and t.bytes:
                rows.append({"autocast": autocast, "part": t.part, "tensor": t.tensor,
                             "bytes each element": t.itemsize, "kept, GB": t.bytes / GB})
    frame = pd.DataFrame(rows).sort_values(
        ["autocast", "kept, GB"], ascending=[False, False], kind="stable")
    return frame.reset_index(drop=True)


def budgets_at(
    model: ModelConfig, batch: int, context: int, forms: Sequence[str]
) -> pd.DataFrame:
    """A training step on a GPU by category: a row a scan form, autocast state and checkpointing."""
    rows = []
    for form in forms:
        for autocast in PRECISIONS:
            for checkpointing in (False, True):
                step = budget(replace(model, scan_form=form), batch, context, autocast, "cuda",
                              checkpointing)
                rows.append({
                    "configuration": f"{batch} x {context}", "form": form,
                    "autocast": autocast, "checkpointing": checkpointing,
                    "weights, GB": step.weights / GB, "gradients, GB": step.gradients / GB,
                    "AdamW, GB": step.optimizer / GB,
                    "activations, GB": step.activations / GB,
                    "workspace, GB": step.workspace / GB,
                    "libraries, GB": step.libraries / GB, "peak, GB": step.peak / GB,
                    "worst moment": step.worst_moment})
    return pd.DataFrame(rows)


def smallest_devices(budgets: pd.DataFrame) -> pd.DataFrame:
    """The smallest common device that holds each of these steps, the allowance included."""
    need = budgets["peak, GB"] + ALLOWANCE_BYTES / GB
    return budgets[["form", "autocast", "checkpointing", "peak, GB"]].assign(**{
        "smallest device": [next((f"{gb} GB" for gb in DEVICES_GB if n <= gb), "none of these")
                            for n in need]})


def budgets_frame(forms: Sequence[str]) -> pd.DataFrame:
    """``budgets_at`` for the document's two configurations, after its fix and before."""
    presets = [PRESETS[name] for name in ("mamba_byte", "mamba_byte_original")]
    return pd.concat([
        budgets_at(preset.model, preset.train.batch_size, preset.train.context, forms)
        for preset in presets], ignore_index=True)


def state_frame() -> pd.DataFrame:
    """Streaming state of every mixer at the size of mamba_byte, and of the 3:1 mixture."""
    rows = []
    for exponent in range(4, 21, 2):
        seen = 2**exponent
        for pattern in (*SPECS, MIXED):
            # A window no shorter than the text: the plain KV cache of attention.
            config = replace(PRESETS["mamba_byte"].model, layer_pattern=pattern,
                             attention_window=2**21)
            rows.append({"bytes seen": seen, "pattern": pattern,
                         "state, B": sum(state_bytes(config, seen).values())})
    return pd.DataFrame(rows)


def device_frames(forms: Sequence[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What fits each common device: mamba_byte by form, its 3:1 hybrid, and the other mixers.

    The largest batch at context 1024, and the largest context at batch 16, with and without
    activation checkpointing; and what the document's original step needs. Attention sees the
    whole context.
    """
    train = PRESETS["mamba_byte"].train
    batches, contexts = [], []
    for pattern, form in _systems(forms):
        model = replace(PRESETS["mamba_byte"].model, scan_form=form, layer_pattern=pattern,
                        attention_window=LARGEST)
        for autocast in PRECISIONS:
            for checkpointing in (False, True):
                recipe = replace(train, precision=autocast)
                original = fit(model, replace(recipe, batch_size=64, context=2048), None,
                               checkpointing=checkpointing)
                found = {gb: fit(model, recipe, int(gb * GB), checkpointing=checkpointing)
                         for gb in DEVICES_GB}
                row = {
                    "pattern": pattern, "form": form if uses_scan_form(pattern) else "none",
                    "autocast": autocast, "checkpointing": checkpointing,
                    "64 x 2048 needs, GB": original.required_bytes / GB}
                batches.append(row | {
                    f"batch on {gb} GB": fits.largest_batch for gb, fits in found.items()})
                contexts.append(row | {
                    f"context on {gb} GB": fits.largest_context for gb, fits in found.items()})
    return pd.DataFrame(batches), pd.DataFrame(contexts)


def _systems(forms: Sequence[str]) -> list[tuple[str, str]]:
    """(pattern, form) of the table of devices, without the form that takes step by step."""
    scans = [form for form in forms if form != "recurrent"]
    mixed = [form for form in scans if form in ("document_chunked", "chunked", "fused")]
    return [*((letter, form) for letter in SPECS
              for form in (scans if uses_scan_form(letter) else ("auto",))),
            *((MIXED, form) for form in mixed)]
