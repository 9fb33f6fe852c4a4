"""Study: where each form of the scan goes wrong, how it shows, and whether training gets there.

Three parts: the bound of each form by arithmetic (analysis.theory.bounds), the map of errors over
chunk size, decay and precision (analysis.studies.overflow.error_map, and error_tables for its
tables), and the exponents of models untrained, training and pushed across the bound
(analysis.measure.exponents).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch

from analysis.measure.exponents import (
    COUNTED_BYTES,
    COUNTED_WINDOWS,
    LEAST_SHARE,
    cross_the_bound,
    extrapolate,
    follow_training,
    initial_exponents,
    pairs_past_bound,
)
from analysis.measure.parallel import run_jobs
from analysis.measure.scans import ANY_CHUNK, runnable
from analysis.measure.threads import threads
from analysis.studies.overflow.error_map import PRECISIONS, Grid, error_map
from analysis.studies.overflow.error_tables import (
    NEVER,
    SOUND,
    errors_by_decay,
    first_chunks,
    inside_bound,
    slug,
    verdicts,
)
from analysis.theory.bounds import first_overflow, log_max
from mambabyte.config import PRESETS
from mambabyte.errors import UserError

CROSSED = "first step above the bound"
TRICKS = ("corrected_cumsum", "document_chunked", "centred")  # loud past the bound, unrepaired
STEPS = {"auto": 4000, "corrected_cumsum": 1200}  # on a GPU; the cumulated sums are slow
# What trains where: the document's own configuration on a GPU, a small model elsewhere.
SIZES: dict[str, dict[str, int]] = {
    "cuda": {"d_model": 192, "n_layer": 4, "batch": 16, "context": 1024, "workers": 3},
    "cpu": {"d_model": 64, "n_layer": 2, "batch": 4, "context": 64, "workers": 1},
}


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


@dataclass(frozen=True)
class Overflow:
    """What the study found."""

    errors: pd.DataFrame  # the map: every cell
    by_decay: pd.DataFrame  # the same as a table, a column a decay
    first: pd.DataFrame  # first chunk size at which each thing happens to value and gradients
    verdicts: pd.DataFrame  # one row a form
    pairs: pd.DataFrame  # share of pairs past the bound, by length
    followed: pd.DataFrame  # exponents while training, by form
    endings: pd.DataFrame  # how each training ended
    extrapolated: pd.DataFrame  # exponents at the end of the document's schedule
    crossing: pd.DataFrame  # what a step across the bound does
    document: pd.DataFrame  # the document's statements in numbers


def run(p: Parameters, report: Callable[[str], None]) -> Overflow:
    """The error map, the untrained model, the training, the crossing. Seeded throughout."""
    p = settle(replace(p, forms=runnable(p.forms)))
    with threads(1):
        errors = error_map(p, report)
        report("the untrained model")
        pairs = pairs_past_bound(p.corpus, p.seed, p.fraction_lengths)
        followed, endings = follow_forms(p, report)
        report("crossing the bound on purpose")
        crossing = cross_the_bound(p.corpus, p.seed, p.crossings)
        document = _document_frame(initial_exponents(p.corpus, p.seed))
    return Overflow(
        errors, errors_by_decay(errors), first_chunks(errors), verdicts(errors), pairs, followed,
        endings, extrapolate(followed, PRESETS["mamba_byte"].train), crossing, document)


def follow_forms(
    p: Parameters, report: Callable[[str], None]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The same model trained with each form in turn: exponents, and one row a form how it ended."""
    if p.device == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device is available: give device=cpu")
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


