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

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.measure.bench import peers as engine
from analysis.measure.bench.peers import (
    Peer,
    Shape,
    bench_peers,
    kept_when_interrupted,
    peer_installed,
)
from analysis.measure.ceilings import describe_machine
from mambabyte.errors import UserError
from mambabyte.ops import selective_scan
from mambabyte.ops.scan.operator import fused_available, fused_scan

GPU_SHAPES: tuple[Shape, ...] = (  # B, L, D
    (16, 1024, 384), (64, 2048, 384), (8, 2048, 1536), (1, 65536, 1536), (1, 16384, 384),
    (128, 256, 384))
CPU_SHAPES: tuple[Shape, ...] = ((4, 512, 384), (1, 2048, 384), (16, 128, 384))
COLUMNS = {
    "batch": "sequences",
    "length": "steps a sequence",
    "channels": "D",
    "states": "N",
    "dtype": "of u, delta, B, C, z",
    "peer": "what was timed, see PEERS",
    **engine.COLUMNS,
    "repeats": "how many were timed",
    "ratio_to_fused": "median over that of fused on the same row group; above 1, fused is faster",
    "floor_seconds": "least time at the measured ceilings, by the formula of this module",
    "fraction_of_floor": "floor over median: 1 is the best possible",
}
DEFAULT_PEERS = ("fused", "fused, recompute", "mamba_ssm", "mambapy", "chunked", "sdpa")
SLOW_ELEMENTS = 1 << 28  # state elements above which peers that store them all are left out


def torch_form(form: str) -> Callable[..., Tensor]:
    def call(
        u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor,
        delta_bias: Tensor,
    ) -> Tensor:
        return selective_scan(
            u, delta, A, B, C, D, z, delta_bias=delta_bias, delta_softplus=True, form=form
        )[0]

    return call


def _recompute(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor,
    delta_bias: Tensor
) -> Tensor:
    return fused_scan(u, delta, A, B, C, D, z, delta_bias, None, True, recompute=True)[0]


def _mamba_ssm(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor,
    delta_bias: Tensor
) -> Tensor:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, True)


def _mambapy(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor,
    delta_bias: Tensor
) -> Tensor:
    from mambapy.pscan import pscan

    dt = F.softplus(delta.float() + delta_bias)
    x = u.float()
    decay = torch.exp(dt.unsqueeze(-1) * A)  # (B, L, D, N)
    drive = (dt * x).unsqueeze(-1) * B.float().unsqueeze(2)
    y = (pscan(decay, drive) @ C.float().unsqueeze(-1)).squeeze(3) + D * x
    return (y * F.silu(z.float())).to(u.dtype)


