"""Kernels that tune themselves, held to one setting each while their numbers are looked at.

Triton's tuners compile and time every setting of a kernel, anew for each dtype and some sizes: of
libraries of twenty kernels that is minutes before the first number. A setting changes how fast a
kernel is, and what it computes by rounding alone, if it is right.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def _size(config: Any) -> int:
    """Of what a block of a setting holds at once: its extents, pipeline stages and warps."""
    sizes = [v for v in config.kwargs.values() if isinstance(v, int) and v > 0]
    return math.prod(sizes) * (config.num_stages or 1) * (config.num_warps or 1)


@contextmanager
def one_setting() -> Iterator[dict[str, str]]:
    """Triton's tuners take the smallest setting that the device runs, untimed: it compiles soonest
    and asks for the least shared memory. What comes back is filled with the settings by kernel.

    What a tuner chose before is left to it, and what it takes here is forgotten at the end, on disk
    too.
    """
    taken: dict[str, str] = {}
    if importlib.util.find_spec("triton") is None:
        yield taken
        return
    from triton.runtime.autotuner import Autotuner

    before: dict[Any, dict[Any, Any]] = {}
    settled: set[Any] = set()

    def smallest_first(self: Any, kwargs: Any) -> list[Any]:
        before.setdefault(self, dict(self.cache))
        settled.discard(self)  # a new round, of a dtype or a size that it has not seen
        return sorted(original["prune_configs"](self, kwargs), key=_size)

    def untimed(self: Any, *args: Any, config: Any, **meta: Any) -> list[float]:
        if self in settled:
            return [math.inf] * 3
        timed, self.do_bench = self.do_bench, _run_once
        try:
            found = original["_bench"](self, *args, config=config, **meta)
        finally:
            self.do_bench = timed
        if math.isfinite(found[0]):  # else it asked for more than the device has
            settled.add(self)
            taken[self.base_fn.__name__] = str(config)
        return found

    def not_on_disk(self: Any, key: Any, configs: Any, bench: Any) -> bool:
        bench()
        return False

    ours = {"prune_configs": smallest_first, "_bench": untimed, "check_disk_cache": not_on_disk}
    original = {name: getattr(Autotuner, name) for name in ours if hasattr(Autotuner, name)}
    for name in original:
        setattr(Autotuner, name, ours[name])
    try:
        yield taken
    finally:
        for name, method in original.items():
            setattr(Autotuner, name, method)
        for tuner, cache in before.items():
            tuner.cache = cache


def _run_once(call: Any, quantiles: Any) -> list[float]:
    call()
    return [0.0] * len(quantiles)
