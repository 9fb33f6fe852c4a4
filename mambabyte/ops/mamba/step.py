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
from mambabyte.ops.scan.operator import MAX_STATES, differentiable, fused_available

__all__ = ["mamba_step", "scan_step"]

MAX_TAPS = 8
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def mamba_step(
    x: Tensor,
    z: Tensor,
    tail: Tensor,
    state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A: Tensor,
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
    batch, channels = _check_rows(x, z)
    taps, (states, rank) = conv_weight.shape[-1], (A.shape[-1], dt_proj.shape[-1])
    if not 2 <= taps <= MAX_TAPS or not 1 <= states <= MAX_STATES:
        raise UserError(
            f"got {taps} taps and {states} states: the fused step takes 2 to {MAX_TAPS} taps and "
            f"1 to {MAX_STATES} states"
        )
    for name, tensor, shape in (
        ("tail", tail, (batch, taps - 1, channels)),
        ("state", state, (batch, channels, states)),
        ("conv_weight", conv_weight, (channels, taps)),
        ("conv_bias", conv_bias, (channels,)),
        ("x_proj", x_proj, (rank + 2 * states, channels)),
        ("dt_proj", dt_proj, (channels, rank)),
        ("dt_bias", dt_bias, (channels,)),
        ("A", A, (channels, states)),
        ("D", D, (channels,)),
    ):
        check_tensor(name, tensor, shape, x)
    weights = x_proj.dtype
    if any(w.dtype != weights for w in (conv_weight, dt_proj)) or weights not in _DTYPES:
        raise UserError("conv_weight, x_proj and dt_proj must share a dtype, x's or float32")
    return torch.ops.mambabyte.mamba_step.default(
        x, z, tail.to(x.dtype), state, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D
    )


def scan_step(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    state: Tensor,
    delta_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """The scan at length 1: u, delta, z (B, D); B, C (B, N); state (B, D, N).

    Returns y (B, D) and the new state. Dtypes as in :func:`mamba_step`. Raises UserError.
    """
    batch, channels = _check_rows(u, delta)
    states = A.shape[-1]
    for name, tensor, shape in (
        ("z", z, (batch, channels)),
        ("A", A, (channels, states)),
        ("B", B, (batch, states)),
        ("C", C, (batch, states)),
        ("D", D, (channels,)),
        ("delta_bias", delta_bias, (channels,)),
        ("state", state, (batch, channels, states)),
    ):
        check_tensor(name, tensor, shape, u)
    return torch.ops.mambabyte.scan_step.default(
        u, delta, A, B, C, D, z, delta_bias, state, delta_softplus
    )


def _check_rows(x: Tensor, like: Tensor) -> tuple[int, int]:
    if x.ndim != 2 or 0 in x.shape or x.dtype not in _DTYPES:
        raise UserError(
            f"a step takes (batch, channels) in {', '.join(map(str, _DTYPES))}: got "
            f"{tuple(x.shape)}, {x.dtype}"
        )
    available, reason = fused_available(x.device)
    if not available:
        raise UserError(f"no fused step on {x.device}: {reason}; use the scan at length 1")
    check_tensor("its companion", like, tuple(x.shape), x)
    return x.shape[0], x.shape[1]


def check_tensor(name: str, tensor: Tensor | None, shape: tuple[int, ...], x: Tensor) -> None:
    """UserError unless ``tensor`` is None or has that shape and is on the device of ``x``."""
    if tensor is None:
        return
    if tensor.shape != shape or tensor.device != x.device:
        raise UserError(
            f"{name} is {tuple(tensor.shape)} on {tensor.device}: expected {shape} on {x.device}"
        )


# ------------------------------------------------------------------------------------- operators

_LIBRARY = torch.library.Library("mambabyte", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_LIBRARY.define(
    "mamba_step(Tensor x, Tensor z, Tensor tail, Tensor state, Tensor conv_weight, "
    "Tensor? conv_bias, Tensor x_proj, Tensor dt_proj, Tensor dt_bias, Tensor A, Tensor D) "
    "-> (Tensor y, Tensor new_tail, Tensor new_state)",
    tags=_TAGS,
)
_LIBRARY.define(
    "scan_step(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? delta_bias, Tensor state, bool delta_softplus) -> (Tensor y, Tensor new_state)",
    tags=_TAGS,
)


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


for _name, _on_cpu in (("mamba_step", _mamba_step_on_cpu), ("scan_step", _scan_step_on_cpu)):
    _LIBRARY.impl(_name, _on_gpu(_name), "CUDA")
    _LIBRARY.impl(_name, _on_cpu, "CPU")


@torch.library.register_fake("mambabyte::mamba_step", lib=_LIBRARY)
def _mamba_step_shapes(
    x: Tensor, z: Tensor, tail: Tensor, state: Tensor, *_: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), tail.new_empty(tail.shape), state.new_empty(state.shape)


@torch.library.register_fake("mambabyte::scan_step", lib=_LIBRARY)
def _scan_step_shapes(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, delta_bias: Tensor | None, state: Tensor, delta_softplus: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return u.new_empty(u.shape), state.new_empty(state.shape)


class _NoGradient:
    """Stands in for an autograd.Function: a step is for inference."""

    @staticmethod
    def apply(*args: object) -> tuple[Tensor, ...]:
        raise UserError("a fused step has no gradient: call it under torch.no_grad()")


for _name in ("mamba_step", "scan_step"):
    _operator = getattr(torch.ops.mambabyte, _name).default
    _LIBRARY.impl(_name, differentiable(_operator, _NoGradient), "Autograd")
