"""What README, summary and report say first: rows of data, with what they win and what they lose.

A headline (data/headlines.toml) names one record, which is one job, and the pairs of costs in it.
Numbers are read here; ahead, level and behind are computed; a pair of costs that the record has of
both sides and the headline leaves out is an error, and where it is a row of a table, those beside
it in which the rival leads are counted. So no headline stands without its losing side.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.plots.comparisons import AHEAD, BEHIND, LEVEL
from analysis.report.html.text import number
from analysis.runs.folders import ROOT, Run
from analysis.runs.jobs import Job, is_cost, job_of
from mambabyte.config.files import read_toml
from mambabyte.errors import UserError

FILE = ROOT / "data" / "headlines.toml"
DIGITS = 3
NOISE = 0.02  # ratios that are nearer to 1 are level
# Columns of tables that are costs: those of a pair of rows must all be told.
_COST_COLUMNS = ("(us)", "(ms)", "(MiB)", "(J/MB)")
_UNTOLD = ("floor", "quartiles")  # a bound and a spread are no result


@dataclass(frozen=True)
class Side:
    """One comparison: less is better. ``theirs`` is None where ``ours`` is a difference."""

    what: str
    ours: float
    theirs: float | None
    label: str = ""  # what in few words, for figures: cost and variant of the rival

    @property
    def outcome(self) -> str:
        if self.theirs is not None and abs(self.ours - self.theirs) < NOISE * self.theirs:
            return LEVEL
        return AHEAD if self.ours < (self.theirs or 0.0) else BEHIND

    @property
    def words(self) -> str:
        if self.theirs is None:
            return f"{self.ours:+.3f} {self.what}"
        return f"{self.what} {number(self.ours, DIGITS)} against {number(self.theirs, DIGITS)}"


@dataclass(frozen=True)
class Headline:
    """A claim with both sides, all of one job, and how often it was measured."""

    id: str
    short: str  # its name in figures
    claim: str
    ours: str
    theirs: str
    record: str
    job: Job
    n: str
    sides: tuple[Side, ...]
    elsewhere: str = ""  # what other rows of the record say, and other records

    def sides_that_are(self, outcome: str) -> tuple[Side, ...]:
        return tuple(s for s in self.sides if s.outcome == outcome)

    def _words(self, outcome: str) -> str:
        return "; ".join(side.words for side in self.sides_that_are(outcome))

    @property
    def ahead(self) -> str:
        return self._words(AHEAD) or "nothing"

    @property
    def behind(self) -> str:
        """What is lost, what is level, and what other rows and records say."""
        level = self._words(LEVEL)
        return "; ".join(filter(None, (self._words(BEHIND), level and f"level: {level}",
                                       self.elsewhere))) or "nothing here"

    @property
    def measured(self) -> str:
        """All of it in words."""
        return f"{self.ours} and {self.theirs}; ahead: {self.ahead}; behind: {self.behind}"


def load_headlines(records: Mapping[str, Run], path: Path = FILE) -> tuple[Headline, ...]:
    """The rows with their numbers; UserError where a record or a side of it is missing."""
    found = []
    for i, row in enumerate(_rows(path), start=1):
        try:
            found.append(_headline(row, records))
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise UserError(f"{path}: headline {i} is not as one should be "
                            f"({type(error).__name__}: {error})") from None
    return tuple(found)


def headline_records() -> list[str]:
    """Names of the records that the rows read, each once."""
    return list(dict.fromkeys(row["record"] for row in _rows(FILE)))


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = read_toml(path).get("headline")
    if not isinstance(rows, list) or not all(
            isinstance(row, dict) and isinstance(row.get("record"), str) for row in rows):
        raise UserError(f"{path}: expected rows [[headline]], each with the name of its record")
    return rows


def table(headlines: Sequence[Headline]) -> str:
    """A Markdown table, the same in README and report."""
    lines = ["| what | ours, and theirs | ahead | behind | n | record |",
             "|---|---|---|---|---|---|"]
    lines += [f"| {h.claim} | {h.ours}, and {h.theirs} | {h.ahead} | {h.behind} | {h.n} | "
              f"`{h.record}` |" for h in headlines]
    return "\n".join(lines)


def _headline(row: Mapping[str, Any], records: Mapping[str, Run]) -> Headline:
    name = row["record"]
    if name not in records:
        raise UserError(f"headline {row['id']!r}: there is no record {name!r}")
    run = records[name]
    untold = _untold(row, run)
    if untold:
        raise UserError(f"headline {row['id']!r} leaves out what {name} has of both sides: "
                        f"{', '.join(untold)}")
    more = ". ".join(filter(None, (_beside(row, run), _elsewhere(row, records))))
    return Headline(row["id"], row["short"], row["claim"], row["ours"], row["theirs"], name,
                    job_of(run), row["n"], tuple(_side(row, side, run) for side in row["sides"]),
                    more)


def _beside(row: Mapping[str, Any], run: Run) -> str:
    """In how many other rows of the table, of these two, the rival leads: by pass, shape, kind."""
    if "table" not in row:
        return ""
    ours, theirs = row["ours_row"], row["theirs_row"]
    whose = [column for column in ours if ours[column] != theirs[column]]
    same = [column for column in ours if column not in whose]
    if not same:
        return ""
    costs = {side["ours"]: side["what"] for side in row["sides"]}
    frame = run.tables[row["table"]].frame

    def of(cells: Mapping[str, Any]) -> pd.DataFrame:
        mine = (frame[whose] == [cells[column] for column in whose]).all(axis=1)
        return frame.loc[mine, [*same, *costs]]

    pairs = of(ours).merge(of(theirs), on=same, suffixes=("", "|theirs")).dropna()
    pairs = pairs[(pairs[same] != [ours[column] for column in same]).any(axis=1)]
    behind = {what: sum(Side(what, float(a), float(b)).outcome == BEHIND for a, b in zip(
        pairs[column], pairs[f"{column}|theirs"], strict=True))
        for column, what in costs.items()}
    if not any(behind.values()):
        return ""
    words = ", ".join(f"{what.partition(',')[0]} in {n}" for what, n in behind.items() if n)
    return f"in this record's {len(pairs)} other pairs of the two: {words}"


def _elsewhere(row: Mapping[str, Any], records: Mapping[str, Run]) -> str:
    """What other records say, ``{record.value:format}`` read from them."""
    found = ""
    for words, name, form, _ in string.Formatter().parse(row.get("elsewhere", "")):
        found += words
        if name is not None:
            record, _, value = name.partition(".")
            if record not in records or value not in records[record].values:
                raise UserError(f"headline {row['id']!r}: there is no {value!r} of a record "
                                f"{record!r}")
            found += format(records[record].values[value].value, form or "")
    return found


def _side(row: Mapping[str, Any], side: Mapping[str, str], run: Run) -> Side:
    if "table" in row:
        column = side["ours"]
        return Side(side["what"], float(_cells(row, run, "ours_row")[column]),
                    float(_cells(row, run, "theirs_row")[column]), side["what"])
    ours = _value(row, run, side["ours"])
    if row.get("differences"):
        return Side(side["what"], ours, None)
    return Side(side["what"], ours, _value(row, run, side["theirs"]), _label(row, side, run))


def _label(row: Mapping[str, Any], side: Mapping[str, str], run: Run) -> str:
    """ "ms_a_half_the_layers" beside "ms_a" -> "ms, half the layers"."""
    first, this = (s["theirs"].partition("_")[2] for s in (row["sides"][0], side))
    variant = this.removeprefix(first).strip("_").replace("_", " ")
    return ", ".join(filter(None, (run.values[side["theirs"]].unit, variant)))


def _value(row: Mapping[str, Any], run: Run, name: str) -> float:
    found = run.values.get(name)
    if found is None or found.value is None:
        raise UserError(f"headline {row['id']!r}: {row['record']} has not measured {name!r}")
    return float(found.value)


def _cells(row: Mapping[str, Any], run: Run, which: str) -> Mapping[str, Any]:
    """The one row of the headline's table that has the given cells."""
    frame = run.tables[row["table"]].frame
    for column, cell in row[which].items():
        frame = frame[frame[column] == cell]
    if len(frame) != 1:
        raise UserError(f"headline {row['id']!r}: {len(frame)} rows of {row['record']} are "
                        f"{dict(row[which])}, not one")
    return dict(frame.iloc[0])


