"""A ratio of times, joules or bytes needs both sides in one job; quality may span jobs.

A card's clock, its temperature and whatever else its host does differ from one command to the next
by more than many a difference that is reported. So a job is one command on one machine, with an
identity that the program makes (``mambabyte.config.provenance.job``); no option sets it. Several
commands on one machine count as one where each measured the same control and the controls agree.

``Quantity`` is a float that knows its job, and refuses to be divided by one of another. The
report's templates get their values as quantities, so that no page can print such a ratio.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from analysis.runs.folders import Run, Value
from mambabyte.errors import UserError

# Units of what a machine's state moves. Counts of tensors or parameters are not among them.
_COSTS = ("s", "ms", "us", "second", "hour", "J", "kJ", "joule", "B", "kB", "MB", "GB", "byte",
          "MiB", "GiB", "W")
CONTROL_TOLERANCE = 0.03  # relative difference of a control that two commands may show


def is_cost(unit: str) -> bool:
    """Whether a unit is of time, energy or memory, or a rate of one: "ms", "J/MB", "bytes/s"."""
    parts = unit.replace("/", " ").replace("per", " ").split()
    if parts and parts[0].startswith("bit"):  # bits a byte are quality
        return False
    return any(part in _COSTS or part.rstrip("s") in _COSTS for part in parts)


@dataclass(frozen=True)
class Job:
    """Where a number was measured: the command's identity and the machine's, and its controls."""

    id: str
    host: str = ""
    controls: Mapping[str, float] | None = None  # name -> what was measured beside, in this job

    def same(self, other: Job) -> bool:
        """One command, or commands on one machine whose controls agree."""
        if self.id == other.id:
            return True
        shared = (self.controls or {}).keys() & (other.controls or {}).keys()
        return bool(self.host and self.host == other.host and shared) and all(
            abs(self.controls[c] / other.controls[c] - 1) <= CONTROL_TOLERANCE  # type: ignore[index]
            for c in shared)


def job_of(run: Run) -> Job:
    """The job of a run or record. One from before there were identities is a job by itself."""
    given = run.provenance.get("job")
    name = run.run_id or run.folder.name
    if not isinstance(given, Mapping):
        return Job(name)
    return Job(str(given.get("id", name)), str(given.get("host", "")), given.get("controls"))


class Quantity(float):
    """A number with its unit, its job and its name: ``a / b`` raises where it is no comparison."""

    unit: str
    job: Job
    name: str

    def __new__(cls, value: float, unit: str, job: Job, name: str) -> Quantity:
        made = super().__new__(cls, value)
        made.unit, made.job, made.name = unit, job, name
        return made

    def __truediv__(self, other: Any) -> float:
        check_ratio(self, other)
        return float(self) / float(other)

    def __rtruediv__(self, other: Any) -> float:
        check_ratio(other, self)
        return float(other) / float(self)


def quantity(name: str, value: Value, run: Run) -> Any:
    """The value as a Quantity where it is a number of a cost; unchanged otherwise."""
    number = value.value
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not is_cost(value.unit):
        return number
    return Quantity(float(number), value.unit, job_of(run), name)


def check_ratio(a: Any, b: Any) -> None:
    """UserError where both are costs of different jobs."""
    if isinstance(a, Quantity) and isinstance(b, Quantity) and not a.job.same(b.job):
        raise UserError(f"{a.name} over {b.name}: a ratio of times, joules or bytes needs both in "
                        f"one job, and these are of {a.job.id} and {b.job.id}")


def ratio(a: Quantity, b: Quantity) -> float:
    """a / b; UserError unless both were measured in one job."""
    return a / b
