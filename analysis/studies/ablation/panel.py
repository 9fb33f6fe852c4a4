"""What is held equal, by choice: bits per byte of each system, from records and runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from analysis.measure.statistics import paired_difference
from analysis.runs.folders import INTERACTIVE, RUNS, Run, list_runs
from analysis.runs.records import RECORDS, load_records
from analysis.studies.ablation import Parameters, figures
from analysis.studies.ablation.budgets import UNITS
from mambabyte.errors import UserError

EQUAL = {"steps": "steps", "time": "wall-clock", "operations": "FLOPs", "joules": "joules"}


def panel(p: Parameters, runs: Path = RUNS, records: Path = RECORDS) -> Any:
    """Choices of what is held equal and of the record, or run of this machine, that is read."""
    from ipywidgets import Dropdown, interactive

    here = [*list_runs(runs), *list_runs(runs / INTERACTIVE)]
    found = {**{f"{name}: {run.title}": run for name, run in load_records(records).items()},
             **{f"this machine: {run.folder.relative_to(runs)}": run for run in here}}
    found = {name: run for name, run in found.items()
             if run.study == "ablation" and "comparisons" in run.tables}
    if not found:
        raise UserError(f"no record in {records} and no run in {runs} compares systems at equal "
                        "cost: run `mambabyte study ablation` first")
    return interactive(
        lambda equal, measured: _show_systems(found[measured], equal),
        equal=Dropdown(options=tuple(EQUAL)), measured=Dropdown(options=tuple(found)))


def _show_systems(run: Run, equal: str) -> pd.DataFrame | None:
    from IPython.display import display

    rows = run.tables["comparisons"].frame
    rows = rows[(rows["comparison"] == EQUAL[equal]) & rows["bits_per_byte"].notna()]
    if rows.empty:
        print(f"equal {equal}: not measured in this run")
        return None
    systems = pd.DataFrame([
        {"pattern": pattern, "steps": int(mine["steps"].iloc[0]), **vars(paired_difference(
            mine["bits_per_byte"].tolist(), [0.0] * len(mine)))}
        for pattern, mine in rows.groupby("pattern", sort=False)]).rename(
            columns={"mean": "bits per byte", "pairs": "seeds", "points": "every seed"})
    systems["every seed"] = systems["every seed"].str.replace("+", "")
    print(f"each system may spend {rows['budget'].iloc[0]:,.4g} {UNITS[EQUAL[equal]]}; the "
          "interval is of 95 % over seeds")
    display(figures.equal_budget(systems, equal))
    display(systems)
    return systems