def _untold(row: Mapping[str, Any], run: Run) -> list[str]:
    """Costs that the record has of both sides and the headline does not give."""
    told = {side["ours"] for side in row["sides"]}
    if "table" in row:
        pair = [_cells(row, run, which) for which in ("ours_row", "theirs_row")]
        there = {c for c in pair[0] if str(c).endswith(_COST_COLUMNS)
                 and not str(c).startswith(_UNTOLD)
                 and all(isinstance(cells[c], (int, float)) for cells in pair)}
    elif row.get("differences"):
        stem = row["sides"][0]["ours"].split("_")[0] + "_"
        there = {f"{stem}{budget}" for budget in ("steps", "wall_clock", "flops", "joules")
                 if run.values.get(f"{stem}{budget}") is not None}
    else:
        # "ms_m" beside "ms_a": what follows the cost says whose it is. The rival stands in every
        # variant that was measured, such as "ms_a_half_the_layers".
        ours, theirs = (row["sides"][0][key].partition("_")[2] for key in ("ours", "theirs"))
        told = {side["theirs"] for side in row["sides"]}
        costs = {name.partition("_")[0] for name, value in run.values.items()
                 if name.partition("_")[2] == ours and is_cost(value.unit)}
        there = {name for name in run.values for cost in costs
                 if name == f"{cost}_{theirs}" or name.startswith(f"{cost}_{theirs}_")}
    return sorted(there - told)
