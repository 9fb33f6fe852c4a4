"""The overflow study's answer in named values, for the report's prose and the claims ledger."""

from __future__ import annotations

import pandas as pd

from analysis.measure.exponents import COUNTED_BYTES, COUNTED_WINDOWS, LEAST_SHARE
from analysis.runs.folders import Value
from analysis.studies.overflow import PRECISIONS, Parameters, Results
from analysis.studies.overflow.error_tables import CROSSED, NEVER, SOUND, TRICKS, slug
from analysis.theory.bounds import log_max


def values(found: Results, p: Parameters) -> dict[str, Value]:
    """The study's answer in named numbers."""
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

    def cells(form: str, column: str, about: str) -> Value:
        """How often a form fails so in float32; None where the run left it out."""
        if form not in verdict.index:
            return Value(None, "cells", "not in this run")
        return Value(int(verdict.loc[form, column]), "cells", about)

    return {
        "float32_bound": Value(
            document["overflow_at"], "nats", "cumulated log-decay that overflows"),
        "float16_bound": Value(log_max("float16"), "nats", "the same in float16"),
        "fastest_decay": Value(document["fastest_decay"], "nats a step", "dt_max * N at the start"),
        "fastest_counted": Value(document["fastest_counted"], "nats a step", "the same, on text"),
        "chunk_exponent": Value(document["chunk_exponent"], "nats", "32 steps of it"),
        "chunk_exponent_counted": Value(document["chunk_exponent_counted"], "nats",
                                        "largest exponent of 32 steps on text, untrained"),
        "counted_windows": Value(COUNTED_WINDOWS, "windows", "the text on which that is counted"),
        "counted_bytes": Value(COUNTED_BYTES, "bytes", "length of each"),
        "first_length": Value(int(document["length_at_1_6"]), "steps",
                              "first length that overflows at 1.6 a step"),
        "first_length_at_0_8": Value(int(document["length_at_0_8"]), "steps",
                                     "first length that overflows at 0.8 a step"),
        "largest_factor_log10": Value(document["largest_factor_log10"], "",
                                      "log10 of the factor claimed to be at most 1"),
        "late_mask_traps": cells("late_mask", "right value, gradient lost",
                                 "right value, gradient inf or nan, mask after the exponential"),
        "clamped_silent": cells("clamped", "silent",
                                "finite and off by more than 1 %, clamped exponent"),
        "clamped_loud": cells("clamped", "loud", "inf or nan, clamped"),
        "map_cells": Value(int(verdict["cells"].max()) if len(verdict) else None, "cells",
                           "cells of a form's map in float32"),
        **_right_inside(found.inside, verdict),
        "pairwise_silent": cells("pairwise", "right value, gradient silent",
                                 "right value, gradient off by more than 1 %, pairwise"),
        **_by_precision(found.verdicts),
        "longest": Value(longest, "steps", "length of the next two"),
        "pairs_lost": Value(100 * float(share["counted, share of pairs"]), "%",
                            "(channel, state) pairs past the bound at that length"),
        "pairs_closed_form": Value(100 * float(share["closed form, share of pairs"]), "%",
                                   "the same in closed form"),
        "channels_lost": Value(100 * float(share["counted, share of channels"]), "%",
                               "channels with such a pair"),
        "start_exponent": Value(float(found.endings["exponent at the start"].max()), "nats",
                                "largest exponent of 32 steps before training"),
        "highest_exponent": Value(float(stable["largest exponent in 32 steps"].max()), "nats",
                                  "largest exponent at any recorded step, stable form"),
        "trained_exponent": Value(float(last["largest exponent in 32 steps"].max()), "nats",
                                  "largest exponent after the training, stable form"),
        "trained_steps": Value(int(stable["step"].max()), "steps", "steps trained, stable form"),
        # Carried on over more than was trained, a line is worth nothing.
        "extrapolated_exponent": Value(
            float(end["at the end, by a line"].astype(float).max())
            if end["share of the schedule's learning"].max() >= LEAST_SHARE else None,
            "nats", "at the end of the document's schedule, by a line"),
        **_ending(ended, "auto", "stable"),
        **_ending(ended, "corrected_cumsum", "corrected"),
        **_ending(ended, "document_chunked", "document"),
        "weights_lost": Value(float(lost["weights lost after the step, share"].max()) * 100
                              if len(lost) else 0.0, "%",
                              "weights that are nan after one step across the bound"),
    }


def _right_inside(inside: pd.DataFrame, verdict: pd.DataFrame) -> dict[str, Value]:
    """How right the forms are in float32: which never fail, and the trick within its bound.

    ``verdict`` has a row a form, by name.
    """
    sound = verdict.index[(verdict["loud"] == 0) & (verdict["silent"] == 0)]
    kept = inside["value"].isin(SOUND)
    silent = inside[kept & (inside["gradient"] == "silent")]
    return {
        "sound_forms": Value(", ".join(map(str, sound)) or "none", "",
                             "forms without a failure in float32"),
        "inside_cells": Value(len(inside), "cells", "within the bound of " + ", ".join(TRICKS)
                              + ", float32, constant decay"),
        "inside_wrong": Value(int((~kept).sum()), "cells", "of these: value wrong"),
        # An exponential just inside, times an input above 1, is past the end of float32.
        "inside_wrong_from": Value(
            None if kept.all() else float(inside.loc[~kept, "of the bound"].min()), "",
            "smallest of their chunks as a share of the bound"),
        "inside_silent": Value(len(silent), "cells",
                               "of these: value right, gradient off by more than 1 %"),
        "inside_silent_from": Value(float(silent["decay"].min()) if len(silent) else None,
                                    "nats a step", "smallest decay of these"),
    }


def _by_precision(verdict: pd.DataFrame) -> dict[str, Value]:
    """How each lower precision does: the recurrence step by step, and the trick."""
    rows = verdict.set_index(["precision", "form"])
    found: dict[str, Value] = {}
    for precision in PRECISIONS[1:]:
        for form, columns in (("recurrent", ("cells", "silent", "worst finite value error",
                                              "worst finite gradient error")),
                              ("corrected_cumsum", ("cells", "loud"))):
            row = rows.loc[(precision, form)] if (precision, form) in rows.index else None
            for column in columns:
                name = f"{slug(precision)}_{form}_{column.replace(' ', '_')}"
                count = "error" not in column
                found[name] = Value(
                    None if row is None else int(row[column]) if count else float(row[column]),
                    "cells" if count else "",
                    "not in this run" if row is None else f"{column}, {form}, {precision}")
    return found


def _ending(ended: pd.DataFrame, form: str, name: str) -> dict[str, Value]:
    row = ended.loc[form] if form in ended.index else None
    return {
        f"{name}_exponent": Value(None if row is None else float(row["largest exponent"]), "nats",
                                  f"largest exponent of 32 steps while training with {form}"),
        f"{name}_crossed": Value(
            None if row is None or row[CROSSED] == NEVER else int(row[CROSSED]), "step",
            f"first recorded step above the bound, {form}; nothing where " "it never was"),
        f"{name}_ending": Value(None if row is None else str(row["ending"]), "",
                                f"how training with {form} ended"),
    }
