"""The scan against its peers and against the floor of the machine it runs on.

``run_bench`` measures, and returns one row a (shape, peer, direction); ``describe_machine`` says on
what, and the ceilings that it measured itself. Peers that cannot be imported or would not fit are
rows with a note, not gaps.

The floor of a shape is what its arithmetic and traffic cost at the measured ceilings if nothing
else did: forward and backward each take at least
``max(bytes / copy, exps / exp_rate, fmas / fma_rate)`` with, for B L D steps of N states and
elements of s bytes,

- forward: bytes s (4 B L D + 2 B L N) (u, delta, z, B, C in; y out), exps B L D (N + 4) (the decay;
  softplus and silu take two special functions each), fmas 4 B L D N;
- backward: bytes s (7 B L D + 4 B L N) (u, delta, z, dy, B, C in; du, ddelta, dz, dB, dC out), exps
  B L D (N + 4), fmas 11 B L D N (the state again, and the gradients of state, A, delta, u, B, C).
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analysis.measure.bench.peers import PEERS, Peer, Shape, make_inputs, peer_available, torch_form
from analysis.measure.ceilings import describe_machine
from analysis.measure.timing import captured, device_seconds_of, in_turns, quartiles
from mambabyte.errors import UserError
from mambabyte.ops.compare import relative_rms

GPU_SHAPES: tuple[Shape, ...] = (
    (16, 1024, 384),
    (64, 2048, 384),
    (8, 2048, 1536),
    (1, 65536, 1536),
    (1, 16384, 384),
    (128, 256, 384),
)
CPU_SHAPES: tuple[Shape, ...] = ((4, 512, 384), (1, 2048, 384), (16, 128, 384))
DIRECTIONS = ("forward", "forward+backward")
COLUMNS = {
    "batch": "sequences",
    "length": "steps a sequence",
    "channels": "D",
    "states": "N",
    "dtype": "of u, delta, B, C, z",
    "peer": "what was timed, see PEERS",
    "direction": "forward (no gradients) or forward+backward (through autograd)",
    "median_seconds": "of all repeats; the peers of a shape take turns in one run",
    "low_seconds": "first quartile",
    "high_seconds": "third quartile",
    "repeats": "how many were timed",
    "timing": "cuda graph (no host overhead), eager or wall clock",
    "ratio_to_fused": "median over that of fused on the same row group; above 1, fused is faster",
    "floor_seconds": "least time at the measured ceilings, by the formula of this module",
    "fraction_of_floor": "floor over median: 1 is the best possible",
    "peak_bytes": "most GPU memory taken by a call, beyond its inputs",
    "error_output": "relative RMS of y against the float64 definition, at a reduced size",
    "error_gradient": "the worst relative RMS of a gradient, likewise",
    "note": "why there is no number",
}
DEFAULT_PEERS = ("fused", "fused, recompute", "mamba_ssm", "mambapy", "chunked", "sdpa")
SLOW_ELEMENTS = 1 << 28  # state elements above which peers that store them all are left out


class PeerCase:
    """One peer on one shape: its inputs, and the two things to time."""

    def __init__(self, peer: Peer, inputs: dict[str, Tensor]) -> None:
        self.peer = peer
        prepared = peer.prepare(inputs)
        self.inputs = {name: t.detach().requires_grad_() for name, t in prepared.items()}
        with torch.no_grad():
            y = peer.call(**self.inputs)
        generator = torch.Generator(device=y.device).manual_seed(1)
        like = peer.restore("y", y)
        dy = torch.randn(like.shape, generator=generator, device=y.device).to(y.dtype)
        self.dy = peer.restore("dy", dy).contiguous()  # restore is its own inverse

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.peer.call(**self.inputs)

    def forward_backward(self) -> list[Tensor]:
        y = self.peer.call(**self.inputs)
        return [y.detach(), *torch.autograd.grad(y, list(self.inputs.values()), self.dy)]

    def run(self, direction: str) -> object:
        return self.forward() if direction == "forward" else self.forward_backward()


def peak_bytes_of(case: PeerCase, direction: str, device: torch.device) -> float:
    if device.type != "cuda":
        return float("nan")
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    kept = case.run(direction)
    torch.cuda.synchronize(device)
    del kept
    return float(torch.cuda.max_memory_allocated(device) - before)


def _errors(
    peer: Peer, shape: Shape, states: int, dtype: torch.dtype, device: torch.device
) -> tuple[float, float]:
    """Relative RMS of y and of the worst gradient against float64, on the same rounded inputs."""
    if not peer.is_scan:
        return float("nan"), float("nan")
    batch, length, channels = shape
    small = (min(batch, 2), min(length, 200), min(channels, 64))
    inputs = make_inputs(small, states, dtype, device)
    case = PeerCase(peer, inputs)
    exact = PeerCase(
        Peer("", torch_form("sequential")), {name: t.double() for name, t in inputs.items()}
    )
    exact.dy = peer.restore("dy", case.dy).double()
    names = ("y", *exact.inputs)
    errors = [
        relative_rms(peer.restore(name, one), two)
        for name, one, two in zip(
            names, case.forward_backward(), exact.forward_backward(), strict=True
        )
    ]
    return errors[0], float(np.max(errors[1:]))  # a NaN stays a NaN


def floor_seconds(
    shape: Shape, states: int, element_bytes: int, ceilings: dict[str, object], direction: str
) -> float:
    """The floor of this module's docstring, in seconds."""
    batch, length, channels = shape
    steps, rows = batch * length * channels, batch * length * states
    copy, exp, fma = (
        float(ceilings[name])  # type: ignore[arg-type]
        for name in ("copy_bytes_per_second", "exp2_per_second", "fp32_fma_per_second")
    )
    exps = steps * (states + 4) / exp
    forward = max(element_bytes * (4 * steps + 2 * rows) / copy, exps, 4 * steps * states / fma)
    if direction == "forward":
        return forward
    traffic = element_bytes * (7 * steps + 4 * rows)
    return forward + max(traffic / copy, exps, 11 * steps * states / fma)


