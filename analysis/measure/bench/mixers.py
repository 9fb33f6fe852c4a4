"""The recurrences of the field's mixers against the kernels that others have for them, and against
attention.

Every family gets heads of 64 channels in bf16 (float32 on a CPU), as a layer gives them to its
recurrence: gates made, keys normalised. ``run_bench`` returns one row a (shape, family, peer,
direction), with the worst relative RMS against the float64 definition on a reduced size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.measure.bench.peers import Peer, peer_installed
from analysis.measure.bench.scan import DIRECTIONS, PeerCase, interleaved, peak_bytes_of
from mambabyte.errors import UserError
from mambabyte.ops import gated_delta_rule, ssd_scan
from mambabyte.ops.compare import relative_rms

HEAD = 64  # channels
Shape = tuple[int, int, int]  # B, L, heads
GPU_SHAPES: tuple[Shape, ...] = ((16, 1024, 6), (64, 2048, 6), (8, 2048, 24), (1, 65536, 24))
CPU_SHAPES: tuple[Shape, ...] = ((4, 512, 6), (1, 2048, 6))
COLUMNS = {
    "batch": "sequences",
    "length": "steps a sequence",
    "heads": f"of {HEAD} channels",
    "family": "which recurrence",
    "peer": "whose implementation",
    "direction": "forward (no gradients) or forward+backward (through autograd)",
    "median_seconds": "of all repeats; the peers of a shape take turns in one run",
    "low_seconds": "first quartile",
    "high_seconds": "third quartile",
    "timing": "cuda graph (no host overhead), eager or wall clock",
    "peak_bytes": "most GPU memory taken by a call, beyond its inputs",
    "error_output": "relative RMS of y against the float64 definition, at a reduced size",
    "error_gradient": "the worst relative RMS of a gradient, likewise",
    "note": "why there is no number",
}


@dataclass(frozen=True)
class Family:
    """A recurrence: its inputs, its definition, and who computes it."""

    make: Callable[[Shape, torch.dtype, torch.device], dict[str, Tensor]]
    exact: Callable[..., Tensor] | None  # the same in float64
    peers: dict[str, Peer]


def _normal(
    shape: Shape, dtype: torch.dtype, device: torch.device, **widths: tuple[int, ...]
) -> dict[str, Tensor]:
    generator = torch.Generator(device=device).manual_seed(0)
    return {name: torch.randn(*shape[:2], *width, generator=generator, device=device).to(dtype)
            for name, width in widths.items()}


def _ssd_inputs(
    states: int, shape: Shape, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    heads = shape[2]
    made = _normal(shape, dtype, device, x=(heads, HEAD), dt=(heads,), B=(1, states),
                   C=(1, states))
    rates = torch.linspace(1, 16, heads, device=device)
    return made | {"A": -rates, "D": torch.ones_like(rates),
                   "dt_bias": torch.full_like(rates, -4.0)}


def _ssd(form: str, **inputs: Tensor) -> Tensor:
    return ssd_scan(**inputs, dt_softplus=True, form=form)[0]  # type: ignore[arg-type]


def _mamba_ssm(x, dt, A, B, C, D, dt_bias):
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return mamba_chunk_scan_combined(
        x, dt, A, B, C, chunk_size=256, D=D, dt_bias=dt_bias, dt_softplus=True)


def _delta_inputs(
    by_channel: bool, shape: Shape, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    heads = shape[2]
    made = _normal(shape, dtype, device, q=(heads, HEAD), k=(heads, HEAD), v=(heads, HEAD),
                   log_decay=(heads, HEAD) if by_channel else (heads,), beta=(heads,))
    q, k = (F.normalize(made[name].float(), dim=-1).to(dtype) for name in ("q", "k"))
    return made | {"q": q / 8, "k": k, "beta": torch.sigmoid(made["beta"].float()),
                   "log_decay": -F.softplus(made["log_decay"].float() - 3)}


def _delta(form: str, **inputs: Tensor) -> Tensor:
    return gated_delta_rule(**inputs, form=form)[0]  # type: ignore[arg-type]


def _fla_kda(q, k, v, log_decay, beta):
    from fla.ops.kda import chunk_kda

    return chunk_kda(q, k, v, log_decay, beta, scale=1.0)[0]


def _fla_gated_delta(q, k, v, log_decay, beta):
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return chunk_gated_delta_rule(q, k, v, log_decay, beta, scale=1.0)[0]


def _attention_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    made = _normal(shape, dtype, device, q=(shape[2], HEAD), k=(shape[2], HEAD),
                   v=(shape[2], HEAD))
    return {name: t.transpose(1, 2).contiguous() for name, t in made.items()}


def _sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _ssd_family(states: int) -> Family:
    return Family(
        functools.partial(_ssd_inputs, states), functools.partial(_ssd, "chunked"),
        {"fused": Peer("this project's operator", functools.partial(_ssd, "fused")),
         "mamba_ssm": Peer("state-spaces/mamba, Triton", _mamba_ssm, needs="mamba_ssm")})


def _delta_family(by_channel: bool, theirs: Callable[..., Tensor]) -> Family:
    return Family(
        functools.partial(_delta_inputs, by_channel), functools.partial(_delta, "chunked"),
        {"fused": Peer("this project's operator", functools.partial(_delta, "fused")),
         "fla": Peer("flash-linear-attention, Triton", theirs, needs="fla")})


FAMILIES: dict[str, Family] = {
    "SSD, 64 states": _ssd_family(64),
    "SSD, 128 states": _ssd_family(128),
    "gated delta rule": _delta_family(False, _fla_gated_delta),
    "KDA": _delta_family(True, _fla_kda),
    "attention": Family(_attention_inputs, None, {
        "sdpa": Peer("causal attention of the same width, for scale", _sdpa, is_scan=False)}),
}


def run_bench(
    shapes: Sequence[Shape] | None = None, families: Sequence[str] = tuple(FAMILIES),
    device: str | torch.device | None = None, repeats: int = 30,
    progress: Callable[[str], None] | None = None, seconds_per_peer: float = 10.0,
) -> pd.DataFrame:
    """Time every peer of the families on each shape; columns as in COLUMNS.

    Raises UserError for a family that is unknown.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    say = progress or (lambda line: None)
    unknown = [name for name in families if name not in FAMILIES]
    if unknown:
        raise UserError(f"family {unknown[0]!r} is unknown: choose from {', '.join(FAMILIES)}")
    rows: list[dict[str, object]] = []
    for shape in shapes or (GPU_SHAPES if device.type == "cuda" else CPU_SHAPES):
        for family in families:
            rows += _bench_family(shape, family, dtype, device, repeats, say, seconds_per_peer)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _bench_family(
    shape: Shape, name: str, dtype: torch.dtype, device: torch.device, repeats: int,
    say: Callable[[str], None], seconds_per_peer: float,
) -> list[dict[str, object]]:
    family = FAMILIES[name]
    rows: dict[tuple[str, str], dict[str, object]] = {}
    cases: dict[str, PeerCase] = {}
    for peer_name, peer in family.peers.items():
        mine = {d: {"batch": shape[0], "length": shape[1], "heads": shape[2], "family": name,
                    "peer": peer_name, "direction": d, "note": peer_installed(peer, device)}
                for d in DIRECTIONS}
        rows |= {(peer_name, d): row for d, row in mine.items()}
        if mine[DIRECTIONS[0]]["note"]:
            say(f"{shape} {name}, {peer_name}: {mine[DIRECTIONS[0]]['note']}")
            continue
        try:
            output, gradient = _errors(family, peer, shape, dtype, device)
            cases[peer_name] = PeerCase(peer, family.make(shape, dtype, device))
            for direction, row in mine.items():
                row["error_output"] = output
                row["peak_bytes"] = peak_bytes_of(cases[peer_name], direction, device)
            mine[DIRECTIONS[1]]["error_gradient"] = gradient
        except Exception as failure:  # a peer that breaks is a row that says so
            cases.pop(peer_name, None)
            reason = f"{type(failure).__name__}: {failure}".splitlines()[0]
            for row in mine.values():
                row["note"] = reason
            say(f"{shape} {name}, {peer_name}: {reason}")
    for direction in DIRECTIONS:
        found = interleaved(cases, direction, device, repeats, seconds_per_peer)
        for peer_name, (samples, timing) in found.items():
            low, median, high = np.quantile(samples, [0.25, 0.5, 0.75])
            rows[peer_name, direction].update(
                median_seconds=median, low_seconds=low, high_seconds=high, timing=timing)
            say(f"{shape} {name}, {peer_name}, {direction}: {median * 1e6:.1f} us")
    return list(rows.values())


def _errors(
    family: Family, peer: Peer, shape: Shape, dtype: torch.dtype, device: torch.device
) -> tuple[float, float]:
    """Relative RMS of y and of the worst gradient, on the same rounded inputs."""
    if family.exact is None:
        return float("nan"), float("nan")
    inputs = family.make((min(shape[0], 2), min(shape[1], 200), min(shape[2], 4)), dtype, device)
    case = PeerCase(peer, inputs)
    exact = PeerCase(Peer("", family.exact), {n: t.double() for n, t in inputs.items()})
    exact.dy = case.dy.double()
    errors = [relative_rms(one, two) for one, two in zip(
        case.forward_backward(), exact.forward_backward(), strict=True)]
    return errors[0], float(np.max(errors[1:]))  # a NaN stays a NaN
