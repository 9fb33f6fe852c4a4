"""A sweep in cells: each once, whoever works on it, whatever ended the last one."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from analysis.measure.cells import done_rows, forget_failed, share, work
from mambabyte.config.owners import tag
from mambabyte.errors import NonFiniteError, UserError


@dataclass(frozen=True)
class Cell:
    n: int

    @property
    def name(self) -> str:
        return f"cell-{self.n}"


def first_three(rows):
    return [Cell(n) for n in range(3)]


def test_each_cell_is_done_once_in_order_and_kept(tmp_path):
    done: list[int] = []

    def do(cell):
        done.append(cell.n)
        return {"square": cell.n**2}

    work(tmp_path, first_three, do)
    work(tmp_path, first_three, do)
    assert done == [0, 1, 2]
    rows = done_rows(tmp_path)
    assert [(row["n"], row["square"], row["status"]) for row in rows] == [
        (0, 0, "done"), (1, 1, "done"), (2, 4, "done")]
    assert {path.suffix for path in tmp_path.iterdir()} == {".json"}  # no lock is left


def test_what_is_wanted_may_follow_from_what_is_done(tmp_path):
    def plan(rows):
        best = max((row["value"] for row in rows), default=0)
        return [*first_three(rows), *([Cell(10 * best)] if len(rows) >= 3 and best < 100 else [])]

    work(tmp_path, plan, lambda cell: {"value": cell.n})
    assert sorted(row["n"] for row in done_rows(tmp_path)) == [0, 1, 2, 20, 200]


def test_no_cell_is_begun_after_the_end(tmp_path):
    work(tmp_path, first_three, lambda cell: {}, until=0.0)
    assert done_rows(tmp_path) == []


def test_divergence_is_a_result_and_an_error_is_seen_and_tried_again(tmp_path):
    broken = True

    def do(cell):
        if cell.n == 0:
            raise NonFiniteError("loss is nan")
        if cell.n == 1 and broken:
            raise RuntimeError("out of memory")
        return {}

    def states():
        return [row["status"] for row in done_rows(tmp_path)]

    with pytest.raises(RuntimeError, match="out of memory"):
        work(tmp_path, first_three, do)
    assert states() == ["diverged", "failed"]
    broken = False
    forget_failed(tmp_path)
    work(tmp_path, first_three, do)
    assert states() == ["diverged", "done", "done"]


def test_the_lock_of_a_killed_worker_is_nobodys_and_that_of_a_living_one_is_kept(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", "from mambabyte.config.owners import tag; print(tag())"],
        capture_output=True, text=True, check=True).stdout.strip()
    (tmp_path / f"cell-0.lock.{ended}").touch()
    living = tmp_path / f"cell-1.lock.{tag()}"
    living.touch()
    looks = 0

    def plan(rows):
        nonlocal looks
        looks += 1
        if looks == 4:  # whoever has it gives it up
            living.unlink()
        return first_three(rows)

    work(tmp_path, plan, lambda cell: {})
    assert [row["n"] for row in done_rows(tmp_path)] == [0, 1, 2]
    assert looks >= 4


@pytest.mark.parametrize("text", ["{", "[]", '{"n": 1}'])
def test_a_file_that_is_no_row_is_named(tmp_path, text):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(UserError, match=r"other\.json is no row of a sweep"):
        work(tmp_path, first_three, lambda cell: {})


def _one_then_gone(folder: Path, place: str) -> None:
    """One more cell than are done, then the end of the process, as after an error of its GPU."""
    more = len(done_rows(folder)) + 1
    work(folder, lambda rows: first_three(rows)[:more], lambda cell: {"place": place})
    if more < 3:
        os._exit(7)


def _dies_at_once(folder: Path, place: str) -> None:
    os._exit(3)


@pytest.mark.long
def test_a_worker_that_died_is_started_again_and_does_the_rest(tmp_path):
    said: list[str] = []
    share(tmp_path, partial(_one_then_gone, tmp_path), ["gpu"], said.append)
    assert [row["n"] for row in done_rows(tmp_path)] == [0, 1, 2]
    assert len([line for line in said if "ended with status 7: another" in line]) == 2


def test_a_worker_that_cannot_begin_is_an_error(tmp_path):
    with pytest.raises(UserError, match="ended with status 3 before its first cell"):
        share(tmp_path, partial(_dies_at_once, tmp_path), ["gpu"])
