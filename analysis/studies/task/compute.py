"""Study: accuracy against energy under the public task's rules, from all records of it.

Nothing is trained here. Every record that RECORDED matches is read: whole runs (tables with a
column "system") and trials (a column "trial"). Runs of one system with the same changes and as many
steps are seeds of one another, in whatever record; a run that crashed has no energy and is counted,
not drawn.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.runs.frames import not_measured
from analysis.runs.records import DATA, load_record, machine_name
from analysis.studies.task import ENERGY, HELD_OUT, VALID, Parameters, Results
from mambabyte.config.mixers import kind_of
from mambabyte.errors import UserError
from mambabyte.task import SYSTEMS

RECORDED = "records/task/h200-task*/run.json"  # what is read, in the folder of data


def run(
    p: Parameters, report: Callable[[str], None] = lambda line: None, folder: Path = DATA
) -> Results:
    """Read the records under ``folder``. UserError where there is none."""
    points: list[dict[str, Any]] = []
    crashed: list[dict[str, Any]] = []
    idle, machines = set(), set()
    for path in sorted(folder.glob(RECORDED)):
        record, name = load_record(path.parent), path.parent.name
        machines.add(machine_name(record))
        if "idle_watts" in record.parameters:
            idle.add(float(record.parameters["idle_watts"]))
        for table in record.tables.values():
            single = "trial" in table.frame
            if not single and not {"system", "seed", ENERGY} <= set(table.frame.columns):
                continue  # means of the rows below, or about something else
            for row in table.frame.to_dict("records"):
                if row.get(ENERGY) is None:
                    if row.get("failure"):
                        crashed.append({"system": row["system"], "seed": row["seed"],
                                        "record": name, "failure": row["failure"]})
                    continue
                points.append({
                    "system": row["trial" if single else "system"],
                    "changed": row.get("changed") or None, "trial": single,
                    # Those of the recipe, where the record says them: the clock may end a run.
                    "steps": row.get("of") or row.get("steps"),
                    "seed": row.get("seed"), **_kind(row),
                    "energy (J)": row[ENERGY], "time (s)": row.get("time (s)"),
                    VALID: row.get(VALID), HELD_OUT: row.get(HELD_OUT), "record": name})
        report(f"{name}: {len(points)} runs and trials so far, {len(crashed)} crashed")
    if not points:
        raise UserError(f"no record of a run under {folder / RECORDED}")
    frame = pd.DataFrame(points).assign(system=lambda f: _names(f)).drop(
        columns=["changed", "steps"])
    frame = not_measured(frame, "seed", VALID, HELD_OUT)
    systems = systems_frame(frame)
    job = _of_one_job(frame, systems.iloc[:0])
    return Results(frame, systems, job, _leaders(job), pd.DataFrame(
        crashed, columns=["system", "seed", "record", "failure"]), tuple(sorted(idle)),
        tuple(sorted(machines)))


def _names(points: pd.DataFrame) -> pd.Series:
    """The system, and what was changed where one system was run in several ways, be it that its
    definition had another number of steps in an earlier record."""
    names = []
    by_system = dict(iter(points.groupby("system")))
    for row in points.to_dict("records"):
        group, name = by_system[row["system"]], row["system"]
        if isinstance(row["changed"], str):
            if group["changed"].nunique(dropna=False) > 1:
                name = f"{name}, {_short(row['changed'])}"
        elif (row["steps"] or 0) > 0 and group[group["changed"].isna()]["steps"].nunique() > 1:
            name = f"{name}, {row['steps']:.0f} steps"
        names.append(name)
    return pd.Series(names)


def _short(changed: str) -> str:
    """{"train": {"n_steps": 700}} -> n_steps 700"""
    parts = [f"{name} {value}" for group in json.loads(changed).values()
             for name, value in group.items()]
    return ", ".join(parts)


def _kind(row: dict[str, Any]) -> dict[str, Any]:
    """What mixes a row's network, and whether an n-gram model helps it; of a public file neither is
    known here.

    A trial holds its configuration. A run names its system; ``nano_ssm_500`` is ``nano_ssm`` with
    another number of steps.
    """
    if isinstance(row.get("public file (SHA-256)"), str):
        return {"kind": "public file", "with n-gram": None}
    given = json.loads(row.get("configuration") or "{}")
    changed = json.loads(row.get("changed") or "{}")
    name = str(row.get("system"))
    known = max((s for s in SYSTEMS if name == s or name.startswith(f"{s}_")), key=len, default="")
    if given:
        layers, ngram = given["model"]["layer_pattern"], given.get("ngram") is not None
    elif known:
        system = SYSTEMS[known]
        ngram = system.ngram is not None
        if system.model is None:
            return {"kind": "n-gram alone", "with n-gram": True}
        layers = changed.get("model", {}).get("layer_pattern", system.model.layers)
    else:
        return {"kind": "not known", "with n-gram": None}
    return {"kind": kind_of(layers), "with n-gram": ngram}


def _of_one_job(points: pd.DataFrame, none: pd.DataFrame) -> pd.DataFrame:
    """Systems and public files of the record that has most of the latter; else ``none``."""
    peers = points[(points["kind"] == "public file") & points[VALID].notna()]
    if peers.empty:
        return none
    record = peers.groupby("record")["system"].nunique().idxmax()
    return systems_frame(points[points["record"] == record])


def _leaders(job: pd.DataFrame) -> pd.DataFrame:
    """Each public file, and which of ours is as accurate for the fewest joules: its worst seed as
    accurate, its dearest run counted."""
    public = job["kind"] == "public file"
    rows = []
    for file in job[public].sort_values(VALID).to_dict("records"):
        fits = job[~public & (job["lowest accuracy"] >= file[VALID])]
        best = fits.loc[fits["highest energy (J)"].idxmin()] if len(fits) else None
        rows.append({
            "public file": file["system"], VALID: file[VALID], "energy (J)": file["energy (J)"],
            "ours, as accurate": None if best is None else best["system"],
            "its lowest accuracy": None if best is None else best["lowest accuracy"],
            "its highest energy (J)": None if best is None else best["highest energy (J)"],
            "share (%)": None if best is None
            else 100 * best["highest energy (J)"] / file["energy (J)"]})
    columns = ["public file", VALID, "energy (J)", "ours, as accurate", "its lowest accuracy",
               "its highest energy (J)", "share (%)"]
    return not_measured(pd.DataFrame(rows, columns=columns), *columns[3:])


def systems_frame(points: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds of whole runs with a validation accuracy, and the range, cheapest first."""
    rows = []
    whole = points[~points["trial"] & points[VALID].notna()]
    for (name, kind, ngram), group in whole.groupby(
            ["system", "kind", "with n-gram"], sort=False, dropna=False):
        accuracy, joules = group[VALID].astype(float), group["energy (J)"].astype(float)
        rows.append({
            "system": name, "kind": kind,
            "with n-gram": None if pd.isna(ngram) else bool(ngram),
            "seeds": len(group),
            "energy (J)": joules.mean(), "lowest energy (J)": joules.min(),
            "highest energy (J)": joules.max(), VALID: accuracy.mean(),
            "lowest accuracy": accuracy.min(), "highest accuracy": accuracy.max()})
    frame = pd.DataFrame(rows).sort_values("energy (J)", kind="stable").reset_index(drop=True)
    # Nothing that is cheaper is as good.
    best_before = frame[VALID].cummax().shift(fill_value=0)
    return frame.assign(**{"on the front": frame[VALID] > best_before})
