"""Everything of an SSM layer between its two large projections, as one operator on the GPU.

``torch.ops.mambabyte.mixer`` is the composition of the same kernels in the definition,
:class:`mambabyte.model.families.mamba.MambaMixer`: convolution with SiLU, two small products, gated
scan. Forwards it is no faster than that. Backwards each part leaves its gradients where the next
product reads them, so that no pass over memory only adds two of them up or puts them side by side.
They are columns of

- ``d_rows`` (B, L, 3D): ddelta, later overwritten by dx | dz | du. The first two thirds are the
  gradient of xz; du takes up the gradient through ``x_proj`` within that product, in float32.
- ``d_parts`` (B, L, R + 2N): of the low-rank step | dB | dC, which is the gradient of u x_proj^T.

Of full rank, without ``dt_proj``, the step size is the first D columns of that product itself, and
``d_rows`` is (B, L, 4D + 2N): dx | dz | du | d_parts.

What it keeps for the backward is what the composition keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambabyte.errors import UserError
from mambabyte.ops.arguments import check_tensors
from mambabyte.ops.conv import cuda as cuda_conv
from mambabyte.ops.conv.operator import DTYPES, TAPS, torch_causal_conv
from mambabyte.ops.library import Tensors, define, wants_gradient
from mambabyte.ops.scan import cuda as cuda_scan
from mambabyte.ops.scan import plan as cuda_plan
from mambabyte.ops.scan.operator import MAX_STATES, scan_in_torch

__all__ = ["fused_mixer"]

DEVICES = ("cuda", "meta")
Arrive = Callable[[Tensor, Tensor], Tensor]
Leave = Callable[[Tensor], Tensor]


def fused_mixer(
    xz: Tensor, conv_weight: Tensor, conv_bias: Tensor, x_proj: Tensor, dt_proj: Tensor | None,
    dt_bias: Tensor, A: Tensor, D: Tensor, ages: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """From in_proj's output to out_proj's input, for sequences that begin without a state.

    Shapes: xz (B, L, 2D) on a GPU; conv_weight (D, K), K from 2 to 8; conv_bias (D,); x_proj
    (R + 2N, D), N <= 64; dt_proj (D, R), R >= 1; dt_bias (D,), added before the softplus; A (D, N);
    D (D,). Both products are fastest with R a multiple of 8. Without dt_proj R is D, and the first
    D rows of x_proj give the step sizes themselves. Returns y (B, L, D), the
    convolution's tail (B, K-1, D) and the scan's state (B, D, N). Gradients, of first order, flow
    to all inputs and through all results. ``ages`` (B, L) as of ``document_ages``, where documents
    lie one behind another.

    xz, x_proj, dt_proj, y and the tail share a dtype: bfloat16, float16 or float32; under autocast
    they are cast to its dtype. The rest is float32.

    Raises UserError for shapes, dtypes or devices that do not fit.
    """
    if xz.device.type not in DEVICES:
        raise UserError(f"xz is on {xz.device}: the fused mixer runs on a GPU")
    inputs = (xz, conv_weight.float(), conv_bias.float(), x_proj, dt_proj, dt_bias.float(),
              A.float(), D.float(), ages)  # fmt: skip
    y, tail, state, *_ = _mixer(*inputs, wants_gradient(*inputs))
    return y, tail, state


def check(
    xz: Tensor, conv_weight: Tensor, conv_bias: Tensor, x_proj: Tensor, dt_proj: Tensor | None,
    dt_bias: Tensor, A: Tensor, D: Tensor, ages: Tensor | None,
) -> None:  # fmt: skip
    """Raise UserError for shapes, dtypes or devices that :func:`fused_mixer` does not take."""
    if xz.ndim != 3 or not xz.shape[1] * xz.shape[2] or xz.shape[2] % 2:
        raise UserError(f"xz has shape {tuple(xz.shape)}: expected (batch, length, 2 channels), "
                        "the last two at least 1")
    channels = xz.shape[2] // 2
    taps, states = (0 if t is None or not t.ndim else t.shape[-1] for t in (conv_weight, A))
    rank = _rank(xz, dt_proj)
    if taps not in TAPS or not 1 <= states <= MAX_STATES or not rank:
        raise UserError(
            f"got {taps} taps, {states} states and rank {rank}: the fused mixer takes {TAPS[0]} to "
            f"{TAPS[-1]} taps, 1 to {MAX_STATES} states and a rank of at least 1"
        )
    wide = torch.float32
    check_tensors("xz", xz, None, DTYPES["cuda"], (
        ("conv_weight", conv_weight, (channels, taps), wide),
        ("conv_bias", conv_bias, (channels,), wide),
        ("x_proj", x_proj, (rank + 2 * states, channels), xz.dtype),
        ("dt_proj?", dt_proj, (channels, rank), xz.dtype),
        ("dt_bias", dt_bias, (channels,), wide),
        ("A", A, (channels, states), wide),
        ("D", D, (channels,), wide),
        ("ages?", ages, xz.shape[:2], torch.uint8),
    ))  # fmt: skip


def _check_backward(
    dy: Tensor, dtail: Tensor | None, dstate: Tensor | None, xz: Tensor, *args: Tensor
) -> None:
    *weights, u, parts, delta, saved = args
    check(xz, *weights)
    conv_weight, _, x_proj, dt_proj, _, A, _, _ = weights
    batch, length, both = xz.shape
    channels, states = A.shape
    row = (batch, length, both // 2)
    kept = cuda_plan.saved_shape(*row, states, xz.dtype)
    check_tensors("xz", xz, None, DTYPES["cuda"], (
        ("dy", dy, row, xz.dtype),
        ("dtail?", dtail, (batch, conv_weight.shape[1] - 1, channels), xz.dtype),
        ("dstate?", dstate, (batch, channels, states), torch.float32),
        ("u", u, row, xz.dtype),
        ("parts", parts, (batch, length, x_proj.shape[0]), xz.dtype),
        ("delta", delta, (0,) if dt_proj is None else row, xz.dtype),
        ("saved", saved, kept, torch.float32),
    ))  # fmt: skip


# -------------------------------------------------------------------------------------- operator

_NAMES = ("xz", "conv_weight", "conv_bias", "x_proj", "dt_proj", "dt_bias", "A", "D")
_ABSENT = ("dt_proj", "ages")  # what may be None
_INPUTS = ", ".join(f"Tensor{'?' * (name in _ABSENT)} {name}" for name in (*_NAMES, "ages"))


def forward(
    xz: Tensor, conv_weight: Tensor, conv_bias: Tensor, x_proj: Tensor, dt_proj: Tensor | None,
    dt_bias: Tensor, A: Tensor, D: Tensor, ages: Tensor | None, save: bool, *,
    before: Tensor | None = None, arrive: Arrive | None = None,
) -> Tensors:  # fmt: skip
    """Results of :func:`fused_mixer`, and with ``save`` what :func:`gradients` takes, else empty.

    For a stretch of a longer sequence ``before`` (B, K - 1, D) is the convolution's tail from
    before it, and ``arrive`` that of :func:`mambabyte.ops.scan.cuda.forward`.
    """
    x, z = xz.chunk(2, dim=-1)
    rank, states = _rank(xz, dt_proj), A.shape[1]
    u, tail = cuda_conv.forward(x, conv_weight, conv_bias, before, True, ages)
    parts = F.linear(u, x_proj)
    low_rank, B, C = parts.split([rank, states, states], dim=-1)
    delta = low_rank if dt_proj is None else F.linear(low_rank, dt_proj)
    y, state, saved = cuda_scan.forward(
        u, delta, A, B, C, D, z, dt_bias, None, True, save, arrive, ages)
    if dt_proj is None:  # it is a part of another result
        delta = y.new_empty(0)
    if not save:
        u, parts, delta = (y.new_empty(0) for _ in range(3))
    return y, tail, state, u, parts, delta, saved


def backward(*args: Any) -> Tensors:
    """:func:`gradients` of a sequence that begins without a state: those of the inputs alone."""
    return gradients(*args)[:-1]


def gradients(
    dy: Tensor, dtail: Tensor | None, dstate: Tensor | None, xz: Tensor, conv_weight: Tensor,
    conv_bias: Tensor, x_proj: Tensor, dt_proj: Tensor | None, dt_bias: Tensor, A: Tensor,
    D: Tensor, ages: Tensor | None, u: Tensor, parts: Tensor, delta: Tensor, saved: Tensor, *,
    before: Tensor | None = None, entered: Tensor | None = None, leave: Leave | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """Of the inputs of :func:`forward`, in their order, and of ``before``: None or empty for what
    is absent. ``dy``, ``dtail`` and ``dstate`` are those of its results, ``entered`` is the state
    that ``arrive`` gave, ``leave`` that of :func:`mambabyte.ops.scan.cuda.backward`."""
    # Gradients are left between those of ``parts``, so that its rows must lie one behind another.
    u, parts, delta = u.contiguous(), parts.contiguous(), delta.contiguous()
    x, z = xz.chunk(2, dim=-1)
    widths = [_rank(xz, dt_proj), A.shape[1], A.shape[1]]
    low_rank, B, C = parts.split(widths, dim=-1)
    d_rows, ends = _d_rows(xz, x_proj, dt_proj), 3 * x.shape[2]
    dx, dz, du = d_rows[..., :ends].chunk(3, dim=-1)
    d_parts = d_rows[..., ends:] if dt_proj is None else torch.empty_like(parts)
    dlow_rank, dB, dC = d_parts.split(widths, dim=-1)
    ddelta = dlow_rank if dt_proj is None else dx  # which then takes its place
    delta = low_rank if dt_proj is None else delta
    _, _, dA, _, _, dD, _, ddt_bias, _ = cuda_scan.backward(
        dy, dstate, u, delta, A, B, C, D, z, dt_bias, entered, saved, True,
        into=(du, ddelta, dz, dB, dC), leave=leave, ages=ages,
    )  # fmt: skip

    ddt_proj = None
    if dt_proj is not None:
        torch.mm(_flat(ddelta), dt_proj, out=_flat(dlow_rank))
        ddt_proj = _flat(ddelta).t() @ _flat(low_rank)
    _flat(du).addmm_(_flat(d_parts), x_proj)
    dx_proj = _flat(d_parts).t() @ _flat(u)

    _, dconv_weight, dconv_bias, dbefore = cuda_conv.backward(
        du, dtail, x, conv_weight, conv_bias, before, True, dx, ages)
    dxz = d_rows[..., : xz.shape[2]]
    none = dxz.new_empty(0)  # for the ages
    return dxz, dconv_weight, dconv_bias, dx_proj, ddt_proj, ddt_bias, dA, dD, none, dbefore


def _rank(xz: Tensor, dt_proj: Tensor | None) -> int:
    if dt_proj is None:
        return xz.shape[2] // 2
    return dt_proj.shape[-1] if dt_proj.ndim else 0


def _d_rows(xz: Tensor, x_proj: Tensor, dt_proj: Tensor | None) -> Tensor:
    batch, length, both = xz.shape
    return xz.new_empty(batch, length, both // 2 * 3 + (len(x_proj) if dt_proj is None else 0))


def _flat(x: Tensor) -> Tensor:
    """(B, L, ..) -> (B L, ..), of columns too without a copy."""
    return x.flatten(0, 1)


def _forward_shapes(
    xz: Tensor, conv_weight: Tensor, conv_bias: Tensor, x_proj: Tensor, dt_proj: Tensor | None,
    dt_bias: Tensor, A: Tensor, D: Tensor, ages: Tensor | None, save: bool,
) -> Tensors:  # fmt: skip
    batch, length, both = xz.shape
    channels, states = both // 2, A.shape[1]
    kept: list[tuple[int, ...]] = [(0,)] * 4
    if save:
        row = (batch, length, channels)
        saved = cuda_plan.saved_shape(batch, length, channels, states, xz.dtype)
        kept = [row, (batch, length, x_proj.shape[0]), (0,) if dt_proj is None else row, saved]
    *in_dtype, saved = kept
    return (
        xz.new_empty(batch, length, channels),
        xz.new_empty(batch, conv_weight.shape[1] - 1, channels),
        A.new_empty(batch, channels, states),
        *(xz.new_empty(shape) for shape in in_dtype),
        A.new_empty(saved),
    )


def _backward_shapes(
    dy: Tensor, dtail: Tensor | None, dstate: Tensor | None, xz: Tensor, *tensors: Tensor | None
) -> Tensors:
    weights = tensors[: len(_NAMES) - 1]
    _, _, x_proj, dt_proj, *_ = weights
    assert x_proj is not None
    dxz = _d_rows(xz, x_proj, dt_proj)[..., : xz.shape[2]]
    none = dxz.new_empty(0)
    return dxz, *(none if t is None else t.new_empty(t.shape) for t in weights), none


def _in_torch(
    xz: Tensor, conv_weight: Tensor, conv_bias: Tensor, x_proj: Tensor, dt_proj: Tensor | None,
    dt_bias: Tensor, A: Tensor, D: Tensor, ages: Tensor | None = None,
) -> Tensors:  # fmt: skip
    x, z = xz.chunk(2, dim=-1)
    rank, states = _rank(xz, dt_proj), A.shape[1]
    u, tail = torch_causal_conv(
        x, conv_weight.to(x.dtype), conv_bias.to(x.dtype), None, True, ages)
    low_rank, B, C = F.linear(u, x_proj).split([rank, states, states], dim=-1)
    delta = low_rank if dt_proj is None else F.linear(low_rank, dt_proj)
    y, state = scan_in_torch(u, delta, A, B, C, D, z, dt_bias, None, True, ages)
    return y, tail, state


_mixer = define(
    "mixer",
    _INPUTS,
    "y, tail, state",
    kept="u, parts, delta, saved",
    forward={"cuda": forward},
    backward={"cuda": backward},
    check=check,
    check_backward=_check_backward,
    shapes=_forward_shapes,
    backward_shapes=_backward_shapes,
    in_torch=_in_torch,
    cast={"cuda": ("xz", "x_proj", "dt_proj")},
)
