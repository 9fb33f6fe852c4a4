"""Figures and tables as parts of a page, made when prose asks for them and not before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from analysis.report.html import tables
from analysis.report.html.svg import inline_svg
from analysis.report.html.text import plain
from analysis.report.parts.drawings import drawn
from analysis.report.parts.ledger import is_ledger, ledger
from analysis.runs.folders import Run, Table
from analysis.runs.records import machine_name
from analysis.studies import Study
from analysis.studies.drawing import Figure, drawings, figure_of, tables_shown

OPEN_ROWS = 16  # a longer table is folded, unless it belongs to a ledger
FOLDED_ROWS = 60  # a table of more rows is in its file alone
LEDGERS = ("claims",)  # studies whose tables are the point and may be sorted and filtered
DATA = "data"  # folder of CSV files, beside the evidence pages


@dataclass
class Blocks:
    """What prose may place: ``figure`` and ``table`` of a run that speaks for its study, by the
    study's name, and of a record, by its own.

    ``others`` are figures that belong to no run, by name (comparisons over several records), and
    ``plain`` are ready tables.
    """

    macros: Any
    runs: Mapping[str, Run]
    records: Mapping[str, Run]
    registry: Mapping[str, Study]
    base: str = ""  # the way from the page to the folder of the data
    others: Mapping[str, Figure] = field(default_factory=dict)
    ready: dict[str, Markup] = field(default_factory=dict)
    quotations: Mapping[str, str] = field(default_factory=dict)  # of the ledger, see there

    def names(self, kind: str) -> Iterator[str]:
        """All names of a kind ("figure", "table"), as "study.name"."""
        prefix = f"{kind}."
        yield from (key.removeprefix(prefix) for key in self.ready if key.startswith(prefix))
        if kind == "figure":
            yield from self.others
        for name, run in self._all().items():
            drawn_here = run.study in self.registry and drawings(self.registry[run.study])
            yield from (f"{name}.{one}" for one in (
                run.tables if kind == "table" else drawn_here or ()))

    def figure(self, path: str, finding: Markup | None = None) -> Markup | None:
        """A figure with its words and a link to its data; with a ``finding`` that is its heading.
        None where there is no such figure."""
        found = self.drawing(path)
        if found is None:
            return None
        figure, _, anchor = found
        wide, narrow = drawn(*found)
        return self.macros.figure(
            f"finding-{anchor}" if finding else anchor, figure, finding,
            inline_svg(wide, anchor, figure.title, figure.alt),
            inline_svg(narrow, f"{anchor}-narrow", figure.title, figure.alt),
            self._data(figure) if not finding else "", len(figure.data),
            self.source(path.partition(".")[0], figure))

    def drawing(self, path: str) -> tuple[Figure, Study | None, str] | None:
        """A figure, whose drawing it is, and its anchor; None where there is no such figure."""
        name, _, key = path.partition(".")
        run = self._all().get(name)
        figure = self.others.get(path)
        if figure is None and run is not None:
            figure = figure_of(run, key, self.registry)
        study = self.registry.get(run.study) if run is not None else None
        return (figure, study, f"{name}-figure-{key}") if figure else None

    def table(self, path: str) -> Markup | None:
        """A table with its caption; None where there is no such table."""
        if f"table.{path}" in self.ready:
            return self.ready[f"table.{path}"]
        name, _, key = path.partition(".")
        run = self._all().get(name)
        if run is None or key not in run.tables or not run.tables[key].caption:
            return None
        found = tables_shown(run, self.registry)[key]
        kind = "ledger" if run.study in LEDGERS else ""
        rows = len(found.frame)
        if kind and is_ledger(found.frame):
            content = ledger(found.frame, self.links(), self.quotations)
        else:
            content = tables.table(found.frame, found.caption, kind=kind,
                                   max_rows=rows if kind else FOLDED_ROWS)
        return self.macros.table(f"{name}-table-{key}", found, content,
                                 rows > OPEN_ROWS and not kind, rows,
                                 self.source(name, found))

    def source(self, name: str, of: Figure | Table) -> dict[str, Any]:
        """Where a figure or table comes from: the run or record, its machine, and its data."""
        run = self._all().get(name)
        table = of.table if isinstance(of, Figure) else of.name
        if run is None:
            # A figure over several records names them all in its data.
            names = list(dict.fromkeys(of.data["record"])) if isinstance(of, Figure) else []
            return {"records": [(n, self.links()[n]) for n in names],
                    "data": f"{self.base}{DATA}/{name}/{table}.csv"} if names else {}
        return {"records": [], "name": name if name in self.records else "", "anchor": self.links()[
                    run.run_id or run.folder.name],
                "machine": machine_name(run) if name in self.records else _here(run),
                "about": about(run), "data": self.base + data_path(run, table)}

    def links(self) -> dict[str, str]:
        """Where the pages show a run or record that a text names as its source."""
        anchors = {run.run_id or run.folder.name: f"run-{study}"
                   for study, run in self.runs.items()}
        return anchors | {name: f"record-{name}" for name in self.records}

    def _all(self) -> dict[str, Run]:
        return {**self.runs, **self.records}

    def _data(self, figure: Figure) -> Markup | str:
        if len(figure.data) > FOLDED_ROWS:
            return ""
        return tables.table(figure.data, f"data of {figure.title}")


def _here(run: Run) -> str:
    """Where a run of this machine measured: the task's reads records, and names their machines."""
    machines = run.values.get("machines")
    return f"from records of {plain(machines.value)}" if machines else "this machine"


def data_path(run: Run, table: str) -> str:
    """The CSV of a table of a run, as the evidence pages link to it."""
    return f"{DATA}/{run.run_id or run.folder.name}/{table}.csv"


def ready_table(macros: Any, name: str, table: Table) -> Markup:
    """A table that belongs to no run."""
    return macros.table(f"{name}-table-{table.name}", table,
                        tables.table(table.frame, table.caption), False, len(table.frame), {})


def about(run: Run) -> dict[str, str]:
    """Day, commit and command of a run, "" for what it does not say."""
    said = {key: plain(run.provenance.get(key, "")) for key in ("date", "commit", "command")}
    return said | {"date": said["date"][:10]}
