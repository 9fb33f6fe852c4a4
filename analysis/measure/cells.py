"""A sweep in cells: independent measurements, a file each, by workers that share a folder.

A *cell* has a ``name`` that says all that it depends on. What it measured is kept in NAME.json,
written whole or not at all; who works on it holds a lock that ends with its process. So a sweep is
its folder: it may be done in pieces, by several workers of one machine or of many, and what a
killed worker had begun is begun again. Which cells are wanted may depend on those that are done,
such as seeds at the best of several rates.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from glob import escape
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol, TypeVar

from mambabyte.config.files import make_dir, write_json
from mambabyte.config.owners import end_with, ended, only_one
from mambabyte.errors import NonFiniteError, UserError

POLL_SECONDS = 0.2
SAY_EVERY = 20  # cells between two lines of progress, where workers do not say them here


class Cell(Protocol):
    """One measurement, which pickles; ``name`` is that of its file."""

    @property
    def name(self) -> str: ...


C = TypeVar("C", bound=Cell)
Row = dict[str, Any]  # plain values, and in lists of rows what else was measured
Plan = Callable[[Sequence[Row]], Sequence[C]]  # rows that are done -> cells wanted, first first


def done_rows(folder: Path) -> list[Row]:
    """What is measured so far, in order of name; UserError for a file that is no row."""
    return list(_Folder(folder).rows().values())


def work(
    folder: Path, plan: Plan[C], do: Callable[[C], Mapping[str, Any]], *,
    until: float = math.inf, report: Callable[[str], None] = lambda line: None,
) -> None:
    """Do the cells that ``plan`` wants and nobody does, until all are done or it is ``until``, by
    ``time.time``: then no cell is begun.

    A cell that diverges is a result, with "status" saying so. Any other error is kept as a row as
    well, so that it can be seen, and raised: who starts again tries it once more.
    """
    make_dir(folder)
    kept = _Folder(folder)
    while time.time() < until:
        rows = kept.rows()
        wanted = [cell for cell in plan(list(rows.values())) if cell.name not in rows]
        if not wanted:
            return
        if not any(_do(folder, cell, do, report) for cell in _free(folder, wanted)):
            time.sleep(POLL_SECONDS)  # others do what is left; what they find may want more


def _free(folder: Path, cells: Sequence[C]) -> Iterator[C]:
    """Those without a living holder; asked one by one, as time passes between."""
    for cell in cells:
        lock = f"{cell.name}.lock"
        holders = folder.glob(f"{escape(lock)}.*")
        if not any(ended(path.name[len(lock) + 1:]) is False for path in holders):
            yield cell


def _do(
    folder: Path, cell: C, do: Callable[[C], Mapping[str, Any]], report: Callable[[str], None]
) -> bool:
    """Whether the cell was ours to do, and is done."""
    path = folder / f"{cell.name}.json"
    began = time.perf_counter()
    with ExitStack() as stack:
        try:
            stack.enter_context(only_one(folder / f"{cell.name}.lock", f"does {cell.name}"))
        except UserError:
            return False
        if path.exists():  # done by another between the look and the lock
            return True
        row: Row = {**vars(cell), "status": "done"}
        try:
            row |= do(cell)
        except NonFiniteError as error:
            row |= {"status": "diverged", "error": str(error)}
        except Exception as error:
            words = f"{type(error).__name__}: {str(error)[:500]}"
            write_json(path, row | {"status": "failed", "error": words})
            raise
        write_json(path, row | {"cell_seconds": round(time.perf_counter() - began, 3)})
    report(f"{cell.name}: {row['status']} in {time.perf_counter() - began:.1f} s")
    return True


class _Folder:
    """The rows of a folder; what was read once is not read again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._rows: dict[str, Row] = {}

    def rows(self) -> dict[str, Row]:
        for path in sorted(self.folder.glob("*.json")):
            if path.stem not in self._rows:
                try:
                    found = json.loads(path.read_text(encoding="utf-8"))
                except ValueError:
                    found = None
                if not isinstance(found, dict) or "status" not in found:
                    raise UserError(f"{path} is no row of a sweep: choose another folder, or "
                                    "remove the file")
                self._rows[path.stem] = found
        return self._rows


def forget_failed(folder: Path) -> None:
    """Let the cells that failed, for another reason than divergence, be tried again."""
    for name, row in _Folder(folder).rows().items():
        if row["status"] == "failed":
            (folder / f"{name}.json").unlink()


def share(
    folder: Path, worker: Callable[[str], None], places: Sequence[str],
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """``worker(place)`` for each of ``places``, such as GPUs, each in a process of its own; a place
    may be named more than once.

    ``worker`` calls ``work`` on ``folder``, and must pickle. A process that dies is started again,
    as an error of CUDA lasts as long as its process, unless it left no row. UserError then.
    """
    make_dir(folder)
    context = get_context("spawn")  # a forked child of a process that has used CUDA cannot use it
    running: dict[int, tuple[Any, int]] = {}  # process, and rows when it was started

    def count() -> int:
        return len(list(folder.glob("*.json")))

    def start(number: int) -> None:
        process = context.Process(target=_worker, args=(os.getpid(), worker, places[number]))
        process.start()
        running[number] = process, count()

    try:
        for number in range(len(places)):
            start(number)
        said = count()
        while running:
            time.sleep(POLL_SECONDS)
            if count() >= said + SAY_EVERY:
                said = count()
                report(f"{said} cells are done")
            for number, (process, before) in list(running.items()):
                if process.is_alive():
                    continue
                del running[number]
                ended = f"a worker of {places[number]} ended with status {process.exitcode}"
                if process.exitcode and count() == before:
                    raise UserError(f"{ended} before its first cell: see above what it said")
                if process.exitcode:
                    report(f"{ended}: another")
                    start(number)
    finally:
        for process, _ in running.values():
            process.terminate()


def _worker(parent: int, worker: Callable[[str], None], place: str) -> None:
    end_with(parent)
    worker(place)
