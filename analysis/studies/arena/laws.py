"""Laws of bits in parameters and text: fitted to trainings, tested on points that were left out."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pandas as pd

from analysis.runs.frames import not_measured
from analysis.studies.arena import Parameters
from analysis.studies.arena.trainings.plan import Done, scaling_cells
from analysis.theory.scaling import NAMES, Law, crossing, fit_law

HELD_BACK = 2  # points of most operations, which no law is fitted to
FEWEST = 6  # points of a law, besides these


def law_tables(
    p: Parameters, done: Done, report: Callable[[str], None] = lambda line: None
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """(law, points, crossings); empty where there are too few points."""
    points = pd.DataFrame([
        {"system": c.system, "size": c.size, "n_parameters": done.rows[c.name]["n_parameters"],
         "trained_bytes": done.rows[c.name]["trained_bytes"],
         "valid_bits": float(done.rows[c.name]["valid_bits"])}
        for c in scaling_cells(p, done) if done.bits(c) not in (None, float("inf"))])
    laws: dict[str, Law] = {}
    numbers, shown = [], []
    for system, mine in points.groupby("system", sort=False) if len(points) else ():
        if len(mine) < FEWEST + HELD_BACK:
            continue
        report(f"law of {system}: {len(mine)} points")
        operations = (mine["n_parameters"] * mine["trained_bytes"]).to_numpy()
        held = np.isin(np.arange(len(mine)), np.argsort(operations, kind="stable")[-HELD_BACK:])
        n, d, bits = (mine[c].to_numpy(float)
                      for c in ("n_parameters", "trained_bytes", "valid_bits"))
        law = laws[str(system)] = fit_law(n[~held], d[~held], bits[~held])
        for i, name in enumerate(NAMES):
            low, high = law.interval(name)
            numbers.append({"system": system, "number": name, "value": law.theta[i], "low": low,
                            "high": high, "points": int((~held).sum())})
        for row, out in zip(mine.to_dict("records"), held, strict=True):
            ends = law.predict(row["n_parameters"], row["trained_bytes"])
            predicted = law.bits(np.array([row["n_parameters"]]), np.array([row["trained_bytes"]]))
            shown.append({**row, "by_the_law": float(predicted[0]), "low": ends[0],
                          "high": ends[1], "held_back": bool(out),
                          "inside": bool(ends[0] <= row["valid_bits"] <= ends[1])})
    crossings = []
    sizes = points["n_parameters"] if len(points) else pd.Series([0.0])
    for (a, first), (b, second) in itertools.combinations(laws.items(), 2):
        for budget in p.budgets:
            found = crossing(first, second, float(sizes.min()), float(sizes.max()), budget)
            crossings.append({
                "first": a, "second": b, "text_bytes": budget, "at_parameters": found.at,
                "better_at_the_largest": (a, b)[found.below], "share_of_draws": found.share})
    return (pd.DataFrame(numbers), pd.DataFrame(shown),
            not_measured(pd.DataFrame(crossings)) if crossings else pd.DataFrame())
