"""Puts the report together: runs, records and prose in, one HTML page and its appendices out."""

from __future__ import annotations

import base64
import hashlib
import re
import tomllib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from analysis.report.appendix import code_styles, notebook_html
from analysis.report.drawings import drawn
from analysis.report.example import worked_example
from analysis.report.html import tables
from analysis.report.html.check import check_page
from analysis.report.html.svg import inline_svg
from analysis.report.html.text import html, plain
from analysis.report.ledger import is_ledger, ledger
from analysis.report.machines import Machines
from analysis.report.names import layer_patterns, scan_forms
from analysis.report.prose import Prose, Sources
from analysis.report.select import Selection, advice, select
from analysis.runs.folders import RUNS, Run, Table, list_runs
from analysis.runs.records import RECORDS, load_records, machine_name
from analysis.studies import STUDIES, Study
from analysis.studies.drawing import Figure, figures, tables_shown
from mambabyte.config.files import check_file, made, whole_dir, whole_file, write_manifest
from mambabyte.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
TEMPLATES = Path(__file__).resolve().parent / "templates"
APPENDICES = "appendices"
OPEN_ROWS = 16  # a longer table is folded, unless it belongs to a ledger
LEDGERS = ("claims",)  # studies whose tables are the point and may be sorted and filtered


@dataclass
class Config:
    """reports/report.toml."""

    title: str
    subtitle: str = ""
    profiles: list[str] = field(default_factory=lambda: ["full", "quick"])
    front: list[str] = field(default_factory=list)  # sections before the studies
    back: list[str] = field(default_factory=list)  # sections after them
    titles: dict[str, str] = field(default_factory=dict)


