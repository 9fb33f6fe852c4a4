r"""Prose whose numbers come from run files: Jinja in a sandbox, then markdown.

In ``reports/sections/*.md``::

    Peak memory is {{ value('memory.peak') | bytes }}, {{ value('memory.share') | percent }} of it
    saved activations; on the accelerator {{ record('h200-memory.peak') | bytes }}.
    {{ figure('memory.peak') }}            places a figure here; what no prose places is not shown
    {{ table('memory.layers') }}           the same for a table
    {% call finding('h200-memory.peak') %}Half of it is ...{% endcall %}    a figure under a heading
    {{ value('throughput.joules', missing='not measured') }}     where None is expected
    {% if measured('throughput.joules') %} ... {% endif %}       true where it was measured
    {{ cell('h200-memory.cuda', 'peak, MB', form='fused') }}     one cell of a table
    {{ column('h200-memory.cuda', 'peak, MB') | max }}           all cells of a column
    {{ lab('chunk', 'labs.chunk') }}       something to try, of templates/labs.js, with that table
    {{ parameter('memory.context') }}      a parameter of the run that the numbers come from

Filters: sig(3) fixed(2) percent(1) times(1) bytes yesno(yes, no) integer. Numbers without a
filter are shown with four significant digits. What is missing, unmeasured or stale is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup

from analysis.report import decisions
from analysis.report.headlines import load_headlines, table
from analysis.report.html.markdown import to_html, to_line
from analysis.report.html.text import binary_bytes, fixed, number, plain
from analysis.report.parts.blocks import Blocks
from analysis.report.parts.example import first_lost, worked_example
from analysis.report.select import advice
from analysis.runs.folders import Run, Value
from analysis.runs.jobs import quantity
from analysis.studies.drawing import tables_shown
from mambabyte.errors import UserError, nearest

_SLOT = re.compile(r"<p>\[\[([\w.-]+)\]\]</p>\n?")  # where a figure or table goes
_MARKDOWN = re.compile(r"([\\`*_\[\]<>()#!|~&$^{}\n])")


class Text(str):
    """Text made by us: goes into the markdown as it is, where a run's words are escaped."""


@dataclass
class Sources:
    """What prose may ask for: the run that speaks for each study, and the records.

    ``problems`` says why a study has none; ``draft`` shows gaps instead of raising.
    """

    runs: Mapping[str, Run]
    records: Mapping[str, Run]
    problems: Mapping[str, str]
    draft: bool = False