def _sdpa(u: Tensor, delta: Tensor, z: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(u, delta, z, is_causal=True)


def _channels_first(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.transpose(1, 2).contiguous() if t.ndim == 3 else t for n, t in inputs.items()}


def _heads(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values of the same width: (B, L, D) -> (B, D / 64, L, 64)."""
    width = 64 if inputs["u"].shape[2] % 64 == 0 else inputs["u"].shape[2]
    return {
        name: inputs[name].unflatten(2, (-1, width)).transpose(1, 2).contiguous()
        for name in ("u", "delta", "z")
    }


def _channels_last(name: str, tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2) if tensor.ndim == 3 else tensor


PEERS: dict[str, Peer] = {
    "fused": Peer("this project's kernels", torch_form("fused")),
    "fused, recompute": Peer("the same, keeping no states for the backward", _recompute),
    "mamba_ssm": Peer(
        "state-spaces/mamba, CUDA", _mamba_ssm, _channels_first, _channels_last, "mamba_ssm"
    ),
    "mambapy": Peer("mamba.py's parallel scan", _mambapy, needs="mambapy", stores_states=True),
    "chunked": Peer("stable torch form", torch_form("chunked"), stores_states=True),
    "document_chunked": Peer(
        "log-cumsum in chunks, as published", torch_form("document_chunked"), stores_states=True
    ),
    "sdpa": Peer("causal attention of the same width, for scale", _sdpa, _heads, is_scan=False),
}


def peer_available(name: str, device: torch.device) -> str:
    """Why that peer cannot be run on the device, in one line; "" if it can."""
    if missing := peer_installed(PEERS[name], device):
        return missing
    if name == "mamba_ssm" and importlib.util.find_spec("selective_scan_cuda") is None:
        return "mamba_ssm was installed without its Mamba-1 kernel"
    available, reason = fused_available(device) if name.startswith("fused") else (True, "")
    return "" if available else reason


def make_inputs(
    shape: Shape, states: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> dict[str, Tensor]:
    """Inputs as a trained layer has them, in (B, L, D)."""
    batch, length, channels = shape
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=device)

    rates = torch.arange(1, states + 1, device=device, dtype=torch.float32)
    return {
        "u": normal(batch, length, channels).to(dtype),
        "delta": normal(batch, length, channels).to(dtype),
        "A": -rates.repeat(channels, 1),
        "B": normal(batch, length, states).to(dtype),
        "C": normal(batch, length, states).to(dtype),
        "D": normal(channels),
        "z": normal(batch, length, channels).to(dtype),
        "delta_bias": normal(channels) - 3,
    }


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


def run_bench(
    shapes: Sequence[Shape] | None = None, dtype: str | None = None,
    peers: Sequence[str] = DEFAULT_PEERS, device: str | torch.device | None = None,
    repeats: int = 30, progress: Callable[[str], None] | None = None, *, states: int = 16,
    machine: dict[str, object] | None = None,
) -> pd.DataFrame:
    """Time the peers on each shape; one row a (shape, peer, direction), columns as in COLUMNS.

    ``dtype`` is bfloat16 on a GPU and float32 on a CPU unless given. ``progress`` is called
    with one line a measurement; ``machine`` is what describe_machine returned (else it is called).
    The frame's ``attrs["machine"]`` holds it. An interruption keeps what was timed before it;
    KeyboardInterrupt where that is nothing.

    Raises UserError for a peer or dtype that is unknown.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = device.type == "cuda"
    dtype = dtype or ("bfloat16" if on_gpu else "float32")
    if dtype not in ("bfloat16", "float16", "float32"):
        raise UserError(f"dtype {dtype!r} is unknown: choose bfloat16, float16 or float32")
    unknown = [name for name in peers if name not in PEERS]
    if unknown:
        raise UserError(f"peer {unknown[0]!r} is unknown: choose from "
                        + ", ".join(map(repr, PEERS)))
    say = progress or (lambda line: None)
    if machine is None:
        say("measuring the machine's ceilings")
        machine = describe_machine(device)
    kind = getattr(torch, dtype)
    rows: list[dict[str, Any]] = []
    with kept_when_interrupted(rows, say):
        for shape in shapes or (GPU_SHAPES if on_gpu else CPU_SHAPES):
            _bench_shape(rows, shape, kind, peers, device, repeats, states, say)
    for row in rows:
        row["dtype"] = dtype
        if PEERS[row["peer"]].is_scan:
            row["floor_seconds"] = floor_seconds(
                (row["batch"], row["length"], row["channels"]), states, kind.itemsize, machine,
                row["direction"])
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    frame["fraction_of_floor"] = frame["floor_seconds"] / frame["median_seconds"]
    keys = ["batch", "length", "channels", "direction"]
    fused = frame[frame["peer"] == "fused"].set_index(keys)["median_seconds"]
    own = pd.MultiIndex.from_frame(frame[keys])
    frame["ratio_to_fused"] = frame["median_seconds"] / fused.reindex(own).to_numpy()
    frame.attrs["machine"] = machine
    return frame


def _bench_shape(
    rows: list[dict[str, Any]], shape: Shape, dtype: torch.dtype, peers: Sequence[str],
    device: torch.device, repeats: int, states: int,
    say: Callable[[str], None],
) -> None:
    batch, length, channels = shape
    elements = batch * length * channels * states

    def refuse(name: str) -> str:
        if PEERS[name].stores_states and elements > SLOW_ELEMENTS:
            return f"left out: it would store {elements:.2g} states several times"
        return peer_available(name, device)

    def make(reduced: bool) -> dict[str, Tensor]:
        size = (min(batch, 2), min(length, 200), min(channels, 64)) if reduced else shape
        return make_inputs(size, states, dtype, device)

    bench_peers(
        rows, {name: PEERS[name] for name in peers}, make, torch_form("recurrent"), device, repeats,
        lambda line: say(f"{shape} {line}"), refuse=refuse,
        batch=batch, length=length, channels=channels, states=states)
