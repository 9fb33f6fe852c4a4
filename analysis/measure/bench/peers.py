"""Implementations against each other: the same inputs, in turns, errors beside times."""

from __future__ import annotations

import functools
import importlib.util
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from analysis.measure.bench.tuning import bounded_tuning, carry_tuning
from analysis.measure.timing import (
    Said,
    captured,
    device_seconds_of,
    in_turns,
    profiling,
    quartiles,
)
from mambabyte.ops.compare import relative_rms

Shape = tuple[int, int, int]
Inputs = dict[str, Tensor]
GPU_ONLY = ("mamba_ssm", "fla")
TUNING_SECONDS = 90.0  # of compiling for each peer; some would take ten minutes
SECONDS_PER_PEER = 10.0  # of timing a direction, about: slow peers are repeated less often
DIRECTIONS = ("forward", "forward+backward")
COLUMNS = {
    "direction": "forward (no gradients) or forward+backward (through autograd)",
    "median_seconds": "of all repeats; the peers of a shape take turns in one run",
    "low_seconds": "first quartile",
    "high_seconds": "third quartile",
    "timing": "cuda graph (no host overhead), eager or wall clock",
    "peak_bytes": "most GPU memory taken by a call, beyond its inputs",
    "error_output": "relative RMS of y against the float64 definition, at a reduced size",
    "error_gradient": "the worst relative RMS of a gradient, likewise",
    "kernel": "on a GPU the one that took longest, by the profile of one call",
    "note": "why there is no number, or how a peer was tuned if not in full at this shape",
}


@dataclass(frozen=True)
class Peer:
    """Something to time. ``prepare`` turns inputs (B, L, ..) into what ``call`` takes and gives."""

    about: str
    call: Callable[..., Tensor]
    prepare: Callable[[Inputs], Inputs] = lambda inputs: inputs
    restore: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor  # its own inverse
    needs: str = ""  # a module
    stores_states: bool = False  # those of every step
    is_scan: bool = True  # whether the definition is its reference


class PeerCase:
    """One peer on one shape: its inputs, and the two things to time."""

    def __init__(self, peer: Peer, inputs: Inputs) -> None:
        self.peer = peer
        self.inputs = {name: t.detach().requires_grad_()
                       for name, t in peer.prepare(inputs).items()}
        y = self.forward()
        generator = torch.Generator(device=y.device).manual_seed(1)
        like = peer.restore("y", y)
        dy = torch.randn(like.shape, generator=generator, device=y.device).to(y.dtype)
        self.dy = peer.restore("dy", dy).contiguous()

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.peer.call(**self.inputs)

    def forward_backward(self) -> list[Tensor]:
        y = self.peer.call(**self.inputs)
        return [y.detach(), *torch.autograd.grad(y, list(self.inputs.values()), self.dy)]

    def run(self, direction: str) -> object:
        return self.forward() if direction == DIRECTIONS[0] else self.forward_backward()


def peer_installed(peer: Peer, device: torch.device) -> str:
    """Why that peer cannot be imported or not run on the device, in one line; "" if it can."""
    if peer.needs and importlib.util.find_spec(peer.needs) is None:
        return f"{peer.needs} is not installed"
    if peer.needs in GPU_ONLY and device.type != "cuda":
        return f"{peer.needs} runs on GPUs only"
    return ""


@contextmanager
def kept_when_interrupted(rows: list[dict[str, Any]], say: Callable[[str], None]) -> Iterator[None]:
    """An interruption ends what is within, and is said, where there are rows to show."""
    try:
        yield
    except KeyboardInterrupt:
        if not rows:
            raise
        say(f"interrupted: the {len(rows)} rows of before are kept")


