"""What the trainings on text and tasks say: tables of rows that are done, whatever is missing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.measure.cells import Row
from analysis.measure.statistics import paired_difference, paired_table
from analysis.runs.frames import not_measured
from analysis.studies.arena import Parameters
from analysis.studies.arena.trainings.plan import (
    Cell,
    Done,
    at,
    chosen,
    piece_budget,
    score,
    searches,
    task_search,
)

MEASURES = {"bytes": "bytes", "time": "seconds", "operations": "FLOPs", "joules": "joules"}
_COLUMNS = ("system", "size", "optimizer", "rate", "seed", "budget", "status", "n_parameters",
            "chosen_by", "valid_bits", "trained_bytes", "steps", "ms_per_step", "seconds",
            "joules", "alone", "train_flops", "state_bytes", "text", "job", "commit",
            "error")

_COSTS = ("ms_per_step", "low", "high", "seconds_per_byte", "joules_per_byte")


def cells_table(rows: Iterable[Row]) -> pd.DataFrame:
    """Every training on text, those that failed or diverged too. Joules of a device that others
    used at the same time are nobody's."""
    return _frame([
        {c: row.get(c, "" if c == "error" else None) for c in _COLUMNS} | {"joules": _joules(row)}
        for row in rows if row["kind"] == "text"])


def _joules(row: Row) -> float | None:
    return row.get("joules") if row.get("alone") else None


def best_table(p: Parameters, done: Done) -> pd.DataFrame:
    """The best of every system at every size and budget: means over seeds, with t-intervals."""
    found = []
    for size in (p.size, *p.larger):
        for budget in dict.fromkeys((p.tuning_budget, *p.longer_budgets)):
            for system, cells in best_cells(p, done, size, budget).items():
                bits = [float(done.rows[c.name]["valid_bits"]) for c in cells]
                mean = paired_difference(bits, [0.0] * len(bits))
                row = done.rows[cells[0].name]
                found.append({
                    "size": size, "budget": budget, "system": system,
                    "n_parameters": row["n_parameters"], "optimizer": cells[0].optimizer,
                    "rate": cells[0].rate, "bits_per_byte": mean.mean, "low": mean.low,
                    "high": mean.high, "seeds": len(bits), "state_bytes": row["state_bytes"]})
    frame = _frame(found)
    return frame if frame.empty else frame.sort_values(
        ["size", "budget", "bits_per_byte"], kind="stable", ignore_index=True)


def best_cells(p: Parameters, done: Done, size: str, budget: int) -> dict[str, list[Cell]]:
    """By system: its cells at the rate that was best, a seed each, as far as they are done."""
    found = {}
    for system in p.systems:
        best = chosen(p, done, system, size)
        if best is None:
            continue
        cells = [at(best, seed=seed, budget=budget) for seed in range(p.seeds)]
        ended = [c for c in cells if (done.bits(c) or math.inf) < math.inf]
        if ended:
            found[system] = ended
    return found


