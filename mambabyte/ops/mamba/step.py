"""One streaming step of a Mamba layer as operators, on the GPU (CUDA graphs too) and the CPU.

``mamba_step`` is everything between in_proj and out_proj; ``scan_step`` is the scan at length 1.
Both are functions of the state: they take one and return a new one. Inference only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambabyte.errors import UserError
from mambabyte.ops.arguments import check_tensors
from mambabyte.ops.conv.operator import torch_causal_conv
from mambabyte.ops.library import Tensors, define
from mambabyte.ops.scan.operator import MAX_STATES, fused_available, scan_in_torch

__all__ = ["mamba_step", "scan_step"]

MAX_TAPS = 8
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def mamba_step(
    x: Tensor, z: Tensor, tail: Tensor, state: Tensor, conv_weight: Tensor,
    conv_bias: Tensor | None, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A: Tensor,
    D: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """One byte through a layer's convolution, projections and scan.

    Shapes: x, z (B, D), the halves of in_proj's output; tail (B, K-1, D); state (B, D, N);
    conv_weight (D, K); conv_bias (D,); x_proj (R + 2N, D); dt_proj (D, R); dt_bias (D,); A (D, N);
    D (D,). x, z and tail share a dtype (bfloat16, float16, float32); the weights share that dtype
    or float32; dt_bias, A, D and the state are float32. Returns y (B, D), before out_proj, the new
    tail and the new state.

    Raises UserError for what does not fit, and where a gradient is asked for.
    """
    _check_device(x)
    return _mamba_step(
        x, z, tail.to(x.dtype), state, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D
    )


def scan_step(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, state: Tensor, delta_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """The scan at length 1: u, delta, z (B, D); B, C (B, N); state (B, D, N).

    Returns y (B, D) and the new state. Dtypes as in :func:`mamba_step`. Raises UserError.
    """
    _check_device(u)
    return _scan_step(
        u, delta, A, B, C, D, z, delta_bias, state, delta_softplus
    )


def _check_device(x: Tensor) -> None:
    available, reason = fused_available(x.device)
    if not available:
        raise UserError(f"no fused step on {x.device}: {reason}; use the scan at length 1")


def _check_rows(name: str, x: Tensor) -> tuple[int, int]:
    if x.ndim != 2 or not x.shape[1] or x.dtype not in DTYPES:
        raise UserError(
            f"a step takes {name} (batch, channels) in {', '.join(map(str, DTYPES))}: got "
            f"{tuple(x.shape)}, {x.dtype}"
        )
    return x.shape[0], x.shape[1]


def _check_step(
    x: Tensor, z: Tensor, tail: Tensor, state: Tensor, conv_weight: Tensor,
    conv_bias: Tensor | None, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A: Tensor,
    D: Tensor,
) -> None:  # fmt: skip
    batch, channels = _check_rows("x", x)
    taps, rank, states = (0 if t is None or not t.ndim else t.shape[-1]
                          for t in (conv_weight, dt_proj, A))
    if not 2 <= taps <= MAX_TAPS or not 1 <= states <= MAX_STATES:
        raise UserError(
            f"got {taps} taps and {states} states: the fused step takes 2 to {MAX_TAPS} taps and "
            f"1 to {MAX_STATES} states"
        )
    weights = x_proj.dtype if isinstance(x_proj, Tensor) else None
    if weights not in (x.dtype, torch.float32):
        raise UserError(f"x_proj is {weights}: conv_weight, x_proj and dt_proj must share a dtype, "
                        "x's or float32")
    check_tensors("x", x, None, DTYPES, (
        ("z", z, (batch, channels), x.dtype),
        ("tail", tail, (batch, taps - 1, channels), x.dtype),
        ("state", state, (batch, channels, states), None),
        ("conv_weight", conv_weight, (channels, taps), weights),
        ("conv_bias?", conv_bias, (channels,), None),
        ("x_proj", x_proj, (rank + 2 * states, channels), weights),
        ("dt_proj", dt_proj, (channels, rank), weights),
        ("dt_bias", dt_bias, (channels,), None),
        ("A", A, (channels, states), None),
        ("D", D, (channels,), None),
    ))  # fmt: skip


def _check_scan_step(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, delta_bias: Tensor | None, state: Tensor, delta_softplus: bool,
) -> None:  # fmt: skip
    batch, channels = _check_rows("u", u)
    states = 0 if A is None or not A.ndim else A.shape[-1]
    if not 1 <= states <= MAX_STATES:
        raise UserError(f"got {states} states: the fused step takes 1 to {MAX_STATES} states")
    check_tensors("u", u, None, DTYPES, (
        ("delta", delta, (batch, channels), None),
        ("A", A, (channels, states), None),
        ("B", B, (batch, states), None),
        ("C", C, (batch, states), None),
        ("D?", D, (channels,), None),
        ("z?", z, (batch, channels), None),
        ("delta_bias?", delta_bias, (channels,), None),
        ("state", state, (batch, channels, states), None),
    ))  # fmt: skip


# ------------------------------------------------------------------------------------- operators

def _on_gpu(name: str) -> Any:
    def step(*args: Any) -> tuple[Tensor, ...]:
        from mambabyte.ops.mamba import cuda as cuda_step

        return getattr(cuda_step, name)(*args)

    return step


def _mamba_step_on_cpu(
    x: Tensor, z: Tensor, tail: Tensor, state: Tensor, conv_weight: Tensor,
    conv_bias: Tensor | None, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A: Tensor,
    D: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from mambabyte.ops.scan import cpu as native_scan

    states, rank = A.shape[1], dt_proj.shape[1]
    u, tail = native_scan.conv_step(x, conv_weight, conv_bias, tail)
    low, B, C = F.linear(u, x_proj.to(u.dtype)).split([rank, states, states], dim=1)
    delta = F.linear(low, dt_proj.to(u.dtype))
    y, state = native_scan.scan_step(u, delta, A, B, C, D, z, dt_bias, state, True)
    return y, tail, state


def _scan_step_on_cpu(*args: Any) -> tuple[Tensor, Tensor]:
    from mambabyte.ops.scan import cpu as native_scan

    return native_scan.scan_step(*args)


def _mamba_step_shapes(
    x: Tensor, z: Tensor, tail: Tensor, state: Tensor, *_: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), tail.new_empty(tail.shape), state.new_empty(
        state.shape, dtype=torch.float32)


def _scan_step_shapes(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, delta_bias: Tensor | None, state: Tensor, delta_softplus: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return u.new_empty(u.shape), state.new_empty(state.shape, dtype=torch.float32)


def _mamba_step_in_torch(
    x: Tensor, z: Tensor, tail: Tensor, state: Tensor, conv_weight: Tensor,
    conv_bias: Tensor | None, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A: Tensor,
    D: Tensor,
) -> Tensors:  # fmt: skip
    dtype, (rank, states) = x.dtype, (dt_proj.shape[1], A.shape[1])
    bias = None if conv_bias is None else conv_bias.to(dtype)
    u, tail = torch_causal_conv(x[:, None], conv_weight.to(dtype), bias, tail, True)
    low, B, C = F.linear(u[:, 0], x_proj.to(dtype)).split([rank, states, states], dim=1)
    delta = F.linear(low, dt_proj.to(dtype))
    y, state = _scan_step_in_torch(u[:, 0], delta, A, B, C, D, z, dt_bias, state, True)
    return y, tail, state


def _scan_step_in_torch(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, delta_bias: Tensor | None, state: Tensor, delta_softplus: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows = (None if t is None else t[:, None] for t in (u, delta, B, C, z))
    u, delta, B, C, z = rows  # type: ignore[assignment]
    y, state = scan_in_torch(u, delta, A, B, C, D, z, delta_bias, state, delta_softplus)
    return y[:, 0], state


_mamba_step = define(
    "mamba_step",
    "Tensor x, Tensor z, Tensor tail, Tensor state, Tensor conv_weight, Tensor? conv_bias, "
    "Tensor x_proj, Tensor dt_proj, Tensor dt_bias, Tensor A, Tensor D",
    "y, new_tail, new_state",
    forward={"cpu": _mamba_step_on_cpu, "cuda": _on_gpu("mamba_step")},
    check=_check_step,
    shapes=_mamba_step_shapes,
    in_torch=_mamba_step_in_torch,
)
_scan_step = define(
    "scan_step",
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? delta_bias, Tensor state",
    "y, new_state",
    flags="bool delta_softplus",
    forward={"cpu": _scan_step_on_cpu, "cuda": _on_gpu("scan_step")},
    check=_check_scan_step,
    shapes=_scan_step_shapes,
    in_torch=_scan_step_in_torch,
)