def build_report(
    runs_root: Path | str = RUNS,
    out: Path | str = ROOT / "reports" / "report.html",
    *,
    prose: Path | str = ROOT / "reports",
    records_root: Path | str = RECORDS,
    draft: bool = False,
    registry: Mapping[str, Study] = STUDIES,
) -> Path:
    """Writes the report and returns its path; the same input gives the same bytes.

    ``prose`` holds report.toml and sections/*.md, ``records_root`` the records. UserError, and
    nothing written, where a number of the prose is missing, unmeasured or stale; with ``draft``
    missing ones are marked in the text and stale ones are used, with a warning on the page.
    """
    out, prose = Path(out), Path(prose)
    config = _load_config(prose / "report.toml")
    check_file(out)  # the appendices are written first: not for a page that cannot be
    runs = list_runs(runs_root)
    ran = {run.study for run in runs}
    current = {name: study.sources_digest(Path(runs_root), Path(records_root))
               if name in ran else "" for name, study in registry.items()}
    selection = select(runs, current, config.profiles, draft)
    missing = [advice(n, why) for n, why in selection.problems.items() if n in registry]
    if missing and not draft:
        raise UserError(missing[0])
    records = load_records(records_root)
    page = _Page(config, selection, records, prose / "sections", registry, draft)
    appendices = {f"{APPENDICES}/{r.folder.name}.html": page.appendix(r)
                  for r in page.shown if r.notebook}
    text = page.render()
    check_page(text, appendices.keys(), draft=draft)
    for content in appendices.values():
        check_page(content, [])
    with whole_dir(out.parent / APPENDICES, ours=made(out.parent / APPENDICES)) as folder:
        for name, content in appendices.items():
            (folder / Path(name).name).write_text(content, encoding="utf-8")
        write_manifest(folder)
    with whole_file(out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return out


def _load_config(path: Path) -> Config:
    try:
        return Config(**tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"there is no {path}: the report needs its title and sections") from None
    except (tomllib.TOMLDecodeError, TypeError) as error:
        raise UserError(f"{path}: {error}") from None


class _Page:
    """Everything that the templates show, worked out once."""

    def __init__(
        self, config: Config, selection: Selection, records: Mapping[str, Run],
        sections: Path, registry: Mapping[str, Study], draft: bool,
    ) -> None:
        self._config, self._selection, self._records = config, selection, records
        self._sections, self._registry, self._draft = sections, registry, draft
        others = [run for some in selection.others.values() for run in some]
        self.shown: list[Run] = [*selection.headline.values(), *others, *selection.failed]
        self._machines = self._all_machines()
        self._templates = Environment(
            loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined,
            finalize=lambda v: v if isinstance(v, Markup) else html(plain(v)),
            trim_blocks=True, lstrip_blocks=True,
        )
        self._templates.globals.update(style=self._style(), id_of_machine=self._machine_id)
        macros: Any = self._templates.get_template("blocks.html.j2").module
        self._blocks: dict[str, Markup] = {}
        self._links = self._anchors()
        for name, run in selection.headline.items():
            self._add_blocks(macros, name, run, "")
        for name, record in records.items():
            self._add_blocks(macros, name, record, machine_name(record))
        self._prose = Prose(
            Sources(selection.headline, records,
                    selection.problems, draft), self._blocks)
        self._blocks["table.example.table"] = self._example(macros)
        self._blocks |= _names(macros)

    def render(self) -> str:
        script = (TEMPLATES / "page.js").read_text(encoding="utf-8").strip()
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        config = self._config
        front = [self._section(n) for n in config.front]
        studies = [self._study(n) for n in self._study_names()]
        back = [self._section(n) for n in config.back]
        self._refuse_orphans()
        return unique_labels(self._templates.get_template("report.html.j2").render(
            config=config, script=Markup(script), script_digest=Markup(digest),
            front=front, studies=studies, back=back, draft=self._draft,
            stale=sorted(self._selection.stale), failed=[self._failed(r) for r in
                                                         self._selection.failed],
            machines=[{"id": m.id, "name": m.name, "table": tables.pairs(m.rows(), m.name)}
                      for m in self._machines.found.values()],
        ))

    def appendix(self, run: Run) -> str:
        """The page of one run's executed notebook."""
        if run.notebook is None:
            raise UserError(f"{run.folder} has no notebook")
        return unique_labels(self._templates.get_template("appendix.html.j2").render(
            title=self._title(run.study), run=run, body=notebook_html(run.notebook),
            code_styles=Markup(code_styles())))

    def _study_names(self) -> list[str]:
        # A record may belong to no study: what was measured is shown all the same.
        recorded = [record.study for record in self._records.values()]
        return list(dict.fromkeys([*self._registry, *self._selection.headline, *recorded]))

    def _title(self, name: str) -> str:
        if name in self._config.titles:
            return self._config.titles[name]
        return self._registry[name].title if name in self._registry else name.replace(
            "_", " ").capitalize()

    def _section(self, name: str) -> dict[str, Any]:
        text = self._read(name)
        if text is None:
            raise UserError(f"report.toml names the section {name!r}, but there is no "
                            f"{self._sections / (name + '.md')}")
        return {"name": name, "title": self._title(name), "prose": self._render(text, name)}

    def _refuse_orphans(self) -> None:
        """UserError for a section of the prose that no page would show."""
        shown = {*self._config.front, *self._config.back, *self._study_names()}
        for path in sorted(self._sections.glob("*.md")):
            if path.stem not in shown:
                raise UserError(f"{path} is shown nowhere: name it in front or back of "
                                "report.toml, or call it like a study")

    def _read(self, name: str) -> str | None:
        path = self._sections / f"{name}.md"
        return path.read_text(encoding="utf-8") if path.is_file() else None

    def _render(self, text: str, name: str) -> Markup:
        return self._prose.render(text, f"sections/{name}.md", prefix=name)

    def _study(self, name: str) -> dict[str, Any]:
        run = self._selection.headline.get(name)
        text = self._read(name)
        mine = [r for r in self._records.values() if r.study == name]
        shown = run or self._draft or (mine and name not in self._registry)
        prose = self._render(text, name) if text is not None and shown else ""
        records = [self._record(r) for r in mine]
        study = self._registry.get(name)
        view: dict[str, Any] = {
            "name": name, "title": self._title(name), "question": study.question if study else "",
            "prose": prose, "run": run, "records": records,
            "problem": self._selection.problems.get(name, ""),
            "stale": name in self._selection.stale,
        }
        if run:
            view |= self._details(name, run)
            view["others"] = self._others(name, run)
            view["notebooks"] = [(r.run_id or r.folder.name, f"{APPENDICES}/{r.folder.name}.html")
                                 for r in self._selection.others.get(name, []) if r.notebook]
        return view

    def _record(self, record: Run) -> dict[str, Any]:
        return {"record": record, "machine": machine_name(record),
                **self._details(record.run_id, record)}

    def _details(self, name: str, run: Run) -> dict[str, Any]:
        """The folded parts of a run and the blocks that the prose has not placed."""
        wanted = [*(f"figure.{name}.{f}" for f in figures(run, self._registry)),
                  *(f"table.{name}.{t.name}" for t in run.tables.values() if t.caption)]
        values = pd.DataFrame(
            [(n, v.value, v.unit, v.about) for n, v in run.values.items()],
            columns=["name", "value", "unit", "about"], dtype=object)
        return {
            "blocks": [self._blocks[k] for k in wanted if k not in self._prose.used],
            "values": tables.table(values, f"values of {name}") if run.values else "",
            "parameters": tables.pairs(list(run.parameters.items()), f"parameters of {name}"),
            "provenance": tables.pairs(_provenance(run), f"provenance of {name}"),
            "appendix": f"{APPENDICES}/{run.folder.name}.html" if run.notebook else "",
            "machine_id": self._machine_id(run),
        }

    def _others(self, name: str, head: Run) -> Markup | str:
        """One row a run with other parameters: what differs, and its values."""
        runs = self._selection.others.get(name, [])
        if not runs:
            return ""
        differing = [k for k in head.parameters
                     if any(r.parameters.get(k) != head.parameters[k] for r in runs)]
        rows = []
        for run in [head, *runs]:
            row: dict[str, Any] = {"run": run.run_id or run.folder.name, "profile": run.profile}
            row |= {k: plain(run.parameters.get(k)) for k in differing}
            row |= {f"{k}, {v.unit}" if v.unit else k: v.value for k, v in run.values.items()}
            rows.append(row)
        frame = pd.DataFrame(rows, dtype=object)
        return tables.table(frame.where(frame.notna(), None), f"runs of {name}")

    def _failed(self, run: Run) -> dict[str, Any]:
        return {"run": run, "title": self._title(run.study),
                "parameters": tables.pairs(list(run.parameters.items()), "parameters"),
                "appendix": f"{APPENDICES}/{run.folder.name}.html" if run.notebook else "",
                "machine_id": self._machine_id(run)}

    def _add_blocks(self, macros: Any, name: str, run: Run, machine: str) -> None:
        kind = "ledger" if run.study in LEDGERS else ""
        for figure in figures(run, self._registry).values():
            self._blocks[f"figure.{name}.{figure.name}"] = _figure(
                macros, name, figure, self._registry[run.study], machine)
        for table in tables_shown(run, self._registry).values():
            if not table.caption:  # the data of a figure
                continue
            self._blocks[f"table.{name}.{table.name}"] = _table(macros, name, table, machine, kind,
                                                               self._links)

    def _example(self, macros: Any) -> Markup:
        frame = pd.DataFrame([
            {"step t": s.t, "input u": s.u, "step size\u00a0Δ": s.delta, "B": s.B, "C": s.C,
             "decay exp(Δ\u00a0A)": s.decay, "drive Δ\u00a0B\u00a0u": s.drive,
             "state h": s.h, "output y": s.y}
            for s in worked_example()])
        table = Table("table", "Five steps with A = −1, D = 0.5 and h = 0 before the first.",
                      frame)
        return _table(macros, "example", table, "", "")

    def _machine_id(self, run: Run) -> str:
        return self._machines.id_of(run)

    def _all_machines(self) -> Machines:
        machines = Machines()
        for run in self.shown:
            title = self._title(run.study)
            if run.status == "failed":
                machines.add(run, f"{title} (failed)", "failed-runs")
            else:
                machines.add(run, title, run.study)
        for name, record in self._records.items():
            machines.add(record, name, f"record-{name}")
        return machines

    def _anchors(self) -> dict[str, str]:
        """Where the page shows a run or record that a ledger names as its source."""
        anchors = {run.run_id or run.folder.name: run.study
                   for run in self._selection.headline.values()}
        return anchors | {name: f"record-{name}" for name in self._records}

    def _style(self) -> Markup:
        return Markup((TEMPLATES / "page.css").read_text(encoding="utf-8").strip())


def _provenance(run: Run) -> list[tuple[str, Any]]:
    about = run.provenance
    versions = about.get("versions")
    return [
        ("run", run.run_id or run.folder.name), ("profile", run.profile or "none of the named"),
        ("date", about.get("date")), ("command", about.get("command")),
        ("commit", about.get("commit")), ("sources", run.sources or None),
        ("duration, s", run.seconds),
        ("versions", ", ".join(f"{k} {v}" for k, v in versions.items())
         if isinstance(versions, dict) else versions),
        ("machine", machine_name(run)),
    ]


def _figure(
    macros: Any, name: str, figure: Figure, study: Study, machine: str
) -> Markup:
    anchor = f"{name}-figure-{figure.name}"
    wide, narrow = drawn(figure, study, anchor)
    return macros.figure(
        anchor, figure, inline_svg(wide, anchor, figure.title, figure.alt),
        inline_svg(narrow, f"{anchor}-narrow", figure.title, figure.alt),
        tables.table(figure.data, f"data of {figure.title}"), len(figure.data), machine)


def _table(
    macros: Any, name: str, table: Table, machine: str, kind: str,
    links: Mapping[str, str] | None = None,
) -> Markup:
    folded = len(table.frame) > OPEN_ROWS and not kind
    limit = len(table.frame) if kind else tables.MAX_ROWS
    content = ledger(table.frame, links or {}) if kind and is_ledger(table.frame) else \
        tables.table(table.frame, table.caption, kind=kind, max_rows=limit)
    return macros.table(
        f"{name}-table-{table.name}", table, content, folded, len(table.frame), machine)


def _names(macros: Any) -> dict[str, Markup]:
    """Tables of what the names in figures mean."""
    forms = Table("forms", "Scan forms by their names in figures.", scan_forms())
    patterns = Table("patterns", "Layer patterns by their names in figures.", layer_patterns())
    return {f"table.names.{t.name}": macros.table(
        f"names-table-{t.name}", t, tables.table(t.frame, t.caption), False, len(t.frame), "")
        for t in (forms, patterns)}


_REGION = re.compile(r'(role="region" tabindex="0" aria-label=")([^"]*)"')


def unique_labels(page: str) -> str:
    """The page with a number behind every name of a region that another has too: who jumps from
    region to region by name must be able to tell them apart."""
    seen: Counter[str] = Counter()

    def numbered(match: re.Match[str]) -> str:
        label = match[2]
        seen[label] += 1
        while seen[label] > 1 and f"{label} ({seen[label]})" in seen:
            seen[label] += 1
        name = f"{label} ({seen[label]})" if seen[label] > 1 else label
        seen[name] += name != label
        return f'{match[1]}{name}"'

    return _REGION.sub(numbered, page)
