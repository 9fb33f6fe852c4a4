"""The error map in tables: first chunk at which each thing happens, verdicts, errors, counts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis.theory.bounds import SILENT, boundary
from analysis.theory.forms import INPUTS

THRESHOLDS = (1e-6, 1e-3, SILENT)
NEVER = "never"
CROSSED = "first step above the bound"
TRICKS = ("corrected_cumsum", "document_chunked", "centred")  # loud past the bound, unrepaired
# Forms that have no chunks: one cell a decay, which the map shows at every height.
WHOLE = ("recurrent", "document_cumsum")
NOISE_CHUNK = 8  # the chunk size at which the error of the gradient of A is drawn
KEYS = ("kind", "precision", "form", "of", "chunk")  # of a row of the map
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
    shares = chosen[["form", "chunk", "decay", "value", "gradient"]].assign(
        **{"of the bound": chosen["chunk"] / np.array(bounds)})
    return shares[shares["of the bound"] <= 1]


def gradient_noise(errors: pd.DataFrame) -> pd.DataFrame:
    """The error of the gradient of A in float32 at NOISE_CHUNK, a row a kind, form and decay."""
    chosen = (errors["precision"] == "float32") & (errors["chunk"] == NOISE_CHUNK)
    return errors[chosen][["kind", "form", "decay", "error of d A"]]


def errors_by_decay(errors: pd.DataFrame) -> pd.DataFrame:
    """The map itself: a column a decay, errors of value and worst gradient to two digits."""
    return _by_decay(errors, "{} error").map(
        lambda cell: _two_digits(cell) if isinstance(cell, float) else cell)


def outcomes_by_decay(errors: pd.DataFrame) -> pd.DataFrame:
    """The map in words: a column a decay, what error_map.outcome says of value and gradient."""
    return _by_decay(errors, "{}")


def _by_decay(errors: pd.DataFrame, column: str) -> pd.DataFrame:
    """A row a KEYS, a column a decay; ``column`` with the part, value or gradient, in place of {}.
    """
    parts = []
    for part in PARTS:
        table = errors.pivot(index=[k for k in KEYS if k != "of"], columns="decay",
                             values=column.format(part))
        table.columns = [column_of(decay) for decay in table.columns]
        parts.append(table.reset_index().assign(of=part))
    table = pd.concat(parts)
    order = {name: i for i, name in enumerate(dict.fromkeys(
        [*errors["kind"], *errors["precision"], *errors["form"]]))}
    table = table.sort_values(list(KEYS), kind="stable", key=lambda column: (
        column.map(PARTS.index) if column.name == "of" else
        column if column.name == "chunk" else column.map(order)))
    return table[[*KEYS, *table.columns.drop(list(KEYS))]].reset_index(drop=True)


def _two_digits(error: float) -> float:
    """Rounded to two digits; below 1e-3 to one, where only the size matters."""
    return float(f"{error:.{2 if error >= 1e-3 else 1}g}")


def outcome_counts(outcomes: pd.DataFrame) -> pd.DataFrame:
    """What maps show, counted: a row a precision, kind, form and part, cells by outcome."""
    rows = []
    for (precision, kind, form, part), group in outcomes.groupby(
            ["precision", "kind", "form", "of"], sort=False):
        cells = group.drop(columns=list(KEYS)).to_numpy(object).ravel()
        rows.append({"precision": precision, "kind": kind, "form": form, "of": part,
                     "cells": len(cells), **{name: int((cells == name).sum())
                                             for name in OUTCOMES}})
    return pd.DataFrame(rows)