class Prose:
    """Renders the sections of one page; ``blocks`` makes the figures and tables that they place,
    each once."""

    def __init__(self, sources: Sources, blocks: Blocks) -> None:
        self._sources = sources
        self._blocks = blocks
        self._placed: dict[str, Markup] = {}
        self._environment = ImmutableSandboxedEnvironment(
            undefined=StrictUndefined, autoescape=False, finalize=_finalize)
        self._environment.globals.update(
            value=self._value, record=self._record, measured=self._measured, unit=self._unit,
            parameter=self._parameter, cell=self._cell, column=self._column,
            headlines=self._headlines, headline=self._headline, decisions=self._decisions,
            figure=lambda path: self._place("figure", path, self._blocks.figure(path)),
            table=lambda path: self._place("table", path, self._blocks.table(path)),
            finding=lambda path, caller: self._place(
                "figure", path, self._blocks.figure(path, to_line(caller()))),
            lab=self._lab, example=_example, number=lambda v, digits=4: Text(number(v, digits)))
        self._environment.filters.update(FILTERS)

    def render(self, text: str, name: str, *, prefix: str, top: int = 3) -> Markup:
        """Markdown with Jinja as HTML; UserError names the section where something is wrong."""
        try:
            filled = self._environment.from_string(text).render()
            page = to_html(filled, prefix=prefix, top=top)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        except TemplateError as error:
            line = f" line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
            raise UserError(f"{name}{line}: {error.message}") from None
        except (TypeError, ValueError, ZeroDivisionError, AttributeError, KeyError) as error:
            raise UserError(f"{name}: {type(error).__name__}: {error}") from None
        return Markup(_SLOT.sub(lambda m: self._placed.get(m[1], m[0]), page))

    def _value(self, path: str, missing: str | None = None) -> Any:
        return self._checked(path, self._sources.runs, missing)

    def _record(self, path: str, missing: str | None = None) -> Any:
        return self._checked(path, self._sources.records, missing)

    def _measured(self, path: str) -> bool:
        name, _, key = path.partition(".")
        among = self._among(name)
        known_not_to_be = self._sources.draft or name in self._sources.problems
        if name not in among and known_not_to_be:
            return False
        others = (*self._sources.runs.values(), *self._sources.records.values())
        if key not in among[name].values and any(
                key in run.values for run in others if run.study == among[name].study):
            return False  # older than the value, which others of its study have
        found = self._find(path, among)
        return found is not None and found.value is not None

    def _among(self, name: str) -> Mapping[str, Run]:
        return self._sources.records if name in self._sources.records else self._sources.runs

    def _unit(self, path: str) -> str:
        found = self._find(path, self._sources.runs)
        return found.unit if found else ""

    def _parameter(self, path: str) -> Any:
        study, _, name = path.partition(".")
        run = self._run(study, self._among(study))
        if run is None:
            return _gap(path)
        if name not in run.parameters:
            raise UserError(f"{study} has no parameter {name!r}")
        return Text(plain(run.parameters[name])) if isinstance(run.parameters[name], list) \
            else run.parameters[name]

    def _column(self, path: str, column: str, where: Mapping[str, Any] | None = None,
                **cells: Any) -> list[Any]:
        """The cells of a column in the rows whose other cells are as said, in ``where`` for
        columns whose names are no Python names."""
        name, _, key = path.partition(".")
        run = self._run(name, self._among(name))
        if run is None:
            return [_gap(path)]
        if key not in run.tables:
            if self._sources.draft and name in self._sources.runs:
                return [_gap(path)]
            raise UserError(f"there is no table {path!r}{nearest(key, run.tables)}")
        frame = tables_shown(run, self._blocks.registry)[key].frame
        for wanted in (column, *(where or {}), *cells):
            if wanted not in frame:
                raise UserError(f"{path} has no column {wanted!r}{nearest(wanted, frame)}")
        for other, value in {**(where or {}), **cells}.items():
            frame = frame[frame[other] == value]
        unit = column.rpartition(", ")[2].rpartition("(")[2].rstrip(")")
        found = [v.item() if hasattr(v, "item") else v for v in frame[column]]
        if not found or None in found:
            raise UserError(f"{path}: {column!r} of {dict(where or {}, **cells)} was not measured")
        return [quantity(path, Value(v, unit), run) for v in found]

    def _cell(self, path: str, column: str, where: Mapping[str, Any] | None = None,
              **cells: Any) -> Any:
        """The one such cell."""
        found = self._column(path, column, where, **cells)
        if len(found) != 1:
            raise UserError(f"{path}: {len(found)} rows are {dict(where or {}, **cells)}, not one")
        return found[0]

    def _headlines(self) -> Text:
        """The table of data/headlines.toml, the same as in the README."""
        return Text(f"\n\n{table(load_headlines(self._sources.records))}\n\n")

    def _decisions(self) -> Text:
        """The table of data/decisions.toml, the same as in the README, and its details."""
        found = decisions.load_decisions(self._sources.records)
        return Text(f"\n\n{decisions.table(found)}\n\n{decisions.details(found)}\n\n")

    def _headline(self, identity: str) -> Text:
        """What one headline measured, in words: both sides, ahead and behind."""
        for found in load_headlines(self._sources.records):
            if found.id == identity:
                return Text(found.measured)
        raise UserError(f"there is no headline {identity!r} in data/headlines.toml")

    def _place(self, kind: str, path: str, block: Markup | None) -> Text:
        key = f"{kind}.{path}"
        if block is None:
            if self._sources.draft and path.partition(".")[0] not in self._sources.records:
                return _gap(path)  # its run is missing, or older than the table
            raise UserError(f"there is no {kind} {path!r}{nearest(path, self._blocks.names(kind))}")
        if key in self._placed:
            raise UserError(f"the {kind} {path!r} is placed twice on one page: once is enough")
        self._placed[key] = block
        return Text(f"\n\n[[{key}]]\n\n")

    def _lab(self, name: str, table: str, figure: str = "") -> Text:
        """Something to try with the rows of a table on the same page; see templates/labs.js."""
        anchors = [f"{one.replace('.', f'-{kind}-')}" for one, kind in (
            (table, "table"), (figure, "figure"))]
        self._placed[f"lab.{name}"] = Markup(
            '<div class="labs" data-lab="{}" data-table="{}" data-figure="{}"></div>').format(
            name, *anchors)
        return Text(f"\n\n[[lab.{name}]]\n\n")

    def _checked(self, path: str, among: Mapping[str, Run], missing: str | None) -> Any:
        """The value, as one that refuses a ratio with a value of another job."""
        found = self._find(path, among)
        if found is None:
            return _gap(path)
        if found.value is None:
            if missing is None:
                raise UserError(f"{path} was not measured: write value('{path}', "
                                "missing='not measured') or ask measured(...) first")
            return missing
        run = self._run(path.partition(".")[0], among)
        return found.value if run is None else quantity(path, found, run)

    def _find(self, path: str, among: Mapping[str, Run]) -> Value | None:
        name, dot, key = path.partition(".")
        if not dot:
            raise UserError(f"value {path!r}: write 'study.name'")
        run = self._run(name, among)
        if run is None:
            return None
        if key not in run.values:
            if self._sources.draft:
                return None
            raise UserError(f"{path} is not among the results of {run.folder.name}"
                            f"{nearest(key, run.values)}")
        return run.values[key]

    def _run(self, name: str, among: Mapping[str, Run]) -> Run | None:
        if name in among:
            return among[name]
        if self._sources.draft:
            return None
        if name in self._sources.problems:
            raise UserError(advice(name, self._sources.problems[name]))
        raise UserError(f"{name}: nothing is known by that name{nearest(name, among)}")


