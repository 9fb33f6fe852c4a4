"""Jobs beside each other: the same results, in the same order, and errors that arrive."""

from __future__ import annotations

import os
import time
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

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
def test_the_end_of_each_job_is_told(workers: int) -> None:
    told: list[tuple[int, int]] = []
    list(run_jobs(_square, [(x,) for x in range(4)], workers, lambda *n: told.append(n)))
    assert told[-1] == (4, 4)
    assert told == sorted(set(told))
    assert len(told) == 4 or workers > 1  # two may end between two looks


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_a_job_is_raised(workers: int) -> None:
    with pytest.raises(ValueError, match="-1 is negative"):
        list(run_jobs(_square, [(1,), (-1,)], workers=workers))


def _mark(folder: str, number: int) -> None:
    """The first job fails; others go on until the last one has been cancelled."""
    begun = Path(folder) / "begun"
    (begun / str(number)).touch()
    if number == 0:
        raise ValueError("the first one fails")
    for _ in range(6000):
        if (begun.parent / "ended").exists():
            return
        time.sleep(0.01)


def test_what_waits_behind_an_error_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "begun").mkdir()
    submit = ProcessPoolExecutor.submit

    def submitted(pool: ProcessPoolExecutor, *job: Any) -> Future[None]:
        future = submit(pool, *job)
        if job[-1] == 11:  # done when it is cancelled
            future.add_done_callback(lambda _: (tmp_path / "ended").touch())
        return future

    monkeypatch.setattr(ProcessPoolExecutor, "submit", submitted)
    with pytest.raises(ValueError, match="first"):
        list(run_jobs(_mark, [(str(tmp_path), n) for n in range(12)], workers=2))
    # The first, one beside it, and those already handed over: one more than there are workers.
    assert len(list((tmp_path / "begun").iterdir())) <= 2 + 3
