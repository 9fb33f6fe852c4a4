"""Figures of studies as data: what is drawn of which tables, and the words around it.

``FIGURES`` of a study's ``figures`` module is a tuple of Drawing. A run has those whose tables,
values and parameters it holds; their names are kept with it, the drawing is made anew from its
numbers whenever somebody looks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pandas as pd

from analysis.runs.folders import Run, Table
from analysis.studies import STUDIES, Study
from mambabyte.errors import UserError

Words = str | Callable[[Run], str]


@dataclass(frozen=True)
class Drawing:
    """One figure. ``draw`` takes what ``of`` names, in that order, and returns a matplotlib Figure.

    ``of`` names tables of the run, or values or parameters where there is no such table; its first
    is a table and the data shown beside the figure, unless ``data`` takes the same arguments and
    makes them. ``caption`` says what to see, ``alt`` says it to those who cannot see it; both may
    be functions of the run, for words that need its numbers. ``when`` takes the arguments too:
    whether there is anything to draw.
    """

    name: str
    draw: Callable[..., Any]
    of: tuple[str, ...]
    title: Words
    caption: Words
    alt: Words
    data: Callable[..., pd.DataFrame] | None = None
    when: Callable[..., bool] | None = None

    def arguments(self, run: Run) -> list[Any] | None:
        """What ``draw`` takes, of a run; None where the run lacks some of it."""
        found: list[Any] = []
        for name in self.of if self.of[0] in run.tables else ():
            if name in run.tables:
                found.append(run.tables[name].frame)
            elif name in run.values:
                found.append(run.values[name].value)
            elif name in run.parameters:
                found.append(run.parameters[name])
            else:
                return None
        return found or None

    def is_in(self, run: Run) -> bool:
        """Whether the run has all that the figure draws, and something to see."""
        arguments = self.arguments(run)
        return arguments is not None and (self.when is None or self.when(*arguments))


@dataclass(frozen=True)
class Figure:
    """A figure of one run: its words and data, and ``draw`` for a matplotlib Figure of it."""

    name: str
    title: str
    caption: str
    alt: str
    data: pd.DataFrame
    table: str  # the table of the run that is drawn
    draw: Callable[[], Any]
    key: Callable[[], str]  # other arguments of ``draw``, another key


def drawings(study: Study) -> dict[str, Drawing]:
    """The figures that a study can draw, by name, in the order of the report."""
    return {drawing.name: drawing for drawing in study.module("figures").FIGURES}


def figures(run: Run, registry: Mapping[str, Study] = STUDIES) -> dict[str, Figure]:
    """The figures of a run; UserError where its study draws one no longer. What belongs to no study
    of the registry has none."""
    made = {name: figure_of(run, name, registry) for name in run.figures}
    return {name: figure for name, figure in made.items() if figure is not None}


def figure_of(run: Run, name: str, registry: Mapping[str, Study] = STUDIES) -> Figure | None:
    """One figure of a run: of those that it names, or what its study has learned to draw since of
    the same tables. None where it has no such figure; UserError as :func:`figures`."""
    if run.study not in registry:
        return None
    known = drawings(registry[run.study])
    for one in run.figures if name in run.figures else ():  # a run is whole, or is not shown
        if one not in known or known[one].arguments(run) is None:
            raise UserError(f"{run.run_id or run.folder}: the study {run.study} cannot draw its "
                            f"figure {one!r}: run it again")
    drawing = known.get(name)
    if drawing is None or not (name in run.figures or drawing.is_in(run)):
        return None
    return _figure(drawing, drawing.arguments(run) or [], run)


def _figure(drawing: Drawing, arguments: list[Any], run: Run) -> Figure:
    data = drawing.data(*arguments) if drawing.data else arguments[0]
    return Figure(
        drawing.name, in_words(drawing.title, run), in_words(drawing.caption, run),
        in_words(drawing.alt, run), data, drawing.of[0], partial(drawing.draw, *arguments),
        lambda: "\0".join(repr(a.to_dict("list") if isinstance(a, pd.DataFrame) else a)
                          for a in arguments))


def tables_shown(run: Run, registry: Mapping[str, Study] = STUDIES) -> dict[str, Table]:
    """The tables of a run as readers see them: what follows from other cells, such as an interval
    from its points, is made now, by ``SHOWN`` of the study's ``tables``."""
    made = getattr(registry[run.study].module("tables"), "SHOWN", {}) if run.study in registry \
        else {}
    return {name: replace(table, frame=made[name](table.frame)) if name in made else table
            for name, table in run.tables.items()}


def in_words(text: Words, run: Run) -> str:
    """A caption for a run, in one line."""
    return " ".join((text if isinstance(text, str) else text(run)).split())
