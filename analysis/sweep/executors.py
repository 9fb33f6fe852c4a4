"""Where runs are executed: here one by one, here several at once, on a dask cluster, on Slurm.

Each is a ``concurrent.futures.Executor`` to which the sweep submits ``run_task``; each run is a
fresh process of its own, wherever it runs. A run whose worker or job is lost is started again, at
most LOST times.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from analysis.sweep.execute import ROOT, Task
from mambabyte.config.files import cache_dir
from mambabyte.errors import UserError

_LOG = logging.getLogger(__name__)
EXECUTORS = {
    "serial": "one run after another on this machine, so that timings do not disturb each other",
    "local": "several runs at once on this machine (workers); studies that are timed run alone",
    "dask": "a dask.distributed cluster: address of its scheduler, or a cluster on this machine",
    "slurm": "Slurm through submitit; address is the partition, or options of sbatch",
}
LOST = 3
SLURM_MINUTES = 24 * 60  # for a run, where nothing else is said
# Ends of a job that another attempt would come to again.
_FOR_GOOD = ("TIMEOUT", "OUT_OF_MEMORY", "CANCELLED")


def make_executor(name: str = "serial", workers: int = 1, address: str = "") -> Executor:
    """The executor of that name; UserError where it is unknown or its package is missing."""
    if workers < 1:
        raise UserError(f"workers is {workers}: it must be at least 1")
    if address and name in ("serial", "local"):
        raise UserError(f"address {address!r} is for the executors dask and slurm: {name} runs on "
                        "this machine")
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
    if not Path(task.cwd).is_dir():
        raise RuntimeError(f"{task.cwd} is not on {platform.node()}: workers need the same folders "
                           "as the sweep")
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
        user, found, words_of_it = words[0].rpartition(f"{UserError.__name__}: ")
        raise RuntimeError(words_of_it if found and user == f"{UserError.__module__}." else
                           f"the worker process ended early: {words[0]}")


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
    """Submits each run as a Slurm job and polls for its end. The run folders must be shared.

    ``settings`` is a partition, or options of sbatch as submitit names them, ``partition=gpu,
    gpus_per_node=1,time=720``. ``cluster`` is submitit's word: "local" makes processes here.
    """

    def __init__(
        self, settings: str = "", poll_seconds: float = 2.0, cluster: str = "slurm"
    ) -> None:
        try:
            import submitit
        except ModuleNotFoundError:
            raise _missing("slurm", "submitit") from None
        if cluster == "slurm" and not shutil.which("sbatch"):
            raise UserError("there is no sbatch here: start the sweep where Slurm's commands are, "
                            "or use --executor dask, local or serial")
        self._submitit = submitit.AutoExecutor(folder=cache_dir() / "submitit", cluster=cluster)
        try:
            self._submitit.update_parameters(**slurm_parameters(settings))
        except NameError as error:
            raise UserError(f"--address {settings}: {str(error).splitlines()[0]}") from None
        self._poll_seconds = poll_seconds
        self._jobs: list[Any] = []
        self._stopped = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()

        def start() -> Any:
            job = self._submitit.submit(fn, *args, **kwargs)
            self._jobs.append(job)
            return job

        threading.Thread(target=self._wait, args=(start(), start, future), daemon=True).start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._stopped = cancel_futures
        for job in list(self._jobs):
            if cancel_futures and not job.done():
                job.cancel()

    def _wait(self, job: Any, start: Callable[[], Any], future: Future[Any]) -> None:
        try:
            for attempt in range(LOST + 1):
                while not job.done():
                    time.sleep(self._poll_seconds)
                error = job.exception()
                # A result is there, if only an exception's, or the job is lost.
                lost = error is not None and not job.paths.result_pickle.exists()
                if not lost or attempt == LOST or self._stopped or job.state.startswith(_FOR_GOOD):
                    break
                job = start()
            if error is None:
                future.set_result(job.result())
            else:
                future.set_exception(error)
        except Exception as failure:  # of the file system or of Slurm's commands
            future.set_exception(failure)


def slurm_parameters(settings: str) -> dict[str, Any]:
    """submitit's parameters, of ``partition`` or ``name=value,name=value``; whole numbers as such.
    UserError for what is neither."""
    found: dict[str, Any] = {"slurm_time": SLURM_MINUTES}
    for part in filter(None, settings.split(",")):
        name, equal, value = part.strip().partition("=")
        if not equal:
            name, value = "partition", name
        if not name or not value:
            raise UserError(f"--address {settings}: expected a partition, or name=value,..., as "
                            "partition=gpu,gpus_per_node=1,time=720 (minutes)")
        found[f"slurm_{name}"] = int(value) if value.isdigit() else value
    return found


class DaskExecutor(Executor):
    """A dask cluster, that of ``address`` or one of its own. The run folders must be shared."""

    def __init__(self, workers: int, address: str = "") -> None:
        try:
            from distributed import Client
        except ModuleNotFoundError:
            raise _missing("dask", "distributed") from None
        try:
            # Any free port for its page: of the usual one a second cluster warns that it is taken.
            self._client = Client(address) if address else Client(
                n_workers=workers, threads_per_worker=1, dashboard_address=":0")
        except (OSError, ValueError, TimeoutError) as error:
            raise UserError(f"no dask scheduler answers at {address!r} ({error}): give the address "
                            "that `dask scheduler` prints, such as tcp://host:8786") from None
        if address and not self._client.scheduler_info()["workers"]:
            _LOG.warning("note: the scheduler at %s has no worker yet; runs begin when one comes "
                         "(dask worker %s --nthreads 1)", address, address)
        # Each call is a run: the same arguments do not make it the same result. What else fails
        # than a lost worker, whose runs dask starts again, fails for good.
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
