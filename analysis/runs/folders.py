"""Run folders: what a study leaves behind, and all that the report ever reads.

A run folder holds::

    run.json            study, parameters, values, captions, provenance, status, error
    tables/NAME.parquet one file a table
    figures/NAME.svg    one file a figure, the same bytes for the same data
    figures/NAME.narrow.svg the same figure laid out for a phone
    figures/NAME.parquet    the numbers behind the figure
    notebook.ipynb, log.txt, stderr.txt   batch runs only: the executed notebook, what it printed

``run.json`` is written last: a folder without it is not a run. Reading needs neither torch nor
matplotlib.
"""

from __future__ import annotations

import html
import io
import json
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis.runs.frames import flat, read_frame, write_frame
from mambabyte.config.files import make_dir, whole_dir, write_json
from mambabyte.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MplFigure

Plain = float | int | str | bool | None

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "reports" / "runs"
INTERACTIVE = "interactive"  # folder of runs recorded by hand; not part of the report
RECORD = "run.json"
FORMAT = 1

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*\Z")
_PATH = re.compile(r'\bd="M[^"]*"')  # of an SVG
_DIGITS = re.compile(r"(\.\d\d)\d+")


@dataclass(frozen=True)
class Value:
    """One number or word; ``value`` None means that it was not measured."""

    value: Plain
    unit: str = ""
    about: str = ""


@dataclass(frozen=True)
class Table:
    name: str
    caption: str
    frame: pd.DataFrame


@dataclass(frozen=True)
class Figure:
    name: str
    title: str
    caption: str
    alt: str
    svg: str
    data: pd.DataFrame
    narrow: str = ""  # SVG for a phone; older runs have none


@dataclass(frozen=True)
class Run:
    """A run folder, read. ``status`` is "done" or "failed"; a failed run has an ``error``."""

    folder: Path
    study: str
    parameters: dict[str, Any]
    values: dict[str, Value] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    status: str = "done"
    error: str = ""
    # Added by the sweep: identity, digest of the sources, the profile it equals, duration.
    run_id: str = ""
    sources: str = ""
    profile: str = ""
    seconds: float | None = None

    @property
    def notebook(self) -> Path | None:
        path = self.folder / "notebook.ipynb"
        return path if path.is_file() else None


class Recorder:
    """Collects the results of one run and writes them whole. In a notebook, figures and tables
    appear where they are recorded.

    ``run_dir`` "" is interactive use: the folder is ``reports/runs/interactive/STUDY``, replaced
    by each run. Recording a name again replaces it, so a notebook cell can be run twice.

    >>> recorder = Recorder("memory", {"context": 1024})            # doctest: +SKIP
    >>> recorder.value("peak", 3.2e9, unit="B", about="peak of one training step")
    >>> recorder.table("layers", frame, caption="Bytes saved by each layer.")
    >>> recorder.finish()
    """

    def __init__(self, study: str, parameters: Mapping[str, Any], run_dir: str = "") -> None:
        self.study = check_name("study", study)
        self.parameters = {_identifier(k): _plain_parameter(k, v) for k, v in parameters.items()}
        self.run_dir = run_dir
        self._values: dict[str, Value] = {}
        self._tables: dict[str, Table] = {}
        self._figures: dict[str, Figure] = {}

    def value(self, name: str, value: Any, *, unit: str = "", about: str = "") -> None:
        """A number, word or yes/no that the prose or the ledger uses; None: not measured."""
        self._values[check_name("value", name)] = Value(_plain_value(name, value), unit, about)

    def table(self, name: str, frame: pd.DataFrame, *, caption: str) -> None:
        """A table of the report. None in a cell reads "not measured", a float NaN reads "nan".

        Where NaN stands for what was not measured, pass the frame through ``not_measured``.
        Units belong in the column names. A named index becomes the first column(s), an unnamed
        one is dropped.
        """
        name = check_name("table", name)
        table = Table(name, _text("table", name, "caption", caption),
                      flat(f"table {name!r}", frame))
        self._tables[name] = table
        _show_words("", table.caption)
        _show({"text/html": table.frame.to_html(index=False, max_rows=60, na_rep=""),
               "text/plain": table.frame.to_string(index=False, max_rows=60)})

    def figure(
        self, name: str, figure: MplFigure, *, title: str, caption: str, alt: str,
        data: pd.DataFrame,
    ) -> None:
        """A figure with its words and the numbers that it draws.

        ``title`` names it, ``caption`` says what to see, ``alt`` says it to those who cannot see
        it, ``data`` is shown as a table beside it.
        """
        name = check_name("figure", name)
        numbers = flat(f"data of figure {name!r}", data)
        if numbers.empty:
            raise UserError(f"figure {name!r} has no data: give the DataFrame that it draws")
        texts = {k: _text("figure", name, k, v)
                 for k, v in (("title", title), ("caption", caption), ("alt", alt))}
        svg, narrow = draw(figure, f"{self.study}.{name}")
        self._figures[name] = Figure(name, svg=svg, data=numbers, narrow=narrow, **texts)
        _show_words(texts["title"], texts["caption"])
        _show({"image/svg+xml": svg, "text/plain": texts["alt"]})

    def finish(self) -> Path:
        """Writes the run folder and returns it; until then nothing is on disk."""
        if self.run_dir:
            folder = Path(self.run_dir)
            make_dir(folder)
            self._write(folder)
            return folder
        folder = RUNS / INTERACTIVE / self.study
        with whole_dir(folder) as temporary:
            self._write(temporary)
        return folder

    def _write(self, folder: Path) -> None:
        from mambabyte.config.provenance import provenance

        for part in ("tables", "figures"):
            shutil.rmtree(folder / part, ignore_errors=True)
            (folder / part).mkdir()
        for table in self._tables.values():
            write_frame(folder / "tables" / f"{table.name}.parquet", table.frame)
        for figure in self._figures.values():
            (folder / "figures" / f"{figure.name}.svg").write_text(figure.svg, encoding="utf-8")
            (folder / "figures" / f"{figure.name}.narrow.svg").write_text(
                figure.narrow, encoding="utf-8")
            write_frame(folder / "figures" / f"{figure.name}.parquet", figure.data)
        write_record(folder, {
            "study": self.study,
            "parameters": self.parameters,
            "status": "done",
            "values": {n: vars(v) for n, v in self._values.items()},
            "tables": [{"name": t.name, "caption": t.caption} for t in self._tables.values()],
            "figures": [{"name": f.name, "title": f.title, "caption": f.caption, "alt": f.alt}
                        for f in self._figures.values()],
            "provenance": provenance(),
        })


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """run.json of a folder. The lists keep their order: it is the order of the report."""
    write_json(folder / RECORD, {"format": FORMAT, **record})


