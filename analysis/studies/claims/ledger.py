"""The ledger's vocabulary: a claim (data), a finding (computed), and the checks between them.

A claim is a row of data/claims.toml. A check is a function that takes the laboratory and the claim
and returns a finding; it reads every number from the laboratory or from the claim, so that other
numbers give another verdict.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.runs.folders import ROOT
from mambabyte.config.files import read_toml
from mambabyte.errors import UserError

CLAIMS = "claims.toml"  # in data/; the digest of the study's sources follows the name

HOLDS = "holds"
CAVEAT = "holds with a caveat"
FAILS = "does not hold"
INCONSISTENT = "inconsistent with another statement"
OPEN = "not decidable here"
VERDICTS = (HOLDS, CAVEAT, FAILS, INCONSISTENT, OPEN)

DOCUMENTS = ("first", "second")
KINDS = (
    "arithmetic", "numerical", "gradient", "memory", "performance", "energy", "quality",
    "behaviour",
)
HERE = "computed here"


@dataclass(frozen=True)
class Claim:
    """One checkable statement. ``numbers`` are those of ``theirs`` that a check compares with, the
    claimed one first."""

    id: str
    document: str
    where: str
    claim: str
    kind: str
    check: str
    theirs: str = ""
    numbers: tuple[float, ...] = ()
    note: str = ""
    cannot_fail: str = ""  # why no measurement could contradict it: shown, but not counted
    insensitive: str = ""  # why the verdict is the same at three times the number and at a third

    @property
    def counted(self) -> bool:
        """Whether the verdict is one: some measurement could have given another."""
        return not self.cannot_fail

    @property
    def number(self) -> float:
        """The one number of a claim that has one."""
        if len(self.numbers) != 1:
            raise UserError(f"claim {self.id!r} has {len(self.numbers)} numbers: its check "
                            f"{self.check!r} needs one")
        return self.numbers[0]

    @property
    def range(self) -> tuple[float, float]:
        """The two numbers of a claim that gives a range."""
        if len(self.numbers) != 2:
            raise UserError(f"claim {self.id!r} has {len(self.numbers)} numbers: its check "
                            f"{self.check!r} needs a lower and an upper one")
        return self.numbers[0], self.numbers[1]


@dataclass(frozen=True)
class Finding:
    """What a check found. ``ours`` is None where nothing could be measured or computed."""

    verdict: str
    ours: str | None
    reason: str
    source: str = HERE

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise UserError(f"verdict {self.verdict!r} is unknown: choose {', '.join(VERDICTS)}")


@dataclass(frozen=True)
class FirstRun:
    """The first document's own run under the task's rules, as its authors' log has it."""

    ms_per_step: float
    steps_done: int  # until the clock stopped it
    joules: float
    seconds: float
    watts: float
    last_finite_step: float
    first_lost_step: float  # inf where no loss was lost
    first_loss: float
    disqualified: str
    gpu: str
    source: str


Check = Callable[[Any, Claim], Finding]  # of a lab.Lab and a claim
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    """Registers a check under its name, with hyphens for underscores."""
    CHECKS[function.__name__.replace("_", "-")] = function
    return function


@dataclass(frozen=True)
class Ledger:
    """The rows of data/claims.toml, and the outside facts that some checks compare with."""

    claims: tuple[Claim, ...]
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)


def load_ledger(path: Path | None = None) -> Ledger:
    """Reads and checks the file; UserError names the row and what is wrong with it."""
    path = path or ROOT / "data" / CLAIMS
    data = read_toml(path)
    rows = data.get("claim")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows) \
            or not isinstance(data.get("facts", {}), dict):
        raise UserError(f"{path.name} is not a ledger: expected rows [[claim]] and [facts]")
    claims = tuple(_claim(row, i) for i, row in enumerate(rows, start=1))
    seen: set[str] = set()
    for claim in claims:
        if claim.id in seen:
            raise UserError(f"claim {claim.id!r} is there twice: ids must be unique")
        seen.add(claim.id)
    return Ledger(claims, data.get("facts", {}))


def _claim(row: dict[str, Any], number: int) -> Claim:
    name = row.get("id", f"number {number}")
    unknown = row.keys() - Claim.__dataclass_fields__.keys()
    if unknown:
        raise UserError(f"claim {name}: unknown entries {', '.join(sorted(unknown))}")
    for key in ("id", "document", "where", "claim", "kind", "check"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise UserError(f"claim {name}: {key} is missing")
    if row["document"] not in DOCUMENTS:
        raise UserError(f"claim {name}: document {row['document']!r} is not one of "
                        f"{', '.join(DOCUMENTS)}")
    if row["kind"] not in KINDS:
        raise UserError(f"claim {name}: kind {row['kind']!r} is not one of {', '.join(KINDS)}")
    numbers = row.get("numbers", [])
    if not isinstance(numbers, list) or not all(
            isinstance(n, (int, float)) and math.isfinite(n) for n in numbers):
        raise UserError(f"claim {name}: numbers {numbers!r} must be finite numbers")
    texts = {k: " ".join(str(v).split()) for k, v in row.items() if k != "numbers"}
    return Claim(**texts, numbers=tuple(float(n) for n in numbers))


def counted(ledger: pd.DataFrame) -> pd.DataFrame:
    """The rows whose verdict some measurement could have changed."""
    return ledger[ledger["cannot fail"] == ""]


# ------------------------------------------------------------------------------ common judgements


def near(ours: float, theirs: float, tolerance: float) -> bool:
    """Whether two numbers agree within a relative tolerance; nan agrees with nothing."""
    return abs(ours - theirs) <= tolerance * abs(theirs)


def compare(ours: float, theirs: float, *, holds: float, caveat: float = 0.0) -> str:
    """HOLDS within the tolerance ``holds``, CAVEAT within ``caveat``, else FAILS."""
    if near(ours, theirs, holds):
        return HOLDS
    return CAVEAT if near(ours, theirs, caveat) else FAILS


def sig(value: float, digits: int = 3) -> str:
    """A number in words that a table can hold: 1057152 -> "1.06e+06", 0.0022 -> "0.0022"."""
    if value != value or math.isinf(value):
        return str(value)
    return f"{value:.{digits}g}"
