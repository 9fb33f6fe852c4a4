"""Drawings of a report, kept in the cache: one is made again only where its numbers, the study's
``figures`` or matplotlib have changed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from typing import Any

import matplotlib as mpl

from analysis.plots.svg import wide_and_narrow
from analysis.runs import staleness
from analysis.runs.kept import kept, lacks
from analysis.studies import Study
from analysis.studies.drawing import Figure

KIND = "drawings"  # in the cache
FEWEST = 6  # drawings for which processes are begun, each of which takes the time of one
MOST = 8  # processes: each reads pandas and matplotlib, a fifth of a gigabyte


def draw_ahead(
    wanted: Iterable[tuple[Figure, Study | None, str]],
    report: Callable[[float], None] = lambda done: None,
) -> None:
    """Put drawings into the cache, where :func:`drawn` with the same arguments finds them, by as
    many processes as there are cores. What is few, or cannot be kept, is left to :func:`drawn`, and
    so is what fails, as it is said there where it stands."""
    missing = {}
    for figure, study, anchor in wanted:
        key = _key(figure, study, anchor)
        if lacks(KIND, key):
            missing[key] = figure.draw, anchor
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if len(missing) < FEWEST or (cores or 1) < 2:
        return
    pool = ProcessPoolExecutor(min(cores or 1, MOST), mp_context=get_context("spawn"))
    try:
        tasks = {key: pool.submit(_draw, *job) for key, job in missing.items()}
        for number, (key, work) in enumerate(tasks.items(), 1):
            if work.exception() is None:
                kept(KIND, key, work.result)
            report(number / len(tasks))
    finally:
        pool.shutdown(cancel_futures=True)


def _draw(draw: Callable[[], Any], anchor: str) -> tuple[str, str]:
    return wide_and_narrow(draw(), anchor)


def drawn(figure: Figure, study: Study | None, anchor: str) -> tuple[str, str]:
    """SVG of a figure, wide and for a phone; ``anchor`` tells its ids from those of others, and
    ``study`` is whose drawing it is, None for one of this package."""
    wide, narrow = kept(KIND, _key(figure, study, anchor),
                        lambda: wide_and_narrow(figure.draw(), anchor))
    return wide, narrow


def _key(figure: Figure, study: Study | None, anchor: str) -> str:
    given = repr((mpl.__version__, _code(study), anchor, figure.key()))
    return hashlib.sha256(given.encode()).hexdigest()


@cache
def _code(study: Study | None) -> str:
    drawing = f"{study.package}.figures" if study else "analysis.plots.comparisons"
    root = study.root if study else staleness.ROOT
    files = staleness.source_files([drawing, "analysis.plots.svg"], root)
    total = hashlib.sha256()
    for path in files:
        total.update(path.read_bytes())
    return total.hexdigest()