# ------------------------------------------------------------------------------------- the bench


def run_bench(
    shapes: Sequence[Shape] | None = None,
    dtype: str | None = None,
    peers: Sequence[str] = DEFAULT_PEERS,
    device: str | torch.device | None = None,
    repeats: int = 30,
    progress: Callable[[str], None] | None = None,
    *,
    states: int = 16,
    seconds_per_peer: float = 10.0,
    machine: dict[str, object] | None = None,
) -> pd.DataFrame:
    """Time the peers on each shape; one row a (shape, peer, direction), columns as in COLUMNS.

    ``dtype`` is bfloat16 on a GPU and float32 on a CPU unless given. A peer gets at most about
    ``seconds_per_peer`` a direction, so slow ones are repeated less often. ``progress`` is called
    with one line a measurement; ``machine`` is what describe_machine returned (else it is called).
    The frame's ``attrs["machine"]`` holds it.

    Raises UserError for a peer or dtype that is unknown.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = device.type == "cuda"
    dtype = dtype or ("bfloat16" if on_gpu else "float32")
    if dtype not in ("bfloat16", "float16", "float32"):
        raise UserError(f"dtype {dtype!r} is unknown: choose bfloat16, float16 or float32")
    unknown = [name for name in peers if name not in PEERS]
    if unknown:
        raise UserError(f"peer {unknown[0]!r} is unknown: choose from {', '.join(PEERS)}")
    say = progress or (lambda line: None)
    if machine is None:
        say("measuring the machine's ceilings")
        machine = describe_machine(device)
    rows = []
    for shape in shapes or (GPU_SHAPES if on_gpu else CPU_SHAPES):
        for row in _bench_shape(
            shape, getattr(torch, dtype), peers, device, repeats, states, seconds_per_peer, say
        ):
            row["dtype"] = dtype
            if PEERS[row["peer"]].is_scan:
                size = getattr(torch, dtype).itemsize
                row["floor_seconds"] = floor_seconds(shape, states, size, machine, row["direction"])
            rows.append(row)
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    frame["fraction_of_floor"] = frame["floor_seconds"] / frame["median_seconds"]
    keys = ["batch", "length", "channels", "direction"]
    fused = frame[frame["peer"] == "fused"].set_index(keys)["median_seconds"]
    own = pd.MultiIndex.from_frame(frame[keys])
    frame["ratio_to_fused"] = frame["median_seconds"] / fused.reindex(own).to_numpy()
    frame.attrs["machine"] = machine
    return frame


def _bench_shape(
    shape: Shape, dtype: torch.dtype, peers: Sequence[str], device: torch.device, repeats: int,
    states: int, seconds_per_peer: float, say: Callable[[str], None],
) -> Iterator[dict]:  # fmt: skip
    rows: dict[tuple[str, str], dict] = {}
    cases: dict[str, PeerCase] = {}
    elements = shape[0] * shape[1] * shape[2] * states
    for name in peers:
        available, note = peer_available(name, device)
        if available and PEERS[name].stores_states and elements > SLOW_ELEMENTS:
            available, note = False, f"left out: it would store {elements:.2g} states several times"
        for direction in DIRECTIONS:
            rows[name, direction] = {
                "batch": shape[0], "length": shape[1], "channels": shape[2], "states": states,
                "peer": name, "direction": direction, "note": "" if available else note,
            }  # fmt: skip
        if not available:
            say(f"{shape} {name}: {note}")
            continue
        try:
            error = _errors(PEERS[name], shape, states, dtype, device)
            cases[name] = PeerCase(PEERS[name], make_inputs(shape, states, dtype, device))
            for direction in DIRECTIONS:
                row = rows[name, direction]
                row["error_output"], row["error_gradient"] = error[0], float("nan")
                row["peak_bytes"] = peak_bytes_of(cases[name], direction, device)
                if PEERS[name].is_scan and not math.isfinite(sum(error)):
                    row["note"] = "wrong: its results are not finite at the reduced size"
            rows[name, DIRECTIONS[1]]["error_gradient"] = error[1]
        except Exception as failure:  # a peer that breaks is a row that says so
            cases.pop(name, None)
            reason = f"{type(failure).__name__}: {failure}".splitlines()[0]
            for direction in DIRECTIONS:
                rows[name, direction]["note"] = reason
            say(f"{shape} {name}: {reason}")
            if device.type == "cuda":
                torch.cuda.empty_cache()
    for direction in DIRECTIONS:
        for name, (samples, timing) in interleaved(
            cases, direction, device, repeats, seconds_per_peer
        ).items():
            low, median, high = quartiles(samples)
            rows[name, direction].update(
                median_seconds=median, low_seconds=low, high_seconds=high,
                repeats=len(samples), timing=timing,
            )  # fmt: skip
            say(f"{shape} {name} {direction}: {median * 1e6:.1f} us")
    yield from rows.values()


def interleaved(
    cases: dict[str, PeerCase], direction: str, device: torch.device, repeats: int,
    seconds_per_peer: float,
) -> dict[str, tuple[list[float], str]]:  # fmt: skip
    """Samples of each peer, taken in turns so that drift of the machine meets all alike."""
    flush = None
    if device.type == "cuda":
        size = torch.cuda.get_device_properties(device).L2_cache_size
        flush = torch.empty(2 * max(size, 1 << 25), dtype=torch.uint8, device=device)
    timers, wanted = {}, {}
    for name, case in cases.items():
        run, how = captured(functools.partial(case.run, direction), device)
        timers[name] = run, how
        device_seconds_of(run, flush)
        once = statistics.median(device_seconds_of(run, flush) for _ in range(2))
        wanted[name] = max(3, min(repeats, int(seconds_per_peer / max(once, 1e-9))))
    samples = in_turns({name: functools.partial(device_seconds_of, run, flush)
                        for name, (run, _) in timers.items()}, wanted)
    return {name: (samples[name], how) for name, (_, how) in timers.items() if samples[name]}