def tuning_table(p: Parameters, done: Done) -> pd.DataFrame:
    """What the search of each system cost, what it gave, and what one rate for all gives."""
    middle = p.adamw_rates[len(p.adamw_rates) // 2] if p.adamw_rates else None
    found = []
    for size in (p.size, *p.larger):
        for system in p.systems:
            cells = [c for search in searches(p, done, system, size) for c in search]
            rows = [done.rows[c.name] for c in cells if c.name in done.rows]
            best = chosen(p, done, system, size)
            if best is None:
                continue
            single = {} if middle is None else done.rows.get(
                Cell("text", system, size, "adamw", middle, 0, p.tuning_budget).name, {})
            rates = [c.rate for c in cells if c.optimizer == best.optimizer]
            found.append({
                "size": size, "system": system, "trainings": len(rows),
                "diverged": sum(row["status"] == "diverged" for row in rows),
                "seconds": sum(row.get("seconds") or 0.0 for row in rows),
                "joules": _sum(_joules(row) for row in rows if row["status"] == "done"),
                "optimizer": best.optimizer, "rate": best.rate,
                "at_the_end_of_the_range": best.rate in (min(rates), max(rates)),
                "valid_bits": done.rows[best.name]["valid_bits"],
                "single_rate": middle, "single_rate_valid_bits": single.get("valid_bits"),
            })
    return _frame(found)


def sensitivity_table(rows: Iterable[Row], p: Parameters) -> pd.DataFrame:
    """Bits per byte by rate, seed 0, the tuning budget."""
    return _frame([
        {"size": row["size"], "system": row["system"], "optimizer": row["optimizer"],
         "rate": row["rate"], "chosen_by": row["chosen_by"], "valid_bits": row["valid_bits"]}
        for row in rows if row["kind"] == "text" and row["status"] == "done" and row["seed"] == 0
        and row["budget"] == p.tuning_budget and row["size"] in (p.size, *p.larger)])


def differences_table(p: Parameters, done: Done) -> pd.DataFrame:
    """Each system's best minus the reference's, seed by seed."""
    points = [{"size": size, "budget": budget, "system": system, "seed": c.seed,
               "bits": float(done.rows[c.name]["valid_bits"])}
              for size in (p.size, *p.larger)
              for budget in dict.fromkeys((p.tuning_budget, *p.longer_budgets))
              for system, cells in best_cells(p, done, size, budget).items() for c in cells]
    frame = pd.DataFrame(points)
    if frame.empty:
        return frame
    tables = [paired_table(part, "bits", "system", p.reference, by=("size", "budget"))
              for _, part in frame.groupby(["size", "budget"], sort=False)
              if p.reference in set(part["system"])]
    tables = [t for t in tables if len(t)]
    return not_measured(pd.concat(tables, ignore_index=True)) if tables else pd.DataFrame()


def equal_table(p: Parameters, done: Done, costs: pd.DataFrame) -> pd.DataFrame:
    """The best runs read at equal bytes, time, operations and joules.

    Time and joules of a byte are those of one job (``costs``). The budget
    is what the dearest system's training of the tuning budget costs; a cheaper one may read more
    text for it. Its bits are then between those of its trainings of the tuning and of the long
    budget, linear in the logarithm of the bytes, seed by seed: each is the end of a whole schedule,
    where a reading of an unfinished run would not be. None where that would have to go beyond the
    long one.
    """
    low, high = p.tuning_budget, p.long_budget
    first, last = (best_cells(p, done, p.size, b) for b in (low, high))
    found = []
    for measure, unit in MEASURES.items():
        price = {s: _price(measure, done.rows[cells[0].name], costs) for s, cells in first.items()}
        known = {s: c for s, c in price.items() if c is not None}
        if len(known) < len(price) or not known:
            continue
        budget = low * max(known.values())
        for system, cost in known.items():
            affordable = budget / cost
            bits = _between(done, first[system], last.get(system, []), affordable, low, high)
            mean = paired_difference(bits, [0.0] * len(bits)) if bits else None
            found.append({
                "equal": measure, "system": system, "budget": budget, "unit": unit,
                "bytes": affordable, "bits_per_byte": mean and mean.mean,
                "low": mean and mean.low, "high": mean and mean.high, "seeds": len(bits)})
    return _frame(found)


def _between(
    done: Done, first: list[Cell], last: list[Cell], affordable: float, low: int, high: int
) -> list[float]:
    """Bits at ``affordable`` bytes of each seed that was trained on ``low`` bytes and on ``high``;
    of those on ``low`` alone where that is what is affordable; none beyond ``high``."""
    ends = [{c.seed: float(done.rows[c.name]["valid_bits"]) for c in cells}
            for cells in (first, last)]
    if math.isclose(affordable, low):
        return list(ends[0].values())
    if affordable > high * (1 + 1e-9) or high <= low:
        return []
    share = math.log(affordable / low) / math.log(high / low)
    return [(1 - share) * ends[0][seed] + share * ends[1][seed]
            for seed in ends[0] if seed in ends[1]]


def _price(measure: str, row: Row, costs: pd.DataFrame) -> float | None:
    """What a byte of training costs a system by one measure; None where that is not known."""
    if measure == "bytes":
        return 1.0
    if measure == "operations":
        return float(row["train_flops"]) / float(row["trained_bytes"])
    mine = costs[(costs["system"] == row["system"]) & (costs["optimizer"] == row["optimizer"])] \
        if len(costs) else costs
    if mine.empty:
        return None
    value = mine["seconds_per_byte" if measure == "time" else "joules_per_byte"].iloc[0]
    return None if value is None or pd.isna(value) else float(value)


def costs_table(p: Parameters, done: Done) -> pd.DataFrame:
    """Time and joules that a step and a byte of training cost each system, measured in turns, of
    the one job that has most systems: those of two are no ratio."""
    rows = [(row, one) for row in done.rows.values()
            if row["kind"] == "costs" and row["status"] == "done" and row["size"] == p.size
            for one in row["costs"]]
    jobs = [row["job"] for row, _ in rows]
    job = max(jobs, key=jobs.count, default="")
    return _frame([{"system": one["system"], "optimizer": row["optimizer"],
                    **{name: one[name] for name in _COSTS}, "job": job}
                   for row, one in rows if row["job"] == job])


def answers_table(rows: Iterable[Row], p: Parameters) -> pd.DataFrame:
    """Every training on a task of these widths and steps: accuracy by size, whatever its rate."""
    return _frame([
        {"task": one["task"], "width": int(row["size"]), "system": row["system"],
         "rate": row["rate"], "seed": row["seed"], "chosen_by": row["chosen_by"],
         "size": one["size"], "accuracy": one["accuracy"], "trained": one["trained"],
         "steps": one["steps"]}
        for row in rows if row["kind"] in p.tasks and row["status"] == "done"
        and row["budget"] == p.task_steps and int(row["size"]) in p.task_widths
        for one in row["accuracies"]])


def tasks_table(p: Parameters, done: Done) -> pd.DataFrame:
    """Accuracy by task and size at each system's best rate, of those tried so far: mean, worst and
    best seed."""
    found = []
    for task in p.tasks:
        for width in p.task_widths:
            for system in p.task_systems:
                search = task_search(p, done, task, width, system)
                tried = [cell for cell in search if done.bits(cell) is not None]
                best = done.best(tried)
                if best is None:
                    continue
                rows = [row for seed in range(p.seeds)
                        if (row := done.rows.get(at(best, seed=seed).name))
                        and row["status"] == "done"]
                for i, one in enumerate(rows[0]["accuracies"]):
                    points, steps = ([row["accuracies"][i][c] for row in rows]
                                     for c in ("accuracy", "steps"))
                    found.append({
                        "task": one["task"], "size": one["size"], "unit": one["unit"],
                        "system": system, "width": width, "rate": best.rate,
                        "rates_tried": len(tried),
                        "accuracy": float(np.mean(points)), "worst": min(points),
                        "best": max(points), "seeds": len(points), "chance": one["chance"],
                        "trained": one["trained"], "n_parameters": rows[0]["n_parameters"],
                        "state_bytes": one["state_bytes"], "steps": float(np.mean(steps))})
    return _frame(found)


def looked_at(done: Done, cells: Iterable[Cell], name: str) -> pd.DataFrame:
    """The rows called ``name`` of those of ``cells`` that are done, with the system and seed of
    each. A folder may have more, of another budget or a rate that is no longer the best."""
    return _frame([
        {"system": row["system"], "seed": row["seed"],
         **{column: one[column] for column in sorted(one, key=_place)}}
        for row in _rows(done, cells) for one in row.get(name, [])])


def _rows(done: Done, cells: Iterable[Cell]) -> list[Row]:
    """Of the cells that came to an end, in order of name."""
    found = {cell.name: done.rows[cell.name] for cell in cells if cell.name in done.rows}
    return [found[name] for name in sorted(found) if found[name]["status"] == "done"]


# What a row is of, before what was found; the files of cells are in alphabetical order.
_FIRST = ("layer", "mixer", "channels", "kept", "way", "state_bytes_a_number", "half_life_from",
          "numbers", "step", "reset_every", "distance", "output", "input", "half_life_5",
          "half_life_25")


def _place(column: str) -> tuple[int, str]:
    return (_FIRST.index(column) if column in _FIRST else len(_FIRST), column)


def clamp_table(done: Done, cells: Iterable[Cell]) -> pd.DataFrame:
    """How large exponents became in each training of Mamba-1, with and without the bound."""
    return _frame([
        {"system": row["system"], "seed": row["seed"], "rate": row["rate"],
         "steps": row["steps"], "valid_bits": row["valid_bits"],
         "largest_exponent_of_a_step": max(one["largest"] for one in row["followed"]),
         "largest_exponent_of_a_chunk": max(one["largest_in_chunk"] for one in row["followed"]),
         "onset_predicted": row["onset_predicted"], "onset_seen": row["onset_seen"]}
        for row in _rows(done, cells)])


def units_table(p: Parameters, done: Done) -> pd.DataFrame:
    """Bytes and pieces under each noise, both at the rate and optimizer of the fewest held-out
    bits, of one budget: means over seeds, and pieces minus bytes seed by seed, with t-intervals."""
    found = []
    tried = [r for r in done.rows.values() if r["kind"] in ("noise", "pieces")
             and r["size"] == p.size and r["budget"] == piece_budget(p)]
    mine = [r for r in tried if r["status"] == "done"]
    for kind in ("noise", "pieces"):
        for system in dict.fromkeys(r["system"] for r in mine if r["kind"] == kind):
            of, beside = (_at_best([r for r in mine if r["kind"] == k and r["system"] == system])
                          for k in (kind, "noise"))
            rates = sorted({r["rate"] for r in tried if (r["kind"], r["system"]) == (kind, system)})
            for i, one in enumerate(of[0]["units"] if of else []):
                bits, base = ({r["seed"]: r["units"][i]["bits_per_raw_byte"] for r in rows}
                              for rows in (of, beside))
                both = [seed for seed in bits if seed in base] if kind == "pieces" else []
                mean = paired_difference(list(bits.values()), [0.0] * len(bits))
                apart = paired_difference([bits[s] for s in both], [base[s] for s in both]) \
                    if both else None
                found.append({
                    "system": system, "units": one["units"], "noise": one["noise"],
                    "rate": of[0]["rate"],
                    "at_the_end_of_the_range": kind == "pieces" and of[0]["rate"] in (
                        rates[0], rates[-1]),
                    "bits_per_raw_byte": mean.mean, "low": mean.low, "high": mean.high,
                    "minus_bytes": apart and apart.mean, "minus_bytes_low": apart and apart.low,
                    "minus_bytes_high": apart and apart.high,
                    "accuracy": float(np.mean([r["units"][i]["accuracy"] for r in of])),
                    "seeds": len(of), "n_parameters": of[0]["n_parameters"]})
    return _frame(found)


def _at_best(rows: list[Row]) -> list[Row]:
    """Those of the rate and optimizer whose first seed has the fewest held-out bits."""
    first = [r for r in rows if r["seed"] == 0]
    best = _trained_with(min(first, key=score)) if first else None
    return sorted((r for r in rows if _trained_with(r) == best), key=lambda r: r["seed"])


def _trained_with(row: Row) -> tuple[str, float]:
    return row["optimizer"], row["rate"]


def _sum(values: Iterable[float | None]) -> float | None:
    known = list(values)
    return None if not known or any(v is None for v in known) else float(sum(known))  # type: ignore[arg-type]


def _frame(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    return not_measured(pd.DataFrame(rows)) if rows else pd.DataFrame()
