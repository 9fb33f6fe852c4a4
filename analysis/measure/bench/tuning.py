"""Kernels of others that tune themselves (Triton's), in a bounded time.

Such a tuner compiles each of its settings and times it, one after the other, whenever a kernel is
called with a new key of sizes: with some 140 settings of one operator that takes ten minutes. Here
its settings are compiled ahead, a process each, those are left out that are not done in time, and
what was chosen for one size is carried over to others.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import operator
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

WARM_MS, TIMED_MS = 5, 20  # a setting is timed for so long; Triton itself takes 25 and 100
_POLL = 0.01  # seconds


class _Carried(dict[Any, Any]):
    """What a tuner chose by key; for a new key what it chose for the one most like it."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: Sequence[object]) -> Any:
        return self[max(self, key=lambda known: sum(map(operator.eq, known, key)))]


def _tuners() -> list[Any]:
    """Triton's tuners that have chosen something."""
    if importlib.util.find_spec("triton") is None:
        return []
    from triton.runtime.autotuner import Autotuner

    return [it for it in gc.get_objects() if issubclass(type(it), Autotuner) and it.cache]


def carry_tuning() -> Callable[[], None]:
    """From here on tuners take for new sizes what they chose for others; until what comes back is
    called."""
    tuned = [(tuner, tuner.cache) for tuner in _tuners()]
    for tuner, cache in tuned:
        tuner.cache = _Carried(cache)

    def end() -> None:
        for tuner, cache in tuned:
            tuner.cache = cache

    return end


def chosen_settings() -> list[dict[str, str]]:
    """What tuners chose so far: kernel, sizes that it is chosen by, setting."""
    return sorted(({"kernel": tuner.base_fn.__name__, "sizes": str(key), "setting": str(setting)}
                   for tuner in _tuners() for key, setting in tuner.cache.items()),
                  key=lambda row: tuple(row.values()))


@contextmanager
def bounded_tuning(seconds: float) -> Iterator[Callable[[], tuple[int, int]]]:
    """Tuners compile for so long in all, then go by what is done, at least one setting each; what
    comes back says (how many settings there were, how many of them were not done in time)."""
    if importlib.util.find_spec("triton") is None:
        yield lambda: (0, 0)
        return
    import triton.testing
    from triton.runtime.autotuner import Autotuner

    choose, timer, left = Autotuner.prune_configs, Autotuner.do_bench, seconds
    met: list[Any] = []
    late: list[Any] = []

    def in_time(self: Any, meta: dict[str, Any]) -> list[Any]:
        nonlocal left
        configs, began = choose(self, meta), time.monotonic()
        compiled = compiled_ahead(
            [functools.partial(self.fn.run, *self.nargs.values(),
                               **{**meta, **it.all_kwargs(), "warmup": True}) for it in configs],
            began + left)
        left -= time.monotonic() - began
        met.extend(configs)
        late.extend(it for it, done in zip(configs, compiled, strict=True) if done is None)
        # None runs: the caller is to see why.
        return [it for it, done in zip(configs, compiled, strict=True) if done] or configs[:1]

    Autotuner.prune_configs = in_time
    Autotuner.do_bench = property(lambda self: functools.partial(
        triton.testing.do_bench, warmup=WARM_MS, rep=TIMED_MS))
    try:
        yield lambda: (len(met), len(late))
    finally:
        Autotuner.prune_configs, Autotuner.do_bench = choose, timer


class _CompilersDriver:
    """What compiling asks of Triton's driver: a copy of a process must not touch the GPU."""

    def __init__(self, active: Any) -> None:
        self._target, self._device = active.get_current_target(), active.get_current_device()

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def compiled_ahead(compiles: Sequence[Callable[[], Any]], until: float) -> list[bool | None]:
    """Whether each kernel's code is in Triton's cache and fits the GPU's shared memory, after every
    one was compiled in a copy of this process, as many at a time as there are cores.

    What is not done at ``until``, by the monotonic clock, is given up, and None; but not before one
    is done.
    """
    from triton.runtime import driver

    instead = _CompilersDriver(driver.active)
    room = driver.active.utils.get_device_properties(instead.get_current_device())["max_shared_mem"]

    def compile_in_copy(compiles: Callable[[], Any]) -> int:
        with warnings.catch_warnings():
            # Copies of threaded processes may deadlock: here one would be given up in time.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child:
            return child
        status = 1
        try:
            os.setsid()  # ends together with the assembler that it started
            driver.set_active(instead)
            status = int(compiles().metadata.shared > room)
        finally:
            os._exit(status)

    done: list[bool | None] = [None] * len(compiles)
    waiting, running = list(range(len(compiles)))[::-1], dict[int, int]()
    cores = len(os.sched_getaffinity(0))
    try:
        while running or waiting:
            over = time.monotonic() > until
            # Beyond the time one must be found, and those that run may never end.
            while waiting and (over or len(running) < cores):
                number = waiting.pop()
                running[compile_in_copy(compiles[number])] = number
            for child in list(running):
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    done[running.pop(child)] = status == 0
            if over and any(done):
                break
            time.sleep(_POLL)
    finally:
        for child in running:
            try:
                os.killpg(child, signal.SIGKILL)
            except ProcessLookupError:  # it has not come to lead a group yet
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return done
