"""Timing on a machine that others use too: interleaved rounds, medians, and a guard a point.

The one engine of all timings of this project, from the bottom up: ``seconds_of`` and
``device_seconds_of`` time one call, ``in_turns`` times several in interleaved rounds, so that a
slow minute spreads over all of them instead of bending one curve, ``quartiles`` is what is
reported, and ``measure`` is all of that for cases of growing length.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.profiler import profile

from mambabyte.energy import EnergyMeter
from mambabyte.errors import UserError

K = TypeVar("K")
MEASURED = "measured"
SAY_SECONDS = 2.0  # between lines of progress
LONG = 0.2  # seconds: a call in which what memory takes does not show
GRAPH = "cuda graph"
CHUNK_SECONDS = 0.01  # between two looks at a counter of energy
COUNTER_WAIT = 2.0  # seconds: longer than any counter stands still


@dataclass
class Case:
    """One thing to time. ``make`` builds the inputs (not timed) and returns the timed call.

    Cases of one ``series`` differ in ``length`` alone and are given in rising order; after the
    guard has stopped a series, its longer cases are skipped.
    """

    series: tuple[Any, ...]
    length: int
    make: Callable[[], Callable[[], object]]
    labels: dict[str, Any]
    seconds: list[float] = field(default_factory=list)
    status: str = MEASURED
    timed_as: str | None = None
    joules: float | None = None


def measure(
    cases: Sequence[Case], *, rounds: int, guard_seconds: float, device: str = "cpu",
    least_seconds: float = 2e-3, report: Callable[[str], None] = lambda line: None,
    capture: bool = False, energy_seconds: float = 0.0,
) -> pd.DataFrame:
    """Time every case; one row each with labels, length, ms (median), quartiles, joules a call, how
    it was timed (``captured``'s word, None without ``capture``) and status.

    Two calls come first. They warm up and feed the guard: when the next case of the series is
    predicted to take more than ``guard_seconds`` a call (in proportion to the length), the series
    ends there. With ``capture`` a call on a GPU is timed as one captured graph where it can be
    (see ``captured``), which leaves the host's part out; the guard goes by what it takes without.
    A call shorter than ``least_seconds`` is repeated inside one timing. Out of memory ends a
    series too. In the last round each case runs for ``energy_seconds`` more beside the machine's
    counter of energy (see ``joules_of``). ``ms`` and ``joules`` are None for what was not measured.
    """
    if rounds < 1:
        raise UserError(f"rounds is {rounds}: it must be at least 1")
    said = Said(report)
    first = _warm_up(cases, guard_seconds, device, capture, said)  # seconds of a first call
    metered = energy_seconds > 0 and EnergyMeter(device).read().joules is not None
    inner = {i: max(1, min(50, int(least_seconds / max(took, 1e-7)))) for i, took in first.items()}

    def once(i: int, last: bool) -> float:
        call, graph = cases[i].make(), False
        if capture:
            call, how = captured(call, device)
            graph = how == GRAPH
        # Memory is taken outside the clock, where taking it would show; a graph has its own.
        if not graph and (inner[i] > 1 or (device != "cpu" and first[i] < LONG)):
            call()
        took = seconds_of(call, device, inner[i])
        if metered and last:
            cases[i].joules = joules_of(call, energy_seconds, device)
        del call
        _make_room(device)
        return took

    rng = np.random.default_rng(0)
    for number in range(rounds):
        order = rng.permutation(list(first)).tolist()
        last = number + 1 == rounds
        took = in_turns(
            {i: partial(once, i, last) for i in order}, 1,
            each=lambda done, number=number: said(  # type: ignore[misc]
                f"round {number + 1} of {rounds}: {done} of {len(first)} points"))
        for i, samples in took.items():
            cases[i].seconds += samples
        report(f"round {number + 1} of {rounds}: {len(first)} points")
    return pd.DataFrame([_row(case) for case in cases])


class Said:
    """Passes a line on where the last one is SAY_SECONDS old."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self.report, self.at = report, time.perf_counter()

    def __call__(self, line: str) -> None:
        if time.perf_counter() - self.at > SAY_SECONDS:
            self.at = time.perf_counter()
            self.report(line)


def _warm_up(
    cases: Sequence[Case], guard_seconds: float, device: str, capture: bool, said: Said
) -> dict[int, float]:
    """Call every case once or twice; seconds of those that are to be timed, by their index."""
    history: dict[tuple[Any, ...], list[tuple[int, float]]] = {}
    stopped: dict[tuple[Any, ...], str] = {}
    first: dict[int, float] = {}
    for i, case in enumerate(cases):
        said(f"trying {i + 1} of {len(cases)} points: {' '.join(map(str, case.series))}, "
             f"length {case.length}")
        if case.series in stopped:
            case.status = stopped[case.series]
            continue
        past = history.setdefault(case.series, [])
        if (predicted := _predict(past, case.length)) > guard_seconds:
            case.status = stopped[case.series] = (
                f"skipped: about {predicted:.1f} s a call, the guard is {guard_seconds:g} s")
            continue
        try:
            call = case.make()
            took = seconds_of(call, device)  # compiles, fills caches
            if took < guard_seconds or took > 4 * predicted:
                took = min(took, seconds_of(call, device))
            past.append((case.length, took))
            plain = call
            if capture:
                call, case.timed_as = captured(plain, device)
            if call is not plain:
                took = min(seconds_of(call, device), seconds_of(call, device))
        except (torch.OutOfMemoryError, MemoryError):
            case.status = stopped[case.series] = "out of memory"
            continue
        finally:
            call = plain = None  # type: ignore[assignment]
            _make_room(device)
        if case.status == MEASURED:
            first[i] = took
    return first


def in_turns(
    timings: Mapping[K, Callable[[], float]], counts: int | Mapping[K, int],
    each: Callable[[int], None] = lambda done: None,
    round_done: Callable[[int], None] = lambda number: None,
) -> dict[K, list[float]]:
    """Seconds of each of several timings, made in interleaved rounds.

    ``timings`` make one timing each and return its seconds; ``counts`` says how often, of all or of
    each: the fewer timings of a slow one are spread over all the rounds. ``each(done)`` is
    called before every timing of a round, ``round_done(number)`` after every round, from 1.
    """
    wanted = {key: counts if isinstance(counts, int) else counts[key] for key in timings}
    samples: dict[K, list[float]] = {key: [] for key in timings}
    rounds = max(wanted.values(), default=0)
    for number in range(rounds):
        for done, (key, once) in enumerate(timings.items()):
            each(done)
            if number * wanted[key] // rounds != (number - 1) * wanted[key] // rounds:
                samples[key].append(once())
        round_done(number + 1)
    return samples


def profiling(**options: Any) -> profile:
    """torch's profiler, which in torch 2.13 else writes a line on stderr at each start and end."""
    if os.environ.get("KINETO_LOG_LEVEL", "5") == "5":  # torch sets it; read at first use
        os.environ["KINETO_LOG_LEVEL"] = "6"
    return profile(**options)


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile, linear between samples."""
    low, median, high = np.quantile(samples, [0.25, 0.5, 0.75]).tolist()
    return low, median, high


def joules_of(call: Callable[[], object], seconds: float, device: str) -> float | None:
    """Gross joules of one call; None without a counter, or with one that stands still.

    A counter may move only ten times a second, so calls are counted from one of its moves to
    another, at least ``seconds`` later. The device does nothing else in between.
    """
    meter = EnergyMeter(device)
    before = meter.read().gross_joules
    if before is None:
        return None
    chunk = max(1, int(CHUNK_SECONDS / max(seconds_of(call, device), 1e-7)))
    calls, first = 0, None
    began = time.perf_counter()
    while True:
        seconds_of(call, device, chunk)
        calls += chunk
        now, spent = meter.read().gross_joules, time.perf_counter() - began
        if now is not None and now != before:
            if first is None:
                first, began = (now, calls), time.perf_counter()
            elif spent >= seconds:
                return (now - first[0]) / (calls - first[1])
            before = now
        elif spent > seconds + COUNTER_WAIT:
            return None


def captured(
    call: Callable[[], object], device: str | torch.device
) -> tuple[Callable[[], object], str]:
    """What to time for ``call``, and how it is run: "cuda graph" (one launch for all of it, so that
    the host costs nothing), "eager" where it cannot be captured, "wall clock" on a CPU."""
    if torch.device(device).type != "cuda":
        return call, "wall clock"
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    try:
        # The device need not be torch's current one.
        with torch.cuda.device(device), torch.cuda.graph(graph, stream=side):
            kept = call()  # the graph writes to it
    except RuntimeError:  # something in it cannot be captured: time it as it is
        torch.cuda.synchronize(device)
        return call, "eager"

    def replay(_kept: object = kept) -> None:
        graph.replay()

    return replay, GRAPH


def _row(case: Case) -> dict[str, Any]:
    low, median, high = (
        (1e3 * q for q in quartiles(case.seconds)) if case.seconds else [None] * 3)
    return {**case.labels, "length": case.length, "ms": median, "ms_lower_quartile": low,
            "ms_upper_quartile": high, "rounds": len(case.seconds), "timed_as": case.timed_as,
            "joules": case.joules, "status": case.status}


def _predict(past: list[tuple[int, float]], length: int) -> float:
    """Seconds of a call at the next length if it grows in proportion; 0 before the first."""
    if not past:
        return 0.0
    last_length, last = past[-1]
    return last * length / max(last_length, 1)


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _make_room(device: str) -> None:
    """Release cached memory once a quarter of the card is reserved: to do so after every call took
    most of the time of a study of hundreds of points."""
    if device.startswith("cuda") and torch.cuda.memory_reserved(device) > (
            torch.cuda.get_device_properties(device).total_memory // 4):
        release(device)


def release(device: str) -> None:
    """Give cached memory of a GPU back."""
    if device.startswith("cuda"):
        gc.collect()
        torch.cuda.empty_cache()


def seconds_of(call: Callable[[], object], device: str, inner: int = 1) -> float:
    """Seconds of one call by the clock, as a mean of ``inner`` of them; waits for the device."""
    _wait(device)
    began = time.perf_counter()
    for _ in range(inner):
        call()
    _wait(device)
    return (time.perf_counter() - began) / inner


def device_seconds_of(call: Callable[[], object], flush: Tensor | None) -> float:
    """Seconds of one call: on a GPU by its own events, after ``flush`` has been written there.

    The flush evicts what an earlier call left in the L2 cache, and hides the launch of ``call``.
    None means a CPU, and the clock.
    """
    if flush is None:
        return seconds_of(call, "cpu")
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    stream = torch.cuda.current_stream(flush.device)
    flush.zero_()
    begin.record(stream)
    call()
    end.record(stream)
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
