"""Records: runs on machines that the reader does not have, data/records/STUDY/NAME/.

A record is a run folder with a title and a line about it, made on the machine where the run took
place (``--record FOLDER`` of ``mambabyte study``, ``bench`` and ``task``) and kept with the
sources. The report shows it beside the study, marked with its machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import filter as filter_names
from pathlib import Path

from analysis.runs.folders import RECORD, ROOT, Run, check_name, load_run, made, seal, write_run
from mambabyte.config.files import make_dir
from mambabyte.errors import UserError

DATA = ROOT / "data"
RECORDS = DATA / "records"
REQUIRED = ("date", "commit", "command", "versions", "machine")


def write_record_folder(run: Run, folder: Path | str) -> Path:
    """Keeps a finished run with a title as a record; returns its folder."""
    if run.status != "done" or not run.title or not run.about:
        raise UserError(f"{folder}: a record is a finished run with a title and a line about it")
    check_name("record", Path(folder).name)
    write_run(run, folder)
    seal(Path(folder))
    load_record(Path(folder))  # a record that cannot be read back is not one
    return Path(folder)


def check_record_folder(folder: Path) -> None:
    """UserError, before anything runs, where ``folder`` cannot become a record."""
    check_name("record", folder.name)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RECORD).is_file():
        raise UserError(f"{folder} is there and is no record: choose another folder")
    if folder.is_file():
        raise UserError(f"{folder} is a file: a record is a folder")
    made(folder)  # a run.json that is not ours is not written over
    make_dir(folder if folder.is_dir() else folder.parent)


def keep(run: Run, patterns: Sequence[str]) -> Run:
    """A part of a run: the values, tables and figures that fit a pattern such as ``pieces_*``, with
    the tables that the figures need; all for no pattern. UserError for one that nothing fits."""
    names = (*run.tables, *run.figures, *run.values)
    for pattern in patterns:
        if not filter_names(names, pattern):
            raise UserError(f"the run has nothing called {pattern}: it has {', '.join(names)}")
    if not patterns:
        return run
    wanted = {name for pattern in patterns for name in filter_names(names, pattern)}
    figures = {n: table for n, table in run.figures.items() if n in wanted}
    needed = wanted | set(figures.values())
    return replace(
        run, figures=figures, tables={n: t for n, t in run.tables.items() if n in needed},
        values={n: v for n, v in run.values.items() if n in wanted})


def load_records(root: Path | str = RECORDS) -> dict[str, Run]:
    """All records under ``root`` by name, in order of name; no folder, no records."""
    old = sorted(Path(root).glob("*.json"))
    if old:
        raise UserError(f"{old[0]} is a record of an older version: it is a folder with run.json "
                        "and a CSV file a table now (data/README.md), so measure it again")
    found: dict[str, Run] = {}
    for path in sorted(Path(root).glob(f"*/*/{RECORD}"), key=lambda p: p.parent.name):
        run = load_record(path.parent)
        if run.run_id in found:
            raise UserError(f"two records are called {run.run_id}: rename one of them")
        found[run.run_id] = run
    return found


def load_record(folder: Path) -> Run:
    """One record, its name as ``run_id``; UserError that says what is wrong with it."""
    run = load_run(folder)
    absent = [key for key in REQUIRED if not run.provenance.get(key)]
    absent += [key for key in ("title", "about") if not getattr(run, key)]
    if absent:
        raise UserError(f"{folder} does not say its {', '.join(absent)}: a record names "
                        "machine, date, versions, commit and command, and has a title")
    return replace(run, run_id=check_name("record", folder.name))


def machine_name(run: Run) -> str:
    """What a run was measured on: the GPU where there is one, else the processor."""
    machine = run.provenance.get("machine")
    if not isinstance(machine, dict):
        return "unknown machine"
    gpus = [g["name"] for g in machine.get("gpus") or [] if isinstance(g, dict) and "name" in g]
    if gpus:
        return f"{len(gpus)} × {gpus[0]}" if len(gpus) > 1 else str(gpus[0])
    return f"{machine.get('cpu', 'unknown processor')}, {machine.get('cpu_count', '?')} CPUs"
