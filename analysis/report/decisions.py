"""The table of decisions: a question, the answer that a record gives, and where it does not hold.

A row of data/decisions.toml names its record; the answer is words with values of it in braces, such
as ``{at_1m_best} at {at_1m_best_bits:.3f} bits a byte``. A question without a record has not been
measured, and its answer says so. README and report print the same table; the report has the details
behind it.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.runs.folders import ROOT, Run
from mambabyte.config.files import read_toml
from mambabyte.errors import UserError

FILE = ROOT / "data" / "decisions.toml"
NOT_MEASURED = "not measured"
_KEYS = ("question", "record", "answer", "details", "n", "limits")


@dataclass(frozen=True)
class Decision:
    """A row of the table of decisions, its numbers filled in; ``n`` says how many runs they are."""

    question: str
    answer: str
    details: str  # more numbers, "" where the answer has all
    n: str
    limits: str
    record: str  # "" where nothing was measured

    @property
    def measured(self) -> bool:
        return bool(self.record)


def load_decisions(records: Mapping[str, Run], path: Path = FILE) -> tuple[Decision, ...]:
    """The rows with their numbers; UserError where a record or a value of it is missing."""
    rows = read_toml(path).get("decision")
    if not isinstance(rows, list) or not all(
            isinstance(row, dict) and set(row) == set(_KEYS) for row in rows):
        raise UserError(f"{path}: expected rows [[decision]] with {', '.join(_KEYS)}")
    return tuple(_decision(row, records, path) for row in rows)


def table(decisions: Sequence[Decision]) -> str:
    """A Markdown table, the same in README and report."""
    lines = ["| question | answer | n | where it does not hold | record |", "|---|---|---|---|---|"]
    lines += [f"| {d.question} | {d.answer} | {d.n} | {d.limits} | "
              f"{f'`{d.record}`' if d.measured else ''} |" for d in decisions]
    return "\n".join(lines)


def details(decisions: Sequence[Decision]) -> str:
    """A Markdown list of what the table has no room for."""
    return "\n".join(f"- **{d.question}** {d.details}" for d in decisions if d.details)


def _decision(row: Mapping[str, Any], records: Mapping[str, Run], path: Path) -> Decision:
    name, run = row["record"], records.get(row["record"])
    if not name and not row["answer"].startswith(NOT_MEASURED):
        raise UserError(f"{path}: {row['question']!r} names no record, so its answer must begin "
                        f"with {NOT_MEASURED!r}")
    if name and run is None:
        raise UserError(f"{path}: {row['question']!r}: there is no record {name!r}")
    words = {key: _filled(row[key], run, row["question"], path) if run else row[key]
             for key in _KEYS if key not in ("question", "record")}
    return Decision(row["question"], record=name, **words)


def _filled(text: str, run: Run, question: str, path: Path) -> str:
    wanted = [name for _, name, _, _ in string.Formatter().parse(text) if name]
    missing = [name for name in wanted
               if name not in run.values or run.values[name].value is None]
    if missing:
        raise UserError(f"{path}: {question!r}: {run.run_id} has not measured "
                        f"{', '.join(missing)}")
    try:
        return text.format_map({name: run.values[name].value for name in wanted})
    except (ValueError, IndexError, KeyError) as error:
        raise UserError(f"{path}: {question!r}: {error}") from None
