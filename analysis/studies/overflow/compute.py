"""Study: where each form of the scan goes wrong, how it shows, and whether training gets there.

Four parts: the bound of each form by arithmetic (analysis.theory.bounds), the map of errors over
chunk size, decay and precision (analysis.studies.overflow.error_map, and error_tables for its
tables), every mixer under strong decay (analysis.studies.overflow.mixers), and the exponents of
models untrained, training and pushed across the bound (analysis.measure.exponents).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pandas as pd
import torch

from analysis.measure.exponents import (
    cross_the_bound,
    extrapolate,
    follow_training,
    initial_exponents,
    pairs_past_bound,
)
from analysis.measure.parallel import run_jobs
from analysis.measure.scans import runnable
from analysis.measure.threads import threads
from analysis.studies.overflow import Parameters, Results
from analysis.studies.overflow.error_map import error_map
from analysis.studies.overflow.error_tables import (
    CROSSED,
    NEVER,
    TRICKS,
    errors_by_decay,
    first_chunks,
    gradient_noise,
    inside_bound,
    outcomes_by_decay,
    verdicts,
)
from analysis.studies.overflow.mixers import mixer_frame
from analysis.theory.bounds import first_overflow, log_max
from mambabyte.config import PRESETS

STEPS = {"auto": 4000, "corrected_cumsum": 1200}  # on a GPU; the cumulated sums are slow
# What trains where: the document's own configuration on a GPU, a small model elsewhere.
SIZES: dict[str, dict[str, int]] = {
    "cuda": {"d_model": 192, "n_layer": 4, "batch": 16, "context": 1024, "workers": 3},
    "cpu": {"d_model": 64, "n_layer": 2, "batch": 4, "context": 64, "workers": 1},
}


def settle(p: Parameters) -> Parameters:
    """The parameters with what was left to the device filled in; what was given stays."""
    device = p.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes: dict[str, Any] = {
        name: getattr(p, name) or size for name, size in SIZES[device].items()}
    steps = p.trained_steps or tuple(
        p.schedule_steps if device == "cpu" else min(STEPS.get(form, 600), p.schedule_steps)
        for form in p.trained_forms)
    return replace(p, device=device, trained_steps=steps, **sizes)


def run(p: Parameters, report: Callable[[str], None]) -> Results:
    """The error map, the untrained model, the training, the crossing. Seeded throughout."""
    p = settle(replace(p, forms=runnable(p.forms)))
    with threads(1):
        errors = error_map(p, report)
        report("every mixer under strong decay")
        mixers = mixer_frame(p)
        report("the untrained model")
        pairs = pairs_past_bound(p.corpus, p.seed, p.fraction_lengths)
        followed, endings = follow_forms(p, report)
        report("crossing the bound on purpose")
        crossing = cross_the_bound(p.corpus, p.seed, p.crossings)
        document = _document_frame(initial_exponents(p.corpus, p.seed))
    return Results(
        outcomes_by_decay(errors), errors_by_decay(errors), gradient_noise(errors),
        inside_bound(errors, TRICKS), first_chunks(errors), verdicts(errors), mixers, pairs,
        followed, endings, extrapolate(followed, PRESETS["mamba_byte"].train), crossing, document)


def follow_forms(
    p: Parameters, report: Callable[[str], None]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The same model trained with each form in turn: exponents, and one row a form how it ended."""
    model = replace(PRESETS["mamba_byte"].model, d_model=p.d_model, n_layer=p.n_layer)
    train = replace(PRESETS["mamba_byte"].train, batch_size=p.batch, context=p.context,
                    n_steps=p.schedule_steps, seed=p.seed, allow_study_form=True)
    asked = list(zip(p.trained_forms, p.trained_steps, strict=True))
    report("training with " + ", ".join(
        f"{form} (at most {steps} steps)" for form, steps in asked))
    jobs = [(replace(model, scan_form=form), train, p.corpus, steps, p.every, p.device)
            for form, steps in asked]
    frames, endings = [], []
    for form, (frame, ending) in zip(
            p.trained_forms, run_jobs(follow_training, jobs, p.workers), strict=True):
        frames.append(frame)
        exponent = frame.groupby("step")["largest exponent in 32 steps"].max()
        above = exponent[exponent > log_max()]
        endings.append({
            "form": form, "ending": ending, "exponent at the start": exponent.iloc[0],
            "largest exponent": exponent.max(), "last exponent": exponent.iloc[-1],
            CROSSED: str(above.index[0]) if len(above) else NEVER})
    return pd.concat(frames, ignore_index=True), pd.DataFrame(endings)


def _document_frame(exponents: dict[str, float]) -> pd.DataFrame:
    """The document's statements about overflow, in its numbers and in ours."""
    limit = log_max()
    fastest = 16 * 0.1
    rows = [
        ("overflow_at", "|cs| at which exp(-cs) overflows float32", "about 90", limit),
        ("exp_90_log10", "log10 of exp(90)", "39", 90 / math.log(10)),
        ("fastest_decay", "fastest per-step log-decay at initialisation: dt_max * N", "0.8",
         fastest),
        ("fastest_counted", "the same, counted on text", "0.8", exponents["step"]),
        ("length_at_0_8", "first length that overflows at 0.8 a step", "about 50",
         float(first_overflow(0.8))),
        ("length_at_1_6", "first length that overflows at 1.6 a step", "about 50",
         float(first_overflow(fastest))),
        ("chunk_exponent", "largest cumulated log-decay of 32 steps: 32 * dt_max * N", "26",
         32 * fastest),
        ("chunk_exponent_counted", "the same, counted on text", "26", exponents["chunk"]),
        ("largest_factor_log10", "log10 of the largest exp(log_decay - cs) in a chunk of 32",
         "0 (at most 1)", 31 * fastest / math.log(10)),
    ]
    return pd.DataFrame(rows, columns=["key", "statement", "document", "ours"])
