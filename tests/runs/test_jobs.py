"""No ratio of times, joules or bytes of two jobs, wherever it is asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from analysis.report.prose import Prose, Sources
from analysis.runs.folders import Run, Value
from analysis.runs.jobs import Job, Quantity, is_cost, job_of, quantity, ratio
from mambabyte.config import provenance
from mambabyte.errors import UserError


def record(name: str, job: str | None, **values: Value) -> Run:
    given = {} if job is None else {"job": {"id": job, "host": "h"}}
    return Run(folder=Path(f"{name}.json"), study="throughput", parameters={}, run_id=name,
               values=values, provenance=given)


def ms(value: float, job: str = "one", host: str = "", **controls: float) -> Quantity:
    return Quantity(value, "ms", Job(job, host, controls), f"{job}.ms")


def test_both_sides_of_one_job_have_a_ratio() -> None:
    assert ratio(ms(6.0), ms(2.0)) == 3.0
    assert ms(6.0) / 2 == 3.0  # a plain number is no measurement
    with pytest.raises(UserError, match="one job"):
        ratio(ms(6.0), ms(2.0, "two"))


def test_commands_on_one_machine_count_with_a_control_in_each() -> None:
    first = ms(6.0, "one", "h", copy=1.00)
    assert ratio(first, ms(2.0, "two", "h", copy=1.02)) == 3.0
    for other in (ms(2.0, "two", "h", copy=1.10),  # the control moved
                  ms(2.0, "two", "h"),  # none
                  ms(2.0, "two", "g", copy=1.00),  # another machine
                  ms(2.0, "two", "", copy=1.00)):
        with pytest.raises(UserError):
            ratio(first, other)


@pytest.mark.parametrize(("unit", "cost"), [
    ("ms", True), ("J/MB", True), ("bytes/s", True), ("GB", True), ("bytes a second", True),
    ("bits/byte", False), ("claims", False), ("", False), ("parameters", False)])
def test_units_that_are_costs(unit: str, cost: bool) -> None:
    assert is_cost(unit) == cost


def test_values_of_other_kinds_stay_as_they_are() -> None:
    run = record("a", "one")
    assert quantity("a.x", Value(True, "ms"), run) is True
    assert quantity("a.x", Value("fast", "ms"), run) == "fast"
    assert not isinstance(quantity("a.x", Value(3.0, "claims"), run), Quantity)
    assert job_of(record("old", None)).id == "old"


def test_a_page_cannot_print_a_ratio_of_two_jobs() -> None:
    records = {"a": record("a", "one", t=Value(6.0, "ms"), u=Value(2.0, "ms")),
               "b": record("b", "two", t=Value(3.0, "ms"))}
    prose = Prose(Sources({}, records, {}), {})
    same = prose.render("{{ (record('a.t') / record('a.u')) | times(1) }}", "page", prefix="p")
    assert "3.0" in same
    with pytest.raises(UserError, match=r"page: a\.t over b\.t"):
        prose.render("{{ (record('a.t') / record('b.t')) | times(1) }}", "page", prefix="p")


def test_every_command_is_a_job_of_its_own() -> None:
    code = "from mambabyte.config.provenance import job; print(job()['id'], job()['id'])"
    first, again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                                  check=True).stdout.split()
    assert first == again != provenance.job()["id"]
    assert provenance.provenance()["job"] == provenance.job()
