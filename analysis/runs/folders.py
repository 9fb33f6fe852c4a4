"""Run folders: what a study leaves behind, here or on another machine, and all that others read.

A run folder holds numbers and words, and no drawing::

    run.json       study, parameters, values, captions, provenance, status, error
    NAME.csv       one file a table, or NAME.parquet where it is large
    notebook.ipynb, log.txt, stderr.txt   of a sweep only: the executed notebook, what it printed

Figures are drawn from the tables when somebody looks at them: ``run.json`` names each with the
table that is its data, and analysis.studies.drawing draws it. ``run.json`` is written last: a
folder without it is not a run. Reading needs neither torch nor matplotlib.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.runs.frames import flat, read_frame, table_file, write_frame
from mambabyte.config.files import damaged, make_dir, sha256, to_json, whole_dir, whole_file
from mambabyte.errors import UserError

Plain = float | int | str | bool | None

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "reports" / "runs"
INTERACTIVE = "interactive"  # folder of runs recorded by hand; not part of the report
RECORD = "run.json"
SEAL = "record_sha256"
# Faults of a disk or of rights, which say nothing of what a folder holds.
UNREAD = {errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM, errno.EMFILE}
FORMAT = 2

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*\Z")
# What a name of an earlier version is called now, in run.json and in the cells of tables.
_RENAMED = {"headroom": "exponent", "sequential": "recurrent"}
_OLD = re.compile(rf'(?<=["_])({"|".join(_RENAMED)})(?=["_])')
# JSON has no words for these; None (null) is "not measured".
_WORDS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True)
class Value:
    """One number or word; ``value`` None means that it was not measured."""

    value: Plain
    unit: str = ""
    about: str = ""


@dataclass(frozen=True)
class Table:
    """A frame of a run. Without a caption it is only the data of figures.

    None in a cell reads "not measured", a float NaN reads "nan". Units belong in column names.
    """

    name: str
    caption: str
    frame: pd.DataFrame


@dataclass(frozen=True)
class Run:
    """A run, in memory as in its folder. ``status`` is "done", or "failed" with an ``error``.

    A record, kept with the sources from another machine, has a ``title`` and a line ``about`` it.
    """

    study: str
    parameters: dict[str, Any]
    values: dict[str, Value] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)
    figures: dict[str, str] = field(default_factory=dict)  # name -> the table that is its data
    provenance: dict[str, Any] = field(default_factory=dict)
    title: str = ""
    about: str = ""
    status: str = "done"
    error: str = ""
    # Added by the sweep: identity, digest of the sources, the profile it equals, duration.
    run_id: str = ""
    sources: str = ""
    profile: str = ""
    seconds: float | None = None
    folder: Path = Path()

    @property
    def notebook(self) -> Path | None:
        path = self.folder / "notebook.ipynb"
        return path if path.is_file() else None


def tables_of(frames: Mapping[str, tuple[str, pd.DataFrame]]) -> dict[str, Table]:
    """Tables by name from name -> (caption, frame); UserError where one is not fit to be kept.

    A named index becomes the first column(s), an unnamed one is dropped.
    """
    return {check_name("table", name): Table(name, caption, flat(f"table {name!r}", frame))
            for name, (caption, frame) in frames.items()}


def write_run(run: Run, folder: Path | str) -> Path:
    """Writes a run, whole or not at all, with the machine's provenance where it has none; returns
    the folder. A folder that a sweep has made, with its notebook in it, keeps what else is there.
    """
    folder = Path(folder)
    if sweeps(folder):
        make_dir(folder)
        _write(run, folder)
    else:
        with whole_dir(folder, ours=made(folder)) as temporary:
            _write(run, temporary)
    return folder


def sweeps(folder: Path) -> bool:
    """Whether a sweep has made a folder for a run that is not in it yet."""
    return folder != RUNS and folder.is_dir() and not (folder / RECORD).exists()


def made(folder: Path) -> set[str]:
    """The names in a run folder that are its run's; what else is there is the user's and stays."""
    if not folder.exists():
        return set()
    record = _read_record(folder)
    tables = {f"{name}{kind}" for name in record.get("tables", ()) for kind in (".csv", ".parquet")}
    return {RECORD, "notebook.ipynb", "log.txt", "stderr.txt", *tables}


def _write(run: Run, folder: Path) -> None:
    from mambabyte.config.provenance import provenance

    for table in run.tables.values():
        write_frame(folder, check_name("table", table.name), table.frame)
    record = {
        "study": check_name("study", run.study), "title": run.title, "about": run.about,
        "status": run.status, "run_id": run.run_id, "sources": run.sources,
        "profile": run.profile, "seconds": run.seconds,
        "provenance": run.provenance or provenance(),
        "parameters": {_identifier(k): _plain_parameter(k, v) for k, v in run.parameters.items()},
        "tables": {t.name: _line(t.caption) for t in run.tables.values()},
        "figures": run.figures,
        "values": {check_name("value", n): {**vars(v), "value": _plain_value(n, v.value)}
                   for n, v in run.values.items()},
    }
    write_record(folder, {key: value for key, value in record.items() if value != ""})


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """run.json of a folder, an entry a line. Its order is the order of the report."""
    record = {"format": FORMAT, **record}
    if "sha256" in record:
        record[SEAL] = _seal(record)
    with whole_file(folder / RECORD) as path:
        path.write_text(_lines(record, 2) + "\n", encoding="utf-8")


def seal(folder: Path, **entries: Any) -> None:
    """Adds the last entries to a run.json, with the SHA-256 of its tables and of itself: who reads
    the folder from then on is told where one is not what was written."""
    record = {**_read_record(folder), **entries}
    files = [table_file(folder, name) for name in record.get("tables", ())]
    write_record(folder, {**record, "sha256": {file.name: sha256(file) for file in files}})


def _seal(record: Mapping[str, Any]) -> str:
    """SHA-256 of the entries of a run.json but this."""
    rest = {key: value for key, value in record.items() if key != SEAL}
    return hashlib.sha256(to_json(rest, sort_keys=True).encode()).hexdigest()


def _read_record(folder: Path) -> dict[str, Any]:
    """run.json of a folder; UserError where it is none."""
    path = folder / RECORD
    try:
        if path.exists() and not path.is_file():  # to read a pipe would be to wait for ever
            raise ValueError(f"{RECORD} is no file")
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict) or "format" not in record:
            raise ValueError(f"{RECORD} has no format")
        return record
    except (OSError, ValueError) as error:
        raise _broken(folder, error) from None


def _broken(folder: Path, error: Exception) -> UserError:
    if isinstance(error, OSError) and error.errno in UNREAD:
        return UserError(f"{folder} cannot be read ({error}): see to its disk and its permissions")
    return UserError(f"{folder} is not a complete run folder ({type(error).__name__}: {error}): "
                     "delete it and run the sweep again")


def _lines(value: Any, levels: int) -> str:
    """JSON with a line an entry for so many levels, and what is deeper in its line."""
    if not levels or not isinstance(value, dict) or not value:
        return to_json(value)
    indent = "  " * (3 - levels)
    inside = ",\n".join(f"{indent}{to_json(str(k))}: {_lines(v, levels - 1)}"
                        for k, v in value.items())
    return f"{{\n{inside}\n{indent[2:]}}}"


def load_run(folder: Path | str) -> Run:
    """Reads a run folder; UserError where it is none, was damaged or is of an older version."""
    folder = Path(folder)
    try:
        record = _read_record(folder)
        if record["format"] != FORMAT:
            raise UserError(
                f"{folder} has format {record['format']!r}, this version reads {FORMAT}: "
                "delete the folder and run the sweep again")
        if record["status"] not in ("done", "failed"):
            raise ValueError(f"status is {record['status']!r}, expected done or failed")
        tables = {check_name("table", name): Table(name, caption, read_frame(folder, name))
                  for name, caption in record.get("tables", {}).items()}
        for name, table in record.get("figures", {}).items():
            tables[check_name("figure", name) and table]
        wrong = damaged(folder, record.get("sha256", {}))
        if record.get(SEAL, _seal(record)) != _seal(record):
            wrong.append(RECORD)
        if wrong:
            raise ValueError(f"{wrong[0]} is not what was written, its SHA-256 is another")
        text = to_json(record)
        if _OLD.search(text):
            record = json.loads(_OLD.sub(lambda old: _RENAMED[old[0]], text))
            tables = {name: replace(t, frame=t.frame.replace(_RENAMED).rename(columns=_RENAMED))
                      for name, t in tables.items()}
        return Run(
            study=check_name("study", record["study"]), parameters=record["parameters"],
            values={n: Value(_decode(v["value"]), v.get("unit", ""), v.get("about", ""))
                    for n, v in record.get("values", {}).items()},
            tables=tables, figures=record.get("figures", {}),
            provenance=record.get("provenance", {}),
            title=record.get("title", ""), about=record.get("about", ""),
            status=record["status"], error=record.get("error", ""),
            run_id=record.get("run_id", ""), sources=record.get("sources", ""),
            profile=record.get("profile", ""), seconds=record.get("seconds"), folder=folder,
        )
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _broken(folder, error) from None


def list_runs(root: Path | str = RUNS) -> list[Run]:
    """The runs directly under ``root``, in the order of their folder names."""
    root = Path(root)
    if not root.is_dir():
        return []
    folders = (p for p in root.iterdir() if (p / RECORD).exists() and not p.name.startswith("."))
    return [load_run(p) for p in sorted(folders)]


def check_name(kind: str, name: Any) -> str:
    """``name`` where it is fit for a file and an anchor, else UserError."""
    if not isinstance(name, str) or not _NAME.match(name):
        raise UserError(f"{kind} name {name!r}: use lower-case letters, digits, _ and - only, "
                        "e.g. peak_bytes")
    return name


def _identifier(name: Any) -> str:
    if not isinstance(name, str) or not name.isidentifier():
        raise UserError(f"parameter name {name!r}: it must be a Python name")
    return name


def _line(text: str) -> str:
    return " ".join(text.split())


def _decode(value: Any) -> Any:
    return _WORDS.get(value, value) if isinstance(value, str) else value


def _plain_value(name: str, value: Any) -> Plain:
    if hasattr(value, "item"):  # numpy and torch scalars
        value = value.item()
    if value is pd.NA:
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (float, int, str, bool)):
        return value
    raise UserError(f"value {name!r} is a {type(value).__name__}: record one number, word, yes/no "
                    "or None")


def _plain_parameter(name: str, value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain_parameter(name, v) for v in value]
    if value is None or isinstance(value, (float, int, str, bool)):
        return value
    raise UserError(f"parameter {name!r} is a {type(value).__name__}: use plain literals "
                    "(numbers, words, yes/no, lists of them)")