def update_record(folder: Path, **entries: Any) -> None:
    """Adds entries to a run.json: what the sweep knows and the study does not."""
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    write_record(folder, {**record, **entries})


def load_run(folder: Path | str) -> Run:
    """Reads a run folder; UserError where it is none or was damaged."""
    folder = Path(folder)
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise UserError(
                f"{folder} has format {record['format']}, this version reads {FORMAT}: "
                "delete the folder and run the sweep again")
        tables = {t["name"]: _load_table(folder / "tables", t) for t in record.get("tables", [])}
        figures = {f["name"]: _load_figure(folder / "figures", f)
                   for f in record.get("figures", [])}
        return Run(
            folder=folder, study=check_name("study", record["study"]),
            parameters=record["parameters"],
            values={n: Value(**v) for n, v in record.get("values", {}).items()},
            tables=tables, figures=figures, provenance=record.get("provenance", {}),
            status=record["status"], error=record.get("error", ""),
            run_id=record.get("run_id", ""), sources=record.get("sources", ""),
            profile=record.get("profile", ""), seconds=record.get("seconds"),
        )
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder} is not a complete run folder ({type(error).__name__}: {error}): "
            "delete it and run the sweep again") from None


def list_runs(root: Path | str = RUNS) -> list[Run]:
    """The runs directly under ``root``, in the order of their folder names."""
    root = Path(root)
    if not root.is_dir():
        return []
    folders = (p for p in root.iterdir() if (p / RECORD).is_file() and not p.name.startswith("."))
    return [load_run(p) for p in sorted(folders)]


def _load_table(folder: Path, entry: Mapping[str, str]) -> Table:
    name = check_name("table", entry["name"])
    return Table(name, entry["caption"], read_frame(folder / f"{name}.parquet"))


def _load_figure(folder: Path, entry: Mapping[str, str]) -> Figure:
    name = check_name("figure", entry["name"])
    narrow = folder / f"{name}.narrow.svg"
    return Figure(name, entry["title"], entry["caption"], entry["alt"],
                  (folder / f"{name}.svg").read_text(encoding="utf-8"),
                  read_frame(folder / f"{name}.parquet"),
                  narrow.read_text(encoding="utf-8") if narrow.is_file() else "")


def draw(figure: MplFigure, salt: str) -> tuple[str, str]:
    """A figure's SVG, and that of its layout for a phone; ``salt`` names it, for its ids."""
    from analysis.plots.phone import phone_layout

    return _svg(figure, salt), _svg(phone_layout(figure), f"{salt}.narrow")


def _show(bundle: dict[str, str]) -> None:
    """Display output of several types in a notebook's cell; elsewhere nothing happens."""
    shell = sys.modules.get("IPython")
    if shell is not None and hasattr(shell.get_ipython(), "kernel"):
        shell.display.display(bundle, raw=True)


def _show_words(title: str, caption: str) -> None:
    bold = f"<b>{html.escape(title)}.</b> " if title else ""
    _show({"text/html": f"<p>{bold}{html.escape(caption)}</p>",
           "text/plain": f"{title}. {caption}" if title else caption})


def _svg(figure: MplFigure, salt: str) -> str:
    """SVG whose bytes depend on the figure alone: no date, ids salted by the figure's name."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    # A hundredth of a point is finer than a screen; a map of many cells is half as large.
    return _PATH.sub(lambda path: _DIGITS.sub(r"\1", path[0]), buffer.getvalue())


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


def _text(kind: str, name: str, what: str, text: Any) -> str:
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{kind} {name!r} has no {what}: write one, the report shows it")
    return " ".join(text.split())


def _plain_value(name: str, value: Any) -> Plain:
    if hasattr(value, "item"):  # numpy and torch scalars
        value = value.item()
    if value is pd.NA:
        return None
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