def headline(found: Overflow) -> dict[str, tuple[float | str | None, str, str]]:
    """The study's answer in named values: name -> (value, unit, about)."""
    document = found.document.set_index("key")["ours"]
    verdict = found.verdicts[found.verdicts["precision"] == "float32"].set_index("form")
    pairs = found.pairs.set_index("length, steps")
    ended = found.endings.set_index("form")
    first = found.endings["form"].iloc[0]  # the stable form, unless a run has none
    stable = found.followed[found.followed["form"] == first]
    last = stable[stable["step"] == stable["step"].max()]
    end = found.extrapolated[found.extrapolated["form"] == first]
    lost = found.crossing[found.crossing["form"] == "document_chunked"]
    lost = lost[lost["weights lost after the step, share"] > 0]
    longest = int(pairs.index.max())
    share = pairs.loc[longest]

    def cells(form: str, column: str, about: str) -> tuple[int | None, str, str]:
        """How often a form fails so in float32; None where the run left it out."""
        if form not in verdict.index:
            return None, "cells", "not in this run"
        return int(verdict.loc[form, column]), "cells", about

    return {
        "float32_bound": (document["overflow_at"], "nats", "cumulated log-decay that overflows"),
        "float16_bound": (log_max("float16"), "nats", "the same in float16"),
        "fastest_decay": (document["fastest_decay"], "nats a step", "dt_max * N at the start"),
        "fastest_counted": (document["fastest_counted"], "nats a step", "the same, on text"),
        "chunk_exponent": (document["chunk_exponent"], "nats", "32 steps of it"),
        "chunk_exponent_counted": (document["chunk_exponent_counted"], "nats",
                                   "largest exponent of 32 steps on text, untrained"),
        "counted_windows": (COUNTED_WINDOWS, "windows", "the text on which that is counted"),
        "counted_bytes": (COUNTED_BYTES, "bytes", "length of each"),
        "first_length": (int(document["length_at_1_6"]), "steps",
                         "first length that overflows at 1.6 a step"),
        "first_length_at_0_8": (int(document["length_at_0_8"]), "steps",
                                "first length that overflows at 0.8 a step"),
        "largest_factor_log10": (document["largest_factor_log10"], "",
                                 "log10 of the factor claimed to be at most 1"),
        "late_mask_traps": cells("late_mask", "right value, gradient lost",
                                 "right value, gradient inf or nan, mask after the exponential"),
        "clamped_silent": cells("clamped", "silent",
                                "finite and off by more than 1 %, clamped exponent"),
        "clamped_loud": cells("clamped", "loud", "inf or nan, clamped"),
        "map_cells": (int(verdict["cells"].max()) if len(verdict) else None, "cells",
                      "cells of a form's map in float32"),
        **_right_inside(found.errors),
        "pairwise_silent": cells("pairwise", "right value, gradient silent",
                                 "right value, gradient off by more than 1 %, pairwise"),
        **_by_precision(found.verdicts),
        "longest": (longest, "steps", "length of the next two"),
        "pairs_lost": (100 * float(share["counted, share of pairs"]), "%",
                       "(channel, state) pairs past the bound at that length"),
        "pairs_closed_form": (100 * float(share["closed form, share of pairs"]), "%",
                              "the same in closed form"),
        "channels_lost": (100 * float(share["counted, share of channels"]), "%",
                          "channels with such a pair"),
        "start_exponent": (float(found.endings["exponent at the start"].max()), "nats",
                           "largest exponent of 32 steps before training"),
        "highest_exponent": (float(stable["largest exponent in 32 steps"].max()), "nats",
                             "largest exponent at any recorded step, stable form"),
        "trained_exponent": (float(last["largest exponent in 32 steps"].max()), "nats",
                             "largest exponent after the training, stable form"),
        "trained_steps": (int(stable["step"].max()), "steps", "steps trained, stable form"),
        # Carried on over more than was trained, a line is worth nothing.
        "extrapolated_exponent": (
            float(end["at the end, by a line"].astype(float).max())
            if end["share of the schedule's learning"].max() >= LEAST_SHARE else None,
            "nats", "at the end of the document's schedule, by a line"),
        **_ending(ended, "auto", "stable"),
        **_ending(ended, "corrected_cumsum", "corrected"),
        **_ending(ended, "document_chunked", "document"),
        "weights_lost": (float(lost["weights lost after the step, share"].max()) * 100
                         if len(lost) else 0.0, "%",
                         "weights that are nan after one step across the bound"),
    }


def _right_inside(errors: pd.DataFrame) -> dict[str, tuple[float | str | None, str, str]]:
    """How right the forms are in float32: which never fail, and the trick within its bound."""
    inside = inside_bound(errors, TRICKS)
    single = errors[errors["precision"] == "float32"]
    sound = [form for form, group in single.groupby("form", sort=False)
             if group[["value", "gradient"]].isin(SOUND).all(axis=None)]
    kept = inside["value"].isin(SOUND)
    silent = inside[kept & (inside["gradient"] == "silent")]
    return {
        "sound_forms": (", ".join(map(str, sound)) or "none", "",
                        "forms without a failure in float32"),
        "inside_cells": (len(inside), "cells", "within the bound of " + ", ".join(TRICKS)
                         + ", float32, constant decay"),
        "inside_wrong": (int((~kept).sum()), "cells", "of these: value wrong"),
        # An exponential just inside, times an input above 1, is past the end of float32.
        "inside_wrong_from": (
            None if kept.all() else float(inside.loc[~kept, "of the bound"].min()), "",
            "smallest of their chunks as a share of the bound"),
        "inside_silent": (len(silent), "cells",
                          "of these: value right, gradient off by more than 1 %"),
        "inside_silent_from": (float(silent["decay"].min()) if len(silent) else None,
                               "nats a step", "smallest decay of these"),
    }


def _by_precision(verdict: pd.DataFrame) -> dict[str, tuple[float | str | None, str, str]]:
    """How each lower precision does: the recurrence step by step, and the trick."""
    rows = verdict.set_index(["precision", "form"])
    found: dict[str, tuple[float | str | None, str, str]] = {}
    for precision in PRECISIONS[1:]:
        for form, columns in (("sequential", ("cells", "silent", "worst finite value error",
                                              "worst finite gradient error")),
                              ("corrected_cumsum", ("cells", "loud"))):
            row = rows.loc[(precision, form)] if (precision, form) in rows.index else None
            for column in columns:
                name = f"{slug(precision)}_{form}_{column.replace(' ', '_')}"
                count = "error" not in column
                found[name] = (None if row is None else int(row[column]) if count
                               else float(row[column]), "cells" if count else "",
                               f"{column}, {form}, {precision}" if row is not None
                               else "not in this run")
    return found


def _ending(ended: pd.DataFrame, form: str, name: str) -> dict[
        str, tuple[float | str | None, str, str]]:
    row = ended.loc[form] if form in ended.index else None
    return {
        f"{name}_exponent": (None if row is None else float(row["largest exponent"]), "nats",
                             f"largest exponent of 32 steps while training with {form}"),
        f"{name}_crossed": (None if row is None or row[CROSSED] == NEVER else int(row[CROSSED]),
                            "step", f"first recorded step above the bound, {form}; nothing where "
                            "it never was"),
        f"{name}_ending": (None if row is None else str(row["ending"]), "",
                           f"how training with {form} ended"),
    }
