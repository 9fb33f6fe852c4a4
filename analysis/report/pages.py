"""The pages of a report: the article, and behind it a page a study and a page a section."""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from analysis.report.appendix import code_styles, notebook_html
from analysis.report.html import tables
from analysis.report.html.text import html, plain
from analysis.report.parts.blocks import DATA, Blocks, about, data_path, ready_table
from analysis.report.parts.comparisons import comparisons, lab_tables
from analysis.report.parts.drawings import draw_ahead
from analysis.report.parts.example import example_table, failure_table, repeat_table
from analysis.report.parts.machines import Machines
from analysis.report.parts.names import layer_patterns, scan_forms
from analysis.report.prose import Prose, Sources
from analysis.report.select import Selection
from analysis.runs.folders import Run, Table
from analysis.runs.frames import csv_text
from analysis.runs.records import machine_name
from analysis.studies import Study
from analysis.studies.drawing import Figure
from mambabyte.errors import UserError

TEMPLATES = Path(__file__).resolve().parent / "templates"
HERE = "On your machine"  # what follows this heading of a section is folded
WORDS_A_MINUTE = 230
_PLACED = re.compile(r"\b(?:figure|finding)\('([\w.-]+)'")
_HEADING = re.compile(r'<h2(?: class="finding")? id="([^"]+)">(.*?)</h2>', re.S)


@dataclass
class Config:
    """reports/report.toml."""

    title: str
    subtitle: str = ""
    audience: str = ""
    profiles: list[str] = field(default_factory=lambda: ["full", "quick"])
    article: list[str] = field(default_factory=list)  # sections of the article
    pages: list[str] = field(default_factory=list)  # sections that are a page each
    titles: dict[str, str] = field(default_factory=dict)
    quotations: dict[str, str] = field(default_factory=dict)  # claim -> the sentence judged


