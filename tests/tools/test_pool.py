"""Jobs beside each other: the same results, in the same order, and errors that arrive."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from analysis.measure.parallel import run_jobs


def _square(x: int) -> tuple[int, int]:
    if x < 0:
        raise ValueError(f"{x} is negative")
    return x * x, os.getpid()


def test_results_come_in_the_order_of_the_jobs() -> None:
    inline = list(run_jobs(_square, [(x,) for x in range(5)]))
    beside = list(run_jobs(_square, [(x,) for x in range(5)], workers=2))
    assert [r for r, _ in inline] == [r for r, _ in beside] == [0, 1, 4, 9, 16]
    assert {pid for _, pid in inline} == {os.getpid()}
    assert os.getpid() not in {pid for _, pid in beside}


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_a_job_is_raised(workers: int) -> None:
    with pytest.raises(ValueError, match="-1 is negative"):
        list(run_jobs(_square, [(1,), (-1,)], workers=workers))


def _mark(folder: str, number: int) -> None:
    (Path(folder) / str(number)).touch()
    if number == 0:
        raise ValueError("the first one fails")
    time.sleep(0.5)


def test_what_waits_behind_an_error_is_not_begun(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="first"):
        list(run_jobs(_mark, [(str(tmp_path), n) for n in range(12)], workers=2))
    assert len(list(tmp_path.iterdir())) < 12
