"""The error map in tables: first chunk at which each thing happens, verdicts, errors, counts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis.measure.scans import INPUTS
from analysis.theory.bounds import SILENT, boundary

THRESHOLDS = (1e-6, 1e-3, SILENT)
NEVER = "never"
OUTCOMES = ("right", "rough", "silent", "inf", "nan")  # see error_map.outcome
SOUND, LOUD = OUTCOMES[:2], OUTCOMES[3:]
PARTS = ("value", "gradient")
# What the first chunks are told of: column of the map -> its name in the table.
OUTPUTS = {"value error": "value", **{f"error of d {name}": f"gradient of {name}"
                                      for name in INPUTS}}


def column_of(decay: float) -> str:
    """The name of a decay's column."""
    return f"{decay:g}"


def first_chunks(errors: pd.DataFrame) -> pd.DataFrame:
    """The first chunk size at which each thing happens to the value and to each gradient.

    One row a kind, precision, form, output and event (an error above a threshold, an inf, a
    nan), one column a decay. Cells are words, since it may never happen up to the largest chunk.
    An event that happens at no decay has no row. The analytic bound, for constant decay, is a row
    of its own, in steps.
    """
    rows = []
    for (kind, precision, form), group in errors.groupby(
            ["kind", "precision", "form"], sort=False):
        key = {"kind": kind, "precision": precision, "form": form}
        decays = list(dict.fromkeys(group["decay"]))
        if kind == "constant":
            bounds = [boundary(str(form), decay, str(precision)) for decay in decays]
            rows.append({**key, "of": "all", "first chunk with": "bound, steps", **{
                column_of(d): f"{b:.1f}" if math.isfinite(b) else "none"
                for d, b in zip(decays, bounds, strict=True)}})
        for column, name in OUTPUTS.items():
            table = group.pivot(index="chunk", columns="decay", values=column)[decays]
            for event, hit in _events(table.to_numpy(float)).items():
                if hit.any():
                    rows.append({**key, "of": name, "first chunk with": event, **{
                        column_of(decay): str(table.index[hit[:, i]][0]) if hit[:, i].any()
                        else NEVER for i, decay in enumerate(decays)}})
    return pd.DataFrame(rows)


def _events(error: np.ndarray) -> dict[str, np.ndarray]:
    """What may happen to an error, and where it does; a nan passes every threshold."""
    passed = {f"error > {t:g}": ~(error <= t) for t in THRESHOLDS}
    return passed | {"inf": np.isinf(error), "nan": np.isnan(error)}


def verdicts(errors: pd.DataFrame) -> pd.DataFrame:
    """One row a precision and form: in how many cells it fails and how, and what is worst."""
    rows = []
    for (precision, form), group in errors.groupby(["precision", "form"], sort=False):
        loud = group["value"].isin(LOUD) | group["gradient"].isin(LOUD)
        silent = ~loud & ((group["value"] == "silent") | (group["gradient"] == "silent"))
        right = group["value"].isin(SOUND)
        finite = group[~loud]
        rows.append({
            "precision": precision, "form": form, "cells": len(group),
            "loud": int(loud.sum()), "silent": int(silent.sum()),
            "right value, gradient silent": int((silent & right).sum()),
            "right value, gradient lost": int((right & group["gradient"].isin(LOUD)).sum()),
            "worst finite value error": finite["value error"].max(),
            "worst finite gradient error": finite["gradient error"].max(),
            "value error against the definition": group.loc[
                ~loud, "value error against the definition"].max()})
    return pd.DataFrame(rows)


def maps(errors: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The parts of the map that are drawn, by the name of the figure.

    Float32 with both kinds of decay; the lower precisions, whose maps differ less by kind, with
    constant decay.
    """
    found = {}
    for (precision, kind), cells in errors.groupby(["precision", "kind"], sort=False):
        if precision == "float32" or kind == "constant":
            parts = ["map", *([str(precision)] if precision != "float32" else []),
                     *([str(kind)] if kind != "constant" else [])]
            found[slug("_".join(parts))] = cells
    return found


def slug(words: str) -> str:
    """Words in the name of a value or figure: "bf16 inputs" -> "bf16_inputs"."""
    return words.replace(" ", "_").replace("-", "_")


def inside_bound(errors: pd.DataFrame, forms: Sequence[str]) -> pd.DataFrame:
    """The float32 cells of constant decay whose chunk is within their form's analytic bound.

    "of the bound" is the chunk's share of it.
    """
    chosen = errors[(errors["kind"] == "constant") & (errors["precision"] == "float32")
                    & errors["form"].isin(forms)]
    bounds = [boundary(form, decay) for form, decay in
              zip(chosen["form"], chosen["decay"], strict=True)]
    shares = chosen.assign(**{"of the bound": chosen["chunk"] / np.array(bounds)})
    return shares[shares["of the bound"] <= 1]


def errors_by_decay(errors: pd.DataFrame) -> pd.DataFrame:
    """The map itself: a column a decay, errors of value and worst gradient to two digits."""
    parts = []
    for part in PARTS:
        table = errors.pivot(index=["kind", "precision", "form", "chunk"], columns="decay",
                             values=f"{part} error")
        table.columns = [column_of(decay) for decay in table.columns]
        parts.append(table.map(_two_digits).reset_index().assign(of=part))
    table = pd.concat(parts)
    order = {name: i for i, name in enumerate(dict.fromkeys(
        [*errors["kind"], *errors["precision"], *errors["form"]]))}
    keys = ["kind", "precision", "form"]
    table = table.sort_values([*keys, "of", "chunk"], kind="stable", key=lambda column: (
        column.map(order) if column.name in keys else
        column.map(PARTS.index) if column.name == "of" else column))
    first = [*keys, "of", "chunk"]
    return table[[*first, *table.columns.drop(first)]].reset_index(drop=True)


def _two_digits(error: float) -> float:
    """Rounded to two digits; below 1e-3 to one, where only the size matters."""
    return float(f"{error:.{2 if error >= 1e-3 else 1}g}")


def outcome_counts(errors: pd.DataFrame) -> pd.DataFrame:
    """What maps show, counted: a row a precision, kind, form and part, cells by outcome."""
    rows = []
    for (precision, kind, form), group in errors.groupby(
            ["precision", "kind", "form"], sort=False):
        rows += [{"precision": precision, "kind": kind, "form": form, "of": part,
                  "cells": len(group),
                  **{name: int((group[part] == name).sum()) for name in OUTCOMES}}
                 for part in PARTS]
    return pd.DataFrame(rows)