def bench_peers(
    found: list[dict[str, Any]], peers: Mapping[str, Peer], make: Callable[[bool], Inputs],
    exact: Callable[..., Tensor] | None, device: torch.device, repeats: int,
    say: Callable[[str], None], *,
    refuse: Callable[[str], str] = lambda name: "", **labels: object,
) -> None:
    """Time every peer on one set of inputs, and add a row a (peer, direction) to ``found``, with
    ``labels``, "peer" and COLUMNS; on an interruption those that were timed.

    ``make(reduced)`` gives the inputs, or few of them for the comparison with ``exact``, the
    definition (None: there is none). ``refuse(name)`` says why a peer is left out, "" if it is not.
    A peer that breaks is a row that says so.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    cases: dict[str, PeerCase] = {}
    for name, peer in peers.items():
        note = peer_installed(peer, device) or refuse(name)
        mine = {d: {**labels, "peer": name, "direction": d, "note": note} for d in DIRECTIONS}
        rows |= {(name, d): row for d, row in mine.items()}
        try:
            if not note:
                cases[name], note = _prepared(mine, peer, make, exact, device)
        except Exception as failure:
            note = f"{type(failure).__name__}: {failure}".splitlines()[0]
            for row in mine.values():
                row["note"] = note
            if device.type == "cuda":
                torch.cuda.empty_cache()
        if note:
            say(f"{name}: {note}")
    done = False
    try:
        for direction in DIRECTIONS:
            timed = _interleaved(cases, direction, device, repeats, say)
            for name, (samples, timing) in timed.items():
                low, median, high = quartiles(samples)
                rows[name, direction].update(
                    median_seconds=median, low_seconds=low, high_seconds=high,
                    repeats=len(samples), timing=timing)
                say(f"{name} {direction}: {median * 1e6:.1f} us")
        done = True
    finally:
        found += [row for row in rows.values() if done or "median_seconds" in row]


def _prepared(
    rows: Mapping[str, dict[str, Any]], peer: Peer, make: Callable[[bool], Inputs],
    exact: Callable[..., Tensor] | None, device: torch.device,
) -> tuple[PeerCase, str]:
    """A peer that is tuned, and what is wrong with it; its ``rows``, by direction, have all but
    times."""
    # Before the reduced size, on which a peer that tunes itself would choose badly.
    with bounded_tuning(TUNING_SECONDS) as settings:
        case = PeerCase(peer, make(False))
        case.forward_backward()
    met, late = settings()
    for row in rows.values():
        row["note"] = f"tuned without {late} of {met} settings" * (late > 0)
    end = carry_tuning()
    errors = _errors(peer, exact, make(True)) if exact and peer.is_scan else None
    end()
    for direction, row in rows.items():
        row["peak_bytes"] = _peak_bytes(case, direction, device)
        row["kernel"] = _longest_kernel(case, direction, device)
    if errors is None:
        return case, ""
    wrong = "" if math.isfinite(sum(errors)) else (
        "wrong: its results are not finite at the reduced size")
    for row in rows.values():
        row["error_output"] = errors[0]
        row["note"] = wrong or row["note"]
    rows[DIRECTIONS[1]]["error_gradient"] = errors[1]
    return case, wrong


def _errors(peer: Peer, exact: Callable[..., Tensor], inputs: Inputs) -> tuple[float, float]:
    """Relative RMS of y and of the worst gradient against float64, on the same rounded inputs."""
    case = PeerCase(peer, inputs)
    true = PeerCase(Peer("", exact), {name: t.double() for name, t in inputs.items()})
    true.dy = peer.restore("dy", case.dy).double()
    output, *gradients = [
        relative_rms(peer.restore(name, one), two) for name, one, two in zip(
            ("y", *true.inputs), case.forward_backward(), true.forward_backward(), strict=True)]
    return output, float(np.max(gradients))  # a NaN stays a NaN


def _peak_bytes(case: PeerCase, direction: str, device: torch.device) -> float:
    if device.type != "cuda":
        return float("nan")
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    kept = case.run(direction)
    torch.cuda.synchronize(device)
    del kept
    return float(torch.cuda.max_memory_allocated(device) - before)


def kernel_name(kernel: str) -> str:
    """A kernel's name without its return type and its arguments, which run to a page."""
    return kernel.removeprefix("void ").replace("(anonymous namespace)::", "").partition("(")[0]


def _longest_kernel(case: PeerCase, direction: str, device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    with profiling(activities=[ProfilerActivity.CUDA]) as profiler:
        case.run(direction)
        torch.cuda.synchronize(device)
    spent = [(event.self_device_time_total, event.key) for event in profiler.key_averages()
             if event.device_type != DeviceType.CPU]
    return kernel_name(max(spent, default=(0.0, ""))[1])


def _interleaved(
    cases: Mapping[str, PeerCase], direction: str, device: torch.device, repeats: int,
    say: Callable[[str], None],
) -> dict[str, tuple[list[float], str]]:
    """Samples of each peer, taken in turns so that drift of the machine meets all alike."""
    flush = None
    if device.type == "cuda":
        size = torch.cuda.get_device_properties(device).L2_cache_size
        flush = torch.empty(2 * max(size, 1 << 25), dtype=torch.uint8, device=device)
    said = Said(say)
    timers, wanted = {}, {}
    for name, case in cases.items():
        said(f"{direction}: trying {name}")
        timers[name] = run, _ = captured(functools.partial(case.run, direction), device)
        device_seconds_of(run, flush)
        once = statistics.median(device_seconds_of(run, flush) for _ in range(2))
        wanted[name] = max(3, min(repeats, int(SECONDS_PER_PEER / max(once, 1e-9))))
    calls = {name: functools.partial(device_seconds_of, run, flush)
             for name, (run, _) in timers.items()}
    samples = in_turns(calls, wanted, round_done=lambda number: said(
        f"{direction}: round {number} of {max(wanted.values())}"))
    return {name: (samples[name], how) for name, (_, how) in timers.items() if samples[name]}
