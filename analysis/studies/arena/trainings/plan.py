"""Which trainings are wanted, first first, given those that are done.

Rates are chosen on held-out *training* text, one seed: for each pure system over all rates of both
optimizers, and further where the best is at an end of the range; for a hybrid at its mixer's best
rate and the two beside it. More seeds, the longer budget and other sizes follow at what was best.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from analysis.measure.cells import Row
from analysis.studies.arena import HALF, Parameters, family, pattern_of

PIECE_BYTES = 20_000_000  # of training text that pieces are made of and trained on, at most
BETWEEN = ","  # the systems of a cell of costs
MOST_STEPS_BEYOND = 2  # rates tried beyond an end of the range where the best is at that end


@dataclass(frozen=True)
class Cell:
    """One training; see ``kind`` for what size, optimizer and budget mean."""

    # "text": bytes of text; "memory", "precision": and looked at; "pieces": likewise, on pieces;
    # "noise": on bytes, scored as pieces are; "clamp": with or without a bound on the step size;
    # "costs": no training, steps of all the systems that are named, in turns;
    # else a task: width, "adamw", most steps.
    kind: str
    system: str
    size: str
    optimizer: str
    rate: float
    seed: int
    budget: int

    @property
    def name(self) -> str:
        words = (self.kind, self.system, self.size, self.optimizer, f"{self.rate:.3g}",
                 f"seed{self.seed}", self.budget)
        return "-".join(str(w).replace(" ", "_").replace("/", "_") for w in words)


class Done:
    """Rows that are done, asked for what was best."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = {name_of(row): row for row in rows}

    def bits(self, cell: Cell) -> float | None:
        """Of a cell on the text that chooses; inf where it diverged, None where it is not done."""
        row = self.rows.get(cell.name)
        return None if row is None else score(row)

    def best(self, cells: Sequence[Cell]) -> Cell | None:
        """The best of cells that are all done; None where one is not, or none came to an end."""
        found = [self.bits(cell) for cell in cells]
        known = [bits for bits in found if bits is not None]
        if len(known) < len(cells) or not known or min(known) == math.inf:
            return None
        return cells[found.index(min(known))]


def name_of(row: Row) -> str:
    return Cell(*(row[field] for field in Cell.__dataclass_fields__)).name


def score(row: Row) -> float:
    """What chooses: bits per byte of held-out training text, or the share of wrong answers; inf
    where a training diverged or failed."""
    value = row.get("chosen_by")
    return float(value) if row.get("status") == "done" and value is not None else math.inf


def rates_around(rate: float) -> tuple[float, float, float]:
    return (rate, rate / 2, rate * 2)


def searched(done: Done, cells: Sequence[Cell]) -> list[Cell]:
    """The cells of a search over rates, and those beyond an end at which the best one is."""
    found = sorted(cells, key=lambda c: c.rate)
    for _ in range(MOST_STEPS_BEYOND if len(found) > 1 else 0):
        best = done.best(found)
        if best is None or best not in (found[0], found[-1]):
            break
        if best is found[0]:
            found.insert(0, at(best, rate=best.rate / 2))
        else:
            found.append(at(best, rate=best.rate * 2))
    return found


def at(cell: Cell, **changes: Any) -> Cell:
    return Cell(**{**vars(cell), **changes})


def pure(p: Parameters) -> list[str]:
    return [s for s in p.systems if family(s) == s]


def hybrids(p: Parameters) -> list[str]:
    return [s for s in p.systems if family(s) != s]


def compared(p: Parameters, size: str) -> list[str]:
    """The systems of a size, pure ones first; larger sizes have no 1:1 hybrids."""
    return [s for s in (*pure(p), *hybrids(p)) if size == p.size or len(pattern_of(s)[0]) != 2]


def searches(p: Parameters, done: Done, system: str, size: str) -> list[list[Cell]]:
    """Cells of each search over rates that chooses for a system at a size: one an optimizer. Empty
    while it is not known around which rate to look."""
    budget = p.tuning_budget
    if size == p.size and family(system) == system:
        grids = {"adamw": p.adamw_rates, "muon": p.muon_rates}
        return [searched(done, [Cell("text", system, size, optimizer, rate, 0, budget)
                                for rate in rates])
                for optimizer, rates in grids.items() if rates]
    around = chosen(p, done, family(system), p.size if size == p.size else size) \
        if family(system) != system else chosen(p, done, system, p.size)
    if around is None:
        return []
    return [searched(done, [at(around, system=system, size=size, rate=rate, seed=0)
                            for rate in rates_around(around.rate)])]


def chosen(p: Parameters, done: Done, system: str, size: str) -> Cell | None:
    """The best cell of a system at a size and the tuning budget, once all of its search is done."""
    best = [done.best(cells) for cells in searches(p, done, system, size)]
    known = [cell for cell in best if cell is not None]
    if not known or len(known) < len(best):
        return None
    return min(known, key=lambda cell: done.bits(cell) or math.inf)


def tuned_size(p: Parameters, size: str) -> str:
    """The size whose rates another one takes: the largest that is tuned and not larger, else the
    smallest."""
    from analysis.studies.arena import SIZES

    order = list(SIZES)
    tuned = [s for s in (p.size, *p.larger) if order.index(s) <= order.index(size)]
    return max(tuned, key=order.index) if tuned else p.size