class _Gap(Text):
    """What a draft shows for a missing number; arithmetic and comparisons with it are gaps too."""

    def _same(self, *others: Any) -> _Gap:
        return self

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _same
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = _same
    __pow__ = __rpow__ = __neg__ = __abs__ = __round__ = _same

    def _no(self, other: Any) -> bool:
        return False

    __lt__ = __le__ = __gt__ = __ge__ = _no


def _gap(path: str) -> _Gap:
    return _Gap(f"**[missing: {path}]**")


def _example(field: str, t: int | None = None) -> float:
    """A number of the worked example: example('h', 3), or without a step of the repetition that is
    the first to be lost: example('exponent')."""
    return float(getattr(first_lost() if t is None else worked_example()[t - 1], field))


def _finalize(value: Any) -> Any:
    if isinstance(value, Text) or value is None:
        return value
    if isinstance(value, str):
        return _MARKDOWN.sub(lambda m: " " if m[1] == "\n" else "\\" + m[1], value)
    return plain(value)


def _of_numbers(text: Callable[..., str]) -> Callable[..., Any]:
    """A filter for numbers; words, such as a given ``missing`` text or a gap, pass unchanged."""
    def apply(value: Any, *args: Any) -> Any:
        return value if isinstance(value, str) else Text(text(value, *args))
    return apply


FILTERS: dict[str, Callable[..., Any]] = {
    "sig": _of_numbers(lambda v, digits=3: number(float(f"{v:.{digits}g}"), digits)),
    "fixed": _of_numbers(lambda v, digits=2: fixed(v, digits)),
    "integer": _of_numbers(lambda v: fixed(v, 0)),
    "percent": _of_numbers(lambda v, digits=1: fixed(100 * v, digits) + "\u202f%"),
    "times": _of_numbers(lambda v, digits=1: fixed(v, digits) + "\u202f×"),
    "bytes": _of_numbers(binary_bytes),
    "yesno": lambda v, yes="yes", no="no": Text(yes if v else no),
}
