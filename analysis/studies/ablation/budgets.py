"""Equal budgets: how many steps each system may take, and how good it is by then."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from analysis.runs.frames import not_measured
from analysis.studies.ablation import COMPARISONS
from analysis.studies.ablation.learning import Learned, bits_at

UNITS = {"steps": "steps", "wall-clock": "seconds", "FLOPs": "operations", "joules": "joules"}

Runs = dict[tuple[str, int, int], Learned]  # by pattern, seed and the steps asked for


def step_costs(
    learned: Runs, flops: Mapping[str, float], bytes_per_step: int
) -> pd.DataFrame:
    """Cost of one step of each pattern: medians over its runs; joules None where not measured."""
    rows = []
    for pattern, flops_per_byte in flops.items():
        mine = [done for (name, _, _), done in learned.items() if name == pattern]
        joules = [done.joules / done.steps for done in mine if done.joules is not None]
        rows.append({
            "pattern": pattern, "steps": 1.0,
            "wall-clock": float(pd.Series([done.step_seconds for done in mine]).median()),
            "FLOPs": flops_per_byte * bytes_per_step,
            "joules": float(pd.Series(joules).median()) if joules else None,
        })
    return pd.DataFrame(rows).set_index("pattern")


def budget_steps(
    learned: Runs, flops: Mapping[str, float], bytes_per_step: int
) -> pd.DataFrame:
    """Steps that each pattern may take in each comparison; None where nothing was measured.

    A budget is the cost of the whole run of the system that is cheapest by that measure.
    """
    costs = step_costs(learned, flops, bytes_per_step)
    steps = min(done.steps for done in learned.values())
    rows = []
    for comparison in COMPARISONS:
        cost = costs[comparison]
        known = cost.notna().all()
        budget = float(cost.astype(float).min()) * steps if known else None
        for pattern in costs.index:
            rows.append({
                "comparison": comparison, "pattern": pattern, "budget": budget,
                "unit": UNITS[comparison],
                "steps": max(1, int(budget / cost[pattern] + 1e-9)) if budget else None,
            })
    return not_measured(pd.DataFrame(rows))


def compare(learned: Runs, budgets: pd.DataFrame, steps: int) -> pd.DataFrame:
    """Bits per byte of every pattern and seed at every budget.

    A budget is read off the run that ends there, if there is one, else off the curve of the run
    of ``steps`` steps.
    """
    seeds = list(dict.fromkeys(seed for _, seed, _ in learned))
    rows = []
    for row in budgets.itertuples():
        for seed in seeds:
            bits = None
            if row.steps is not None:
                own = (row.pattern, seed, int(row.steps))
                done = learned.get(own) or learned[row.pattern, seed, steps]
                bits = bits_at(done.curve, row.steps)
            rows.append({
                "comparison": row.comparison, "budget": row.budget, "unit": row.unit,
                "pattern": row.pattern, "seed": seed, "steps": row.steps, "bits_per_byte": bits,
            })
    return not_measured(pd.DataFrame(rows))
