"""Independent jobs, in turn or in processes of their own.

A small model leaves a GPU idle between its launches, so a dozen trainings beside each other take
little longer than one. Nothing that is timed may run this way.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing import get_context
from typing import Any, TypeVar

T = TypeVar("T")


def run_jobs(
    function: Callable[..., T], jobs: Iterable[tuple[Any, ...]], workers: int = 1,
    ended: Callable[[int, int], None] = lambda done, of: None,
) -> Iterator[T]:
    """``function(*job)`` of every job, in the order of the jobs; each as soon as it is there.

    With more than one of ``workers`` every job runs in a new process, so function, arguments and
    result must pickle. What a job raises is raised here. ``ended`` is told how many jobs have
    ended, of how many, in whatever order they do.
    """
    if workers <= 1:
        given = list(jobs)
        for done, job in enumerate(given, start=1):
            found = function(*job)
            ended(done, len(given))
            yield found
        return
    # A forked child of a process that has used CUDA cannot use it: each is forked from a server
    # that has used nothing, and reads the function's module, torch with it, once for all.
    served = sys.platform == "linux"  # elsewhere what torch has loaded may not survive a fork
    context = get_context("forkserver" if served else "spawn")
    if served:
        context.set_forkserver_preload([function.__module__])
    pool = ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1)
    try:
        futures = [pool.submit(function, *job) for job in jobs]
        pending = set(futures)
        for future in futures:
            while future in pending:
                _, pending = wait(pending, return_when=FIRST_COMPLETED)
                ended(len(futures) - len(pending), len(futures))
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)
