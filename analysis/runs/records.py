"""Records of runs on machines that the reader does not have: data/measurements/*.json.

A record is a finished run folder in one JSON file, made on the machine where the run took place
(``python -m analysis.sweep.record`` or ``write_record_file``) and kept with the sources. Its schema
is in data/README.md. The report shows it beside the study, marked with its machine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import filter as filter_names
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.runs.folders import ROOT, Figure, Run, Table, Value, check_name, load_run
from mambabyte.config.files import write_json
from mambabyte.errors import UserError

DATA = ROOT / "data"
MEASUREMENTS = DATA / "measurements"
FORMAT = 1
REQUIRED = ("date", "commit", "command", "versions", "machine")
# JSON has no words for these; None (null) is "not measured".
_WORDS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True)
class Record:
    """A measurement kept with the sources; ``run`` holds its values, tables and figures."""

    name: str
    title: str
    about: str
    run: Run

    @property
    def study(self) -> str:
        return self.run.study


def write_record_json(path: Path, data: Mapping[str, Any]) -> None:
    """A record as it stands on disk: spaces before every cell would be most of a large one."""
    write_json(path, data, indent=0)


def write_record_file(
    run_folder: Path | str, name: str, *, title: str, about: str, folder: Path = MEASUREMENTS,
    keep: Sequence[str] = (),
) -> Path:
    """Turns a finished run into a record; returns its path. Figures' SVG travels inside.

    ``keep`` are patterns (``pieces_*``) of the values, tables and figures that are wanted, all
    when empty. UserError for a pattern that nothing fits.
    """
    run = load_run(run_folder)
    if run.status != "done":
        raise UserError(f"{run_folder} is a {run.status} run: only a finished one makes a record")
    names = (*run.tables, *run.figures, *run.values)
    for pattern in keep:
        if not filter_names(names, pattern):
            raise UserError(f"the run has nothing called {pattern}: it has {', '.join(names)}")
    wanted = {name for pattern in keep or ("*",) for name in filter_names(names, pattern)}
    path = folder / f"{name}.json"
    write_record_json(path, {
        "format": FORMAT, "study": run.study, "title": title, "about": about,
        "parameters": run.parameters, "sources": run.sources, "seconds": run.seconds,
        "provenance": run.provenance,
        "values": {n: {**vars(v), "value": _encode(v.value)} for n, v in run.values.items()
                   if n in wanted},
        "tables": [{"name": t.name, "caption": t.caption, **_frame(t.frame)}
                   for t in run.tables.values() if t.name in wanted],
        "figures": [{"name": f.name, "title": f.title, "caption": f.caption, "alt": f.alt,
                     "svg": f.svg, "narrow": f.narrow, **_frame(f.data)}
                    for f in run.figures.values() if f.name in wanted],
    })
    load_record(path)  # a record that cannot be read back is not one
    return path


def write_tables(
    path: Path, tables: Mapping[str, tuple[str, pd.DataFrame]], *, study: str, title: str,
    about: str, parameters: Mapping[str, Any], provenance: Mapping[str, Any],
    seconds: float | None = None,
    values: Mapping[str, tuple[float | str | None, str, str]] | None = None,
) -> Path:
    """A record without a notebook: tables, name -> (caption, frame), and values, name -> (value,
    unit, about)."""
    write_record_json(path, {
        "format": FORMAT, "study": study, "title": title, "about": about,
        "parameters": dict(parameters), "sources": "", "seconds": seconds,
        "provenance": dict(provenance), "figures": [],
        "values": {name: {"value": _encode(value), "unit": unit, "about": what}
                   for name, (value, unit, what) in (values or {}).items()},
        "tables": [{"name": name, "caption": caption, **_frame(frame)}
                   for name, (caption, frame) in tables.items()],
    })
    load_record(path)
    return path


def load_records(folder: Path | str = MEASUREMENTS) -> dict[str, Record]:
    """All records of a folder by name, in order of name; no folder, no records."""
    return {path.stem: load_record(path) for path in sorted(Path(folder).glob("*.json"))}


def load_record(path: Path) -> Record:
    """One record; UserError that names the file and what is wrong with it."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise UserError(f"{path.name} has format {data['format']}, expected {FORMAT}")
        absent = [key for key in REQUIRED if not data["provenance"].get(key)]
        if absent:
            raise UserError(f"{path.name} does not say its {', '.join(absent)}: a record names "
                            "machine, date, versions, commit and command")
        run = Run(
            folder=path, study=check_name("study", data["study"]),
            parameters=data.get("parameters", {}),
            values={n: Value(_decode(v["value"]), v.get("unit", ""), v.get("about", ""))
                    for n, v in data.get("values", {}).items()},
            tables={check_name("table", t["name"]): Table(t["name"], t["caption"], _unframe(t))
                    for t in data.get("tables", [])},
            figures={check_name("figure", f["name"]): Figure(f["name"], f["title"], f["caption"],
                                                            f["alt"], f["svg"], _unframe(f),
                                                            f.get("narrow", ""))
                     for f in data.get("figures", [])},
            provenance=data["provenance"], run_id=path.stem, seconds=data.get("seconds"),
            sources=data.get("sources", ""),
        )
        return Record(check_name("record", path.stem), data["title"], data["about"], run)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path.name} is not a measurement record ({type(error).__name__}: "
                        f"{error}); data/README.md has the format") from None


def machine_name(run: Run) -> str:
    """What a run was measured on: the GPU where there is one, else the processor."""
    machine = run.provenance.get("machine")
    if not isinstance(machine, dict):
        return "unknown machine"
    gpus = [g["name"] for g in machine.get("gpus") or [] if isinstance(g, dict) and "name" in g]
    if gpus:
        return f"{len(gpus)} × {gpus[0]}" if len(gpus) > 1 else str(gpus[0])
    return f"{machine.get('cpu', 'unknown processor')}, {machine.get('cpu_count', '?')} CPUs"


def _frame(frame: pd.DataFrame) -> dict[str, Any]:
    rows = [[_encode(v) for v in row] for row in frame.itertuples(index=False, name=None)]
    return {"columns": [str(c) for c in frame.columns], "rows": rows}


def _unframe(entry: dict[str, Any]) -> pd.DataFrame:
    width = len(entry["columns"])
    if any(len(row) != width for row in entry["rows"]):
        raise UserError(f"table {entry['name']!r} has a row that is not {width} cells long")
    columns = {c: [_decode(row[i]) for row in entry["rows"]]
               for i, c in enumerate(entry["columns"])}
    # object wherever a cell is null, so that "not measured" does not turn into nan
    return pd.DataFrame({c: pd.Series(v, dtype=object if None in v else None)
                         for c, v in columns.items()})


def _encode(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    if value is pd.NA:
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _decode(value: Any) -> Any:
    return _WORDS.get(value, value) if isinstance(value, str) else value