class Pages:
    """Every page by its path, seen from the article's folder; ``evidence`` is the folder of all
    but the article."""

    def __init__(
        self, config: Config, selection: Selection, records: Mapping[str, Run],
        sections: Path, registry: Mapping[str, Study], draft: bool, article: str, evidence: str,
    ) -> None:
        self._config, self._selection, self._records = config, selection, records
        self._sections, self._registry, self._draft = sections, registry, draft
        self._article, self._evidence = article, evidence
        others = [run for some in selection.others.values() for run in some]
        self.shown: list[Run] = [*selection.headline.values(), *others, *selection.failed]
        self._templates = Environment(
            loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined,
            finalize=lambda v: v if isinstance(v, Markup) else html(plain(v)),
            trim_blocks=True, lstrip_blocks=True,
        )
        self._templates.globals.update(style=_source("page.css"), machine_name=machine_name)
        self._macros: Any = self._templates.get_template("blocks.html.j2").module
        self._machines = self._all_machines()
        self._ready = {f"table.{name}.{t.name}": ready_table(self._macros, name, t)
                       for name, t in [*_tables(), *(("labs", t) for t in lab_tables(records))]}
        self._others = comparisons(records)

    def render(self, report: Callable[[float], None] = lambda done: None) -> dict[str, str]:
        """All pages, path -> HTML, links between them not yet led there. ``report`` is called with
        the share that is done, half of it drawings."""
        draw_ahead(self._drawings(), lambda done: report(done / 2))
        found = {self._article: self._article_page()}
        pages = [*((name, self._study_page) for name in self._study_names()),
                 *((name, self._section_page) for name in self._config.pages)]
        for number, (name, page) in enumerate(pages):
            report((1 + number / len(pages)) / 2)
            found[f"{self._evidence}/{name}.html"] = page(name)
        self._refuse_orphans()
        found[f"{self._evidence}/machines.html"] = self._machines_page()
        for run in self.shown:
            if run.notebook:
                found[f"{self._evidence}/{_notebook(run)}"] = self._appendix(run)
        return found

    def data(self) -> Iterable[tuple[str, str]]:
        """CSV of the figures that belong to no run, by path."""
        for path, figure in self._others.items():
            yield (f"{DATA}/{path.replace('.', '/')}.csv", csv_text(figure.name, figure.data))

    # --- one page each ------------------------------------------------------------------------

    def _article_page(self) -> str:
        prose = self._prose(f"{self._evidence}/")
        body = Markup("\n").join(self._article_section(prose, name)
                                 for name in self._config.article)
        dated = [r for r in [*self._selection.headline.values(), *self._records.values()]
                 if r.provenance.get("date")]
        newest = max(dated, key=lambda r: str(r.provenance["date"]), default=None)
        machines = Counter(machine_name(r) for r in self._records.values())
        return self._page(
            "article.html.j2", "", title=self._config.title, body=body, prose=body,
            newest=about(newest) if newest else {}, machines=[m for m, _ in
                                                                 machines.most_common()],
            here=sorted({machine_name(r) for r in self._selection.headline.values()}),
            minutes=max(1, round(_words(body) / WORDS_A_MINUTE)),
            failed=len(self._selection.failed), stale=sorted(self._selection.stale))

    def _article_section(self, prose: Prose, name: str) -> Markup:
        """A section of the article, below its title where report.toml gives it one."""
        text = prose.render(self._text(name), f"sections/{name}.md", prefix=name, top=2)
        title = self._config.titles.get(name)
        return Markup('<h2 id="{}">{}</h2>\n').format(name, title) + text if title else text

    def _study_page(self, name: str) -> str:
        run, study = self._selection.headline.get(name), self._registry.get(name)
        mine = [r for r in self._records.values() if r.study == name]
        text = self._read(name)
        body: Markup = Markup("")
        if text is not None and (run or self._draft or (mine and study is None)):
            body = self._prose().render(text, f"sections/{name}.md", prefix=name, top=2)
        body, folded = _split(body, f"{name}-{HERE.lower().replace(' ', '-')}")
        return self._page(
            "study.html.j2", name, title=self._title(name), prose=body, folded=folded, run=run,
            question=study.question if study else "",
            problem=self._selection.problems.get(name, "") if study or not mine else "",
            stale=name in self._selection.stale,
            records=[{"run": r, "source": self._source(r)} for r in mine],
            local=self._local(name, run) if run else {})

    def _section_page(self, name: str) -> str:
        body = self._prose().render(self._text(name), f"sections/{name}.md", prefix=name, top=2)
        return self._page("section.html.j2", name, title=self._title(name), prose=body)

    def _machines_page(self) -> str:
        failed = [{"run": r, "title": self._title(r.study), "source": self._source(r),
                   "parameters": tables.pairs(list(r.parameters.items()), "parameters")}
                  for r in self._selection.failed]
        machines = [{"id": m.id, "name": m.name, "table": tables.pairs(m.rows(), m.name)}
                    for m in self._machines.found.values()]
        prose = Markup("").join(Markup(f'<h2 id="{m["id"]}">') + html(m["name"]) + Markup("</h2>")
                                for m in machines)
        return self._page("machines.html.j2", "machines", title="Machines and failed runs",
                          prose=prose, failed=failed, machines=machines)

    def _appendix(self, run: Run) -> str:
        if run.notebook is None:
            raise UserError(f"{run.folder} has no notebook")
        return unique_labels(self._templates.get_template("appendix.html.j2").render(
            title=self._title(run.study), run=run, body=notebook_html(run.notebook),
            code_styles=Markup(code_styles())))

    # --- what they share ----------------------------------------------------------------------

    def _page(self, template: str, name: str, *, prose: Markup, **view: Any) -> str:
        scripts = ["contents"]
        scripts += [part for part in ("ledger", "labs") if f'class="{part}' in prose]
        script = "\n".join(_source(f"{part}.js") for part in scripts)
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        home = "" if name else f"{self._evidence}/"
        contents = [{"title": "The article", "file": f"../{self._article}" if name
                     else self._article, "here": not name}]
        contents += [{"title": self._title(n), "file": f"{home}{n}.html", "here": n == name}
                     for n in [*self._study_names(), *self._config.pages]]
        contents.append({"title": "Machines and failed runs", "file": f"{home}machines.html",
                         "here": name == "machines"})
        # Of a finding its first words: "It grows: from 3 to 4 (n = 5)" -> "It grows".
        headings = [(anchor, Markup(re.sub("<[^>]*>|: .*", "", words, flags=re.S)))
                    for anchor, words in _HEADING.findall(prose)]
        return unique_labels(self._templates.get_template(template).render(
            config=self._config, name=name, contents=contents, headings=headings, prose=prose,
            script=Markup(script), script_digest=Markup(digest), draft=self._draft, **view))

    def _prose(self, base: str = "") -> Prose:
        selection = self._selection
        return Prose(Sources(selection.headline, self._records, selection.problems, self._draft),
                     self._blocks(base))

    def _blocks(self, base: str = "") -> Blocks:
        return Blocks(self._macros, self._selection.headline, self._records, self._registry, base,
                      self._others, self._ready, self._config.quotations)

    def _drawings(self) -> Iterator[tuple[Figure, Study | None, str]]:
        """The figures that sections name. What is wrong with one is said where it is placed."""
        names = [*self._config.article, *self._study_names(), *self._config.pages]
        blocks, text = self._blocks(), "\n".join(self._read(name) or "" for name in names)
        for path in dict.fromkeys(_PLACED.findall(text)):
            with suppress(UserError):
                found = blocks.drawing(path)
                if found:
                    yield found

    def _local(self, name: str, run: Run) -> dict[str, Any]:
        """What stands folded below the evidence: the run of this machine, and its variants."""
        values = pd.DataFrame(
            [(v.about or n, v.value, v.unit, n) for n, v in run.values.items()],
            columns=["what", "value", "unit", "name in the prose"], dtype=object)
        return {
            "source": self._source(run), "others": self._variants(name, run),
            "values": tables.table(values, f"values of {name}") if run.values else "",
            "notebooks": [(r.run_id or r.folder.name, _notebook(r)) for r in
                          [run, *self._selection.others.get(name, [])] if r.notebook]}

    def _source(self, run: Run) -> dict[str, Any]:
        return {"machine": machine_name(run), "machine_id": self._machines.id_of(run),
                "about": about(run), "data": [
                    (name, data_path(run, name)) for name in [*run.tables, "values"]
                    if name in run.tables or run.values],
                "notebook": _notebook(run) if run.notebook else ""}

    def _variants(self, name: str, head: Run) -> Markup | str:
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

    def _study_names(self) -> list[str]:
        # A record may belong to no study: what was measured is shown all the same.
        recorded = [record.study for record in self._records.values()]
        return list(dict.fromkeys([*self._registry, *self._selection.headline, *recorded]))

    def _title(self, name: str) -> str:
        if name in self._config.titles:
            return self._config.titles[name]
        return self._registry[name].title if name in self._registry else name.replace(
            "_", " ").capitalize()

    def _refuse_orphans(self) -> None:
        """UserError for a section of the prose that no page would show."""
        shown = {*self._config.article, *self._config.pages, *self._study_names()}
        for path in sorted(self._sections.glob("*.md")):
            if path.stem not in shown:
                raise UserError(f"{path} is shown nowhere: name it in article or pages of "
                                "report.toml, or call it like a study")

    def _text(self, name: str) -> str:
        text = self._read(name)
        if text is None:
            raise UserError(f"report.toml names the section {name!r}, but there is no "
                            f"{self._sections / (name + '.md')}")
        return text

    def _read(self, name: str) -> str | None:
        path = self._sections / f"{name}.md"
        return path.read_text(encoding="utf-8") if path.is_file() else None

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


