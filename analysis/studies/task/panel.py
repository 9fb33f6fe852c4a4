"""Two systems by choice: joules against accuracy, and the ratio where there is one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.runs.folders import Run, Value
from analysis.runs.jobs import quantity, ratio
from analysis.runs.records import DATA, load_records
from analysis.studies.task import VALID, Parameters, compute, figures
from mambabyte.errors import UserError

OF = " of "  # between a system and its record

def panel(p: Parameters, folder: Path = DATA) -> Any:
    """Choices of two systems, each as one record measured it."""
    from ipywidgets import Dropdown, interactive

    points = compute.run(p, folder=folder).points
    systems = compute.systems_frame(
        points.assign(system=points["system"] + OF + points["record"]))
    records, names = load_records(folder / "records"), tuple(systems["system"])
    record = names[0].rpartition(OF)[2]  # the pair shown at first is of one job
    return interactive(
        lambda first, second: _show_pair(systems, records, first, second),
        first=Dropdown(options=names, value=names[0]),
        second=Dropdown(options=names, value=[n for n in names if n.endswith(OF + record)][-1]))


def _show_pair(
    systems: pd.DataFrame, records: Mapping[str, Run], first: str, second: str
) -> pd.DataFrame:
    from IPython.display import display

    pair = systems[systems["system"].isin((first, second))]
    joules = []
    for name in (first, second):
        row = systems[systems["system"] == name].iloc[0]
        joules.append(quantity(name, Value(row["energy (J)"], "J"),
                               records[name.rpartition(OF)[2]]))
        print(f"{name}: {row['energy (J)']:,.1f} J, accuracy {row[VALID]:.4f} "
              f"({row['lowest accuracy']:.4f} to {row['highest accuracy']:.4f}, "
              f"seeds: {row['seeds']})")
    try:
        print(f"{ratio(*joules):.2f} times the joules")
    except UserError as error:
        print(f"no ratio: {error}")
    display(figures.chosen(pair))
    return pair
