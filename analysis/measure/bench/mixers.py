"""The recurrences of the field's mixers against the kernels that others have for them, and against
attention.

Every family gets heads of 64 channels in bf16 (float32 on a CPU), as a layer gives them to its
recurrence: gates made, keys normalised. ``run_bench`` returns one row a (shape, family, peer,
direction), with the worst relative RMS against the float64 definition on a reduced size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.measure.bench import peers as engine
from analysis.measure.bench.peers import Peer, Shape, bench_peers, kept_when_interrupted
from analysis.measure.bench.scan import make_inputs, torch_form
from analysis.measure.bench.tuning import carry_tuning, chosen_settings
from mambabyte.errors import UserError
from mambabyte.ops import gated_delta_rule, mamba3_scan, ssd_scan

HEAD = 64  # channels
STATES = 16  # of Mamba-1, a channel
GPU_SHAPES: tuple[Shape, ...] = (  # B, L, heads
    (16, 1024, 6), (64, 2048, 6), (8, 2048, 24), (1, 65536, 24))
CPU_SHAPES: tuple[Shape, ...] = ((4, 512, 6), (1, 2048, 6))
COLUMNS = {
    "batch": "sequences",
    "length": "steps a sequence",
    "heads": f"of {HEAD} channels",
    "family": "which recurrence",
    "peer": "whose implementation",
    **engine.COLUMNS,
}
SETTINGS = {
    "kernel": "of a peer that tunes itself",
    "sizes": "and dtypes that its setting is chosen by",
    "setting": "the one that was chosen, of those that were compiled in time",
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


def _mamba_ssm(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor
) -> Tensor:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return mamba_chunk_scan_combined(
        x, dt, A, B, C, chunk_size=256, D=D, dt_bias=dt_bias, dt_softplus=True)


def _mamba3_inputs(
    states: int, shape: Shape, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    heads = shape[2]
    made = _normal(shape, dtype, device, x=(heads, HEAD), dt=(heads,), log_decay=(heads,),
                   B=(1, states), C=(1, states), angle=(states // 4,), gate=(heads,))
    dt = F.softplus(made["dt"].float() - 4)
    bias = torch.ones(heads, states, device=device)
    return made | {
        "dt": dt, "log_decay": -dt * F.softplus(made["log_decay"].float()), "D": bias[:, 0].clone(),
        "B_bias": bias, "C_bias": bias.clone()}


def _mamba3(form: str, angle: Tensor, gate: Tensor, **inputs: Tensor) -> Tensor:
    wide = inputs["dt"].dtype
    theta, mix = math.pi * torch.tanh(angle.to(wide)), torch.sigmoid(gate.to(wide))
    return mamba3_scan(**inputs, theta=theta, mix=mix, form=form)[0]  # type: ignore[arg-type]


def _mamba_ssm_mamba3(
    x: Tensor, dt: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, angle: Tensor, gate: Tensor,
    D: Tensor, B_bias: Tensor, C_bias: Tensor
) -> Tensor:
    from mamba_ssm.ops.triton.mamba3.mamba3_siso_combined import mamba3_siso_combined

    # As its module calls it; it takes tanh and sigmoid itself.
    angles = angle[:, :, None].expand(-1, -1, x.shape[2], -1)
    return mamba3_siso_combined(
        C, B, x, log_decay.transpose(1, 2), dt.transpose(1, 2), gate.transpose(1, 2), C_bias,
        B_bias, angles, D)


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


def _fla_kda(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    from fla.ops.kda import chunk_kda

    return chunk_kda(q, k, v, log_decay, beta, scale=1.0)[0]


def _fla_gated_delta(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    from fla.ops.common import chunk_o
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    # It refuses in its backward pass, after minutes of tuning the forward.
    hopper, first_wrong, mended = (getattr(chunk_o, name, False) for name in (
        "IS_NVIDIA_HOPPER", "TRITON_ABOVE_3_4_0", "TRITON_ABOVE_3_7_1"))
    if hopper and first_wrong and not mended:
        raise UserError("refused by fla: Triton 3.4 to 3.7.0 computes its gradients wrongly on "
                        "Hopper")
    return chunk_gated_delta_rule(q, k, v, log_decay, beta, scale=1.0)[0]


def _mamba_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    return make_inputs((*shape[:2], shape[2] * HEAD), STATES, dtype, device)


def _attention_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    made = _normal(shape, dtype, device, q=(shape[2], HEAD), k=(shape[2], HEAD),
                   v=(shape[2], HEAD))
    return {name: t.transpose(1, 2).contiguous() for name, t in made.items()}


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _ssd_family(states: int) -> Family:
    return Family(
        functools.partial(_ssd_inputs, states), functools.partial(_ssd, "chunked"),
        {"fused": Peer("this project's operator", functools.partial(_ssd, "fused")),
         "mamba_ssm": Peer("state-spaces/mamba, Triton", _mamba_ssm, needs="mamba_ssm")})


def _mamba3_family(states: int) -> Family:
    return Family(
        functools.partial(_mamba3_inputs, states), functools.partial(_mamba3, "chunked"),
        {"fused": Peer("this project's operator", functools.partial(_mamba3, "fused")),
         "mamba_ssm": Peer("state-spaces/mamba, Triton", _mamba_ssm_mamba3, needs="mamba_ssm")})


def _delta_family(by_channel: bool, theirs: Callable[..., Tensor]) -> Family:
    return Family(
        functools.partial(_delta_inputs, by_channel), functools.partial(_delta, "chunked"),
        {"fused": Peer("this project's operator", functools.partial(_delta, "fused")),
         "fla": Peer("flash-linear-attention, Triton", theirs, needs="fla")})


FAMILIES: dict[str, Family] = {
    "SSD, 64 states": _ssd_family(64),
    "SSD, 128 states": _ssd_family(128),
    "Mamba-3, 64 states": _mamba3_family(64),
    "Mamba-3, 128 states": _mamba3_family(128),
    "gated delta rule": _delta_family(False, _fla_gated_delta),
    "KDA": _delta_family(True, _fla_kda),
    f"Mamba-1, {STATES} states": Family(_mamba_inputs, torch_form("chunked"), {
        "fused": Peer("this project's operator", torch_form("fused"))}),
    "attention": Family(_attention_inputs, None, {
        "sdpa": Peer("causal attention of the same width, for scale", _sdpa, is_scan=False)}),
}


def run_bench(
    shapes: Sequence[Shape] | None = None, families: Sequence[str] = tuple(FAMILIES),
    device: str | torch.device | None = None, repeats: int = 30,
    progress: Callable[[str], None] | None = None,
) -> pd.DataFrame:
    """Time every peer of the families on each shape; columns as in COLUMNS. The frame's
    ``attrs["settings"]`` are what peers that tune themselves chose, rows as in SETTINGS. An
    interruption keeps what was timed before it; KeyboardInterrupt where that is nothing.

    Raises UserError for a family that is unknown.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    say = progress or (lambda line: None)
    unknown = [name for name in families if name not in FAMILIES]
    if unknown:
        raise UserError(f"family {unknown[0]!r} is unknown: choose from "
                        + ", ".join(map(repr, FAMILIES)))
    rows: list[dict[str, Any]] = []
    shapes = shapes or (GPU_SHAPES if device.type == "cuda" else CPU_SHAPES)
    with kept_when_interrupted(rows, say):
        for shape in shapes:
            for name in families:
                _bench_family(rows, name, shape, dtype, device, repeats, say)
            if shape == shapes[0]:
                carry_tuning()
    for row in rows:
        tunes_itself = FAMILIES[row["family"]].peers[row["peer"]].needs
        if (row["batch"], row["length"], row["heads"]) != tuple(shapes[0]) and tunes_itself:
            row["note"] = row["note"] or f"tuned at {shapes[0]}"
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    frame.attrs["settings"] = chosen_settings()
    return frame


def _bench_family(
    rows: list[dict[str, Any]], name: str, shape: Shape, dtype: torch.dtype, device: torch.device,
    repeats: int, say: Callable[[str], None],
) -> None:
    # The heads stay: many kernels are compiled anew for another number of them.
    family, reduced = FAMILIES[name], (min(shape[0], 2), min(shape[1], 200), shape[2])
    bench_peers(
        rows, family.peers, lambda small: family.make(reduced if small else shape, dtype, device),
        family.exact, device, repeats, lambda line: say(f"{shape} {name}, {line}"),
        batch=shape[0], length=shape[1], heads=shape[2], family=name)
    if device.type == "cuda":
        torch.cuda.empty_cache()