def _source(name: str) -> Markup:
    return Markup((TEMPLATES / name).read_text(encoding="utf-8").strip())


def _notebook(run: Run) -> str:
    return f"notebook-{run.folder.name}.html"


def _tables() -> Iterable[tuple[str, Table]]:
    """Tables that belong to no run: what names mean, and the worked example."""
    yield "example", Table("table", "Five steps with A = −1, D = 0.5 and h = 0 before the first.",
                           example_table())
    yield "example", Table("failure", "The same five steps by two factors, and by the published "
                           "formula.", failure_table())
    yield "example", Table("repeated", "The fourth step again and again: the growing factor "
                           "leaves float32, and the state with it.", repeat_table())
    yield "names", Table("forms", "Scan forms by their names in figures.", scan_forms())
    yield "names", Table("patterns", "Layer patterns by their names in figures.",
                         layer_patterns())


def _split(body: Markup, anchor: str) -> tuple[Markup, Markup]:
    """A section's text before and after the heading of that anchor."""
    before, _, after = body.partition(f'<h2 id="{anchor}">{HERE}</h2>')
    return Markup(before), Markup(after)


def _words(page: Markup) -> int:
    """Words to read: drawings, tables and folded parts are looked at, not read."""
    text = re.sub(r"<(svg|table|details)\b.*?</\1>", " ", page, flags=re.S)
    return len(re.sub(r"<[^>]*>", " ", text).split())


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
