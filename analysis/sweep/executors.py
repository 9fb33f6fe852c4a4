"""Where runs are executed: here one by one, here several at once, on a dask cluster, on Slurm.

Each is a ``concurrent.futures.Executor`` to which the sweep submits ``run_task``; each run is a
fresh process of its own, wherever it runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

from analysis.sweep.execute import ROOT, Task
from mambabyte.config.files import cache_dir
from mambabyte.errors import UserError

EXECUTORS = {
    "serial": "one run after another on this machine, so that timings do not disturb each other",
    "local": "several runs at once on this machine (workers)",
    "dask": "a dask.distributed cluster: address of its scheduler, or a cluster on this machine",
    "slurm": "Slurm through submitit; address is the partition",
}


def make_executor(name: str = "serial", workers: int = 1, address: str = "") -> Executor:
    """The executor of that name; UserError where it is unknown or its package is missing."""
    if workers < 1:
        raise UserError(f"workers is {workers}: it must be at least 1")
    if name == "serial":
        return LocalExecutor(1)
    if name == "local":
        return LocalExecutor(workers)
    if name == "dask":
        return DaskExecutor(workers, address)
    if name == "slurm":
        return SlurmExecutor(address)
    raise UserError(f"there is no executor {name!r}: choose {', '.join(EXECUTORS)}")


def run_task(task: Task, started: Callable[[subprocess.Popen[str]], None] | None = None) -> None:
    """Executes a task in a fresh process; RuntimeError with its last words when that died."""
    process = subprocess.Popen(
        [sys.executable, "-m", "analysis.sweep.execute", str(os.getpid())], text=True, cwd=task.cwd,
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        # Its own session: a Ctrl-C reaches the sweep alone, which then ends its runs in order.
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(
            p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)},
    )
    if started:
        started(process)
    _, errors = process.communicate(task.to_json())
    if process.returncode:
        words = errors.strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
        raise RuntimeError(f"the worker process ended early: {words[0]}")


class LocalExecutor(Executor):
    """At most ``workers`` processes on this machine; shutdown with cancel_futures ends them."""

    def __init__(self, workers: int) -> None:
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="run")
        self._processes: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        if fn is run_task:
            kwargs = {**kwargs, "started": self._remember}
        return self._threads.submit(fn, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        if cancel_futures:
            with self._lock:
                self._stopped = True
                for process in self._processes:
                    process.terminate()
        self._threads.shutdown(wait, cancel_futures=cancel_futures)

    def _remember(self, process: subprocess.Popen[str]) -> None:
        with self._lock:
            self._processes.add(process)
            if self._stopped:
                process.terminate()


class SlurmExecutor(Executor):
    """Submits each run as a Slurm job and polls for its end. The run folders must be shared."""

    def __init__(self, partition: str = "", poll_seconds: float = 2.0) -> None:
        try:
            import submitit
        except ModuleNotFoundError:
            raise _missing("slurm", "submitit") from None
        self._submitit = submitit.AutoExecutor(folder=cache_dir() / "submitit")
        if partition:
            self._submitit.update_parameters(slurm_partition=partition)
        self._poll_seconds = poll_seconds
        self._jobs: list[Any] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        job = self._submitit.submit(fn, *args, **kwargs)
        self._jobs.append(job)
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        threading.Thread(target=self._wait, args=(job, future), daemon=True).start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        for job in self._jobs:
            if cancel_futures and not job.done():
                job.cancel()

    def _wait(self, job: Any, future: Future[Any]) -> None:
        try:
            while not job.done():
                time.sleep(self._poll_seconds)
            future.set_result(job.result())
        except Exception as error:  # submitit's own, e.g. a job killed by the scheduler
            future.set_exception(error)


class DaskExecutor(Executor):
    """A dask cluster, that of ``address`` or one of its own. The run folders must be shared."""

    def __init__(self, workers: int, address: str = "") -> None:
        try:
            from distributed import Client
        except ModuleNotFoundError:
            raise _missing("dask", "distributed") from None
        self._client = Client(address) if address else Client(
            n_workers=workers, threads_per_worker=1, dashboard_address=None)
        # Each call is a run: the same arguments do not make it the same result.
        self._executor = self._client.get_executor(pure=False)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = self._executor.submit(fn, *args, **kwargs)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._executor.shutdown(wait=wait and not cancel_futures)
        self._client.close()


def _missing(name: str, package: str) -> UserError:
    return UserError(f"the executor {name!r} needs the package {package}: pip install {package}, "
                     "or use --executor serial or local")