def plan(p: Parameters, rows: Sequence[Row]) -> list[Cell]:
    """Every training that is wanted now: all parts in their order with a first seed, then more."""
    done = Done(rows)
    parts = {"text": _text, "long": _long, "costs": costs_cells, "tasks": _tasks,
             "memory": memory_cells, "precision": precision_cells, "clamp": clamp_cells,
             # The longest first: a law waits for all of them.
             "scaling": lambda p, done: scaling_cells(p, done)[::-1], "pieces": _pieces}
    cells = dict.fromkeys(cell for part in p.parts for cell in parts[part](p, done))
    return sorted(cells, key=lambda cell: cell.seed > 0)


def _text(p: Parameters, done: Done) -> list[Cell]:
    cells: list[Cell] = []
    for size in (p.size, *p.larger):
        systems = compared(p, size)
        for system in systems:
            for search in searches(p, done, system, size):
                cells += search
        best = [c for s in systems if (c := chosen(p, done, s, size)) is not None]
        cells += [at(c, seed=seed) for seed in range(1, p.seeds) for c in best]
    return cells


def _long(p: Parameters, done: Done) -> list[Cell]:
    """Every system at its best rate, with more text than it was tuned on."""
    best = [c for system in compared(p, p.size)
            if (c := chosen(p, done, system, p.size)) is not None]
    return [at(c, budget=p.long_budget, seed=seed) for seed in range(p.seeds) for c in best]


def costs_cells(p: Parameters, done: Done) -> list[Cell]:
    """A cell an optimizer, of all systems that it is best for, once they are known; none where
    workers share a device, as time and joules are then nobody's."""
    best = [chosen(p, done, system, p.size) for system in p.systems]
    by: dict[str, list[str]] = {}
    for cell in best:
        if cell is None or p.workers > 1:
            return []
        by.setdefault(cell.optimizer, []).append(cell.system)
    return [Cell("costs", BETWEEN.join(systems), p.size, optimizer, 0.0, 0, 0)
            for optimizer, systems in by.items()]


def _tasks(p: Parameters, done: Done) -> list[Cell]:
    cells: list[Cell] = []
    seeds: list[Cell] = []
    for task in p.tasks:
        for width in reversed(p.task_widths if task.startswith("recall ") else p.task_widths[-1:]):
            best = []
            for system in p.task_systems:
                search = task_search(p, done, task, width, system)
                cells += search
                best.append(done.best(search))
            if width == p.task_widths[-1]:
                seeds += [at(c, seed=s) for s in range(1, p.seeds) for c in best if c is not None]
    return cells + seeds


def task_search(p: Parameters, done: Done, task: str, width: int, system: str) -> list[Cell]:
    """The cells of a search over rates on one task."""
    return searched(done, [Cell(task, system, str(width), "adamw", rate, 0, p.task_steps)
                           for rate in p.task_rates])


def clamp_cells(p: Parameters, done: Done) -> list[Cell]:
    """Mamba-1 at its best rate of AdamW, free and with its step size bounded, five seeds."""
    search = next((s for s in searches(p, done, "M", p.size) if s[0].optimizer == "adamw"), None) \
        if "M" in p.systems else None
    best = done.best(search) if search else None
    if best is None:
        return []
    return [at(best, kind="clamp", system=system, seed=seed)
            for seed in range(max(1, 2 * p.seeds - 1)) for system in ("M", "M bounded")]


def memory_cells(p: Parameters, done: Done) -> list[Cell]:
    """Every system with all of its layers, but 1:1 hybrids, on the long budget."""
    best = [chosen(p, done, s, p.size) for s in p.systems
            if HALF not in s and len(pattern_of(s)[0]) != 2]
    return [at(c, kind="memory", budget=p.long_budget) for c in best if c is not None]


def precision_cells(p: Parameters, done: Done) -> list[Cell]:
    """Every system of a single mixer with a state that decays, on the long budget."""
    best = [chosen(p, done, s, p.size) for s in p.systems if s in ("M", "S", "D", "K", "R")]
    return [at(c, kind="precision", budget=p.long_budget) for c in best if c is not None]


def scaling_systems(p: Parameters, done: Done) -> list[str]:
    """Mamba-1, attention, the best of the newer mixers and its 3:1 hybrid, as far as they are
    among the systems."""
    newer = [c for s in ("S", "D", "K", "R") if s in p.systems
             and (c := chosen(p, done, s, p.size)) is not None]
    best = min(newer, key=lambda c: done.bits(c) or math.inf).system if newer else ""
    return [s for s in ("M", best, f"{best * 3}A", "A") if s in p.systems and s]


def scaling_cells(p: Parameters, done: Done) -> list[Cell]:
    """The points of the laws; each at the rate of the nearest tuned size, one seed."""
    cells = []
    for size in p.scaling:
        for budget in p.budgets:
            for system in scaling_systems(p, done):
                best = chosen(p, done, system, tuned_size(p, size))
                if best is not None:
                    cells.append(at(best, size=size, budget=budget, seed=0))
    return cells


def piece_budget(p: Parameters) -> int:
    """The longest budget that reads no text twice."""
    return max((b for b in p.budgets if b <= PIECE_BYTES), default=p.tuning_budget)


def _pieces(p: Parameters, done: Done) -> list[Cell]:
    """The systems of the laws on pieces, at three rates and then more seeds, and on bytes."""
    budget, cells = piece_budget(p), []
    for system in scaling_systems(p, done):
        best = chosen(p, done, system, p.size)
        if best is None or HALF in system:
            continue
        best = at(best, budget=budget)
        search = searched(done, [at(best, kind="pieces", rate=rate, seed=0)
                                 for rate in rates_around(best.rate)])
        cells += [at(best, kind="noise", seed=seed) for seed in range(p.seeds)] + search
        found = done.best(search)
        cells += [at(found, seed=seed) for seed in range(1, p.seeds)] if found else []
    return cells
