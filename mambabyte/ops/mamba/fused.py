"""Everything of an SSM layer between its two large projections, as one operator on the GPU.

``torch.ops.mambabyte.mixer`` is the composition in :class:`mambabyte.model.mamba.MambaMixer` (the
definition) of the same kernels: convolution with SiLU, two small products, gated scan. Forwards it
is no faster than that. Backwards each part leaves its gradients where the next product reads them,
so that no pass over memory only adds two of them up or puts them side by side. They are columns of

- ``d_rows`` (B, L, 3D): ddelta, later overwritten by dx | dz | du. The first two thirds are the
  gradient of xz; du takes up the gradient through ``x_proj`` within that product, in float32.
- ``d_parts`` (B, L, R + 2N): of the low-rank step | dB | dC, which is the gradient of u x_proj^T.

What it keeps for the backward is what the composition keeps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambabyte.errors import UserError
from mambabyte.ops.conv import cuda as cuda_conv
from mambabyte.ops.mamba.step import check_tensor
from mambabyte.ops.scan import cuda as cuda_scan
from mambabyte.ops.scan import plan as cuda_plan
from mambabyte.ops.scan.operator import MAX_STATES, Tensors, differentiable, once_only

__all__ = ["fused_mixer"]


def fused_mixer(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """From in_proj's output to out_proj's input, for sequences that begin without a state.

    Shapes: xz (B, L, 2D) on a GPU; conv_weight (D, K), K from 2 to 8; conv_bias (D,); x_proj
    (R + 2N, D), N <= 64; dt_proj (D, R), R >= 1; dt_bias (D,), added before the softplus; A (D, N);
    D (D,). Both products are fastest with R a multiple of 8. Returns y (B, L, D), the
    convolution's tail (B, K-1, D) and the scan's state (B, D, N). Gradients, of first order, flow
    to all inputs and through all results.

    xz, x_proj, dt_proj, y and the tail share a dtype: bfloat16, float16 or float32; under autocast
    they are cast to its dtype. The rest is float32.

    Raises UserError for shapes, dtypes or devices that do not fit.
    """
    inputs = (xz, conv_weight.float(), conv_bias.float(), x_proj, dt_proj, dt_bias.float(),
              A.float(), D.float())  # fmt: skip
    _check(*inputs)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    y, tail, state, *_ = _mixer(*inputs, save)
    return y, tail, state


def _check(
    xz: Tensor, conv_weight: Tensor, conv_bias: Tensor, x_proj: Tensor, dt_proj: Tensor,
    dt_bias: Tensor, A: Tensor, D: Tensor,
) -> None:  # fmt: skip
    if xz.device.type != "cuda":
        raise UserError(f"xz is on {xz.device}: the fused mixer runs on a GPU")
    if xz.ndim != 3 or 0 in xz.shape or xz.shape[2] % 2:
        raise UserError(f"xz has shape {tuple(xz.shape)}: expected (batch, length, 2 channels)")
    channels = xz.shape[2] // 2
    taps, rank, states = conv_weight.shape[-1], dt_proj.shape[-1], A.shape[-1]
    if not 2 <= taps <= cuda_conv.MAX_TAPS or not 1 <= states <= MAX_STATES or not rank:
        raise UserError(
            f"got {taps} taps, {states} states and rank {rank}: the fused mixer takes 2 to "
            f"{cuda_conv.MAX_TAPS} taps, 1 to {MAX_STATES} states and a rank of at least 1"
        )
    for name, tensor, shape in (
        ("conv_weight", conv_weight, (channels, taps)),
        ("conv_bias", conv_bias, (channels,)),
        ("x_proj", x_proj, (rank + 2 * states, channels)),
        ("dt_proj", dt_proj, (channels, rank)),
        ("dt_bias", dt_bias, (channels,)),
        ("A", A, (channels, states)),
        ("D", D, (channels,)),
    ):
        check_tensor(name, tensor, shape, xz)
    if not torch.is_autocast_enabled("cuda") and (
        xz.dtype not in cuda_conv.ELEMENTS or {x_proj.dtype, dt_proj.dtype} != {xz.dtype}
    ):
        raise UserError(
            f"xz is {xz.dtype}, x_proj {x_proj.dtype}, dt_proj {dt_proj.dtype}: they must share "
            f"one of {', '.join(map(str, cuda_conv.ELEMENTS))}"
        )


# -------------------------------------------------------------------------------------- operator

_LIBRARY = torch.library.Library("mambabyte", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_NAMES = ("xz", "conv_weight", "conv_bias", "x_proj", "dt_proj", "dt_bias", "A", "D")
_INPUTS = ", ".join(f"Tensor {name}" for name in _NAMES)
_KEPT = ("u", "parts", "delta", "saved")  # for the backward; empty unless ``save``
_LIBRARY.define(
    f"mixer({_INPUTS}, bool save) -> (Tensor y, Tensor tail, Tensor state, "
    + ", ".join(f"Tensor {name}" for name in _KEPT) + ")",
    tags=_TAGS,
)  # fmt: skip
_LIBRARY.define(
    f"mixer_backward(Tensor dy, Tensor? dtail, Tensor? dstate, {_INPUTS}, "
    + ", ".join(f"Tensor {name}" for name in _KEPT)
    + ") -> (" + ", ".join(f"Tensor d{name}" for name in _NAMES) + ")",
    tags=_TAGS,
)  # fmt: skip
_mixer = torch.ops.mambabyte.mixer.default
_mixer_backward = torch.ops.mambabyte.mixer_backward.default


def forward(
    xz: Tensor, conv_weight: Tensor, conv_bias: Tensor, x_proj: Tensor, dt_proj: Tensor,
    dt_bias: Tensor, A: Tensor, D: Tensor, save: bool,
) -> Tensors:  # fmt: skip
    x, z = xz.chunk(2, dim=-1)
    rank, states = dt_proj.shape[1], A.shape[1]
    u, tail = cuda_conv.forward(x, conv_weight, conv_bias, None, True)
    parts = F.linear(u, x_proj)
    low_rank, B, C = parts.split([rank, states, states], dim=-1)
    delta = F.linear(low_rank, dt_proj)
    y, state, saved = cuda_scan.forward(u, delta, A, B, C, D, z, dt_bias, None, True, save)
    if not save:
        u, parts, delta = (y.new_empty(0) for _ in range(3))
    return y, tail, state, u, parts, delta, saved


def backward(
    dy: Tensor, dtail: Tensor | None, dstate: Tensor | None, xz: Tensor, conv_weight: Tensor,
    conv_bias: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor,
    u: Tensor, parts: Tensor, delta: Tensor, saved: Tensor,
) -> Tensors:  # fmt: skip
    x, z = xz.chunk(2, dim=-1)
    widths = [dt_proj.shape[1], A.shape[1], A.shape[1]]
    low_rank, B, C = parts.split(widths, dim=-1)
    d_rows, d_parts = _d_rows(xz), torch.empty_like(parts)
    ddelta, dz, du = d_rows.chunk(3, dim=-1)
    dlow_rank, dB, dC = d_parts.split(widths, dim=-1)
    _, _, dA, _, _, dD, _, ddt_bias, _ = cuda_scan.backward(
        dy, dstate, u, delta, A, B, C, D, z, dt_bias, None, saved, True,
        into=(du, ddelta, dz, dB, dC),
    )  # fmt: skip

    torch.mm(_flat(ddelta), dt_proj, out=_flat(dlow_rank))
    ddt_proj = _flat(ddelta).t() @ _flat(low_rank)
    _flat(du).addmm_(_flat(d_parts), x_proj)
    dx_proj = _flat(d_parts).t() @ _flat(u)

    dx = ddelta  # which is used up
    _, dconv_weight, dconv_bias, _ = cuda_conv.backward(
        du, dtail, x, conv_weight, conv_bias, None, True, dx)
    dxz = d_rows[..., : xz.shape[2]]
    return dxz, dconv_weight, dconv_bias, dx_proj, ddt_proj, ddt_bias, dA, dD


def _d_rows(xz: Tensor) -> Tensor:
    batch, length, both = xz.shape
    return xz.new_empty(batch, length, both // 2 * 3)


def _flat(x: Tensor) -> Tensor:
    """(B, L, ..) -> (B L, ..), of columns too without a copy."""
    return x.flatten(0, 1)


_LIBRARY.impl("mixer", forward, "CUDA")
_LIBRARY.impl("mixer_backward", backward, "CUDA")


@torch.library.register_fake("mambabyte::mixer", lib=_LIBRARY)
def _forward_shapes(
    xz: Tensor, conv_weight: Tensor, conv_bias: Tensor, x_proj: Tensor, dt_proj: Tensor,
    dt_bias: Tensor, A: Tensor, D: Tensor, save: bool,
) -> Tensors:  # fmt: skip
    batch, length, both = xz.shape
    channels, states = both // 2, A.shape[1]
    kept: list[tuple[int, ...]] = [(0,)] * 4
    if save:
        row = (batch, length, channels)
        saved = cuda_plan.saved_shape(batch, length, channels, states, xz.dtype)
        kept = [row, (batch, length, x_proj.shape[0]), row, saved]
    *in_dtype, saved = kept
    return (
        xz.new_empty(batch, length, channels),
        xz.new_empty(batch, conv_weight.shape[1] - 1, channels),
        A.new_empty(batch, channels, states),
        *(xz.new_empty(shape) for shape in in_dtype),
        A.new_empty(saved),
    )


@torch.library.register_fake("mambabyte::mixer_backward", lib=_LIBRARY)
def _backward_shapes(
    dy: Tensor, dtail: Tensor | None, dstate: Tensor | None, xz: Tensor, *tensors: Tensor
) -> Tensors:
    dxz = _d_rows(xz)[..., : xz.shape[2]]
    return dxz, *(t.new_empty(t.shape) for t in tensors[: len(_NAMES) - 1])


class _Mixer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensors:
        with torch._C._AutoDispatchBelowAutograd():
            outputs = _mixer(*args)
        kept = outputs[3:]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*kept)
        ctx.save_for_backward(*args[:-1], *kept)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, dtail, dstate, *_ = grads
        tensors = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros_like(tensors[len(_NAMES)])  # u
        gradients = _mixer_backward(dy, dtail, dstate, *tensors)
        wanted = zip(ctx.needs_input_grad[:-1], gradients, strict=True)
        return (*[gradient if needed else None for needed, gradient in wanted], None)


def _autocast(
    xz: Tensor, conv_weight: Tensor, conv_bias: Tensor, x_proj: Tensor, dt_proj: Tensor, *rest: Any
) -> Tensors:
    dtype = torch.get_autocast_dtype("cuda")
    with torch._C._ExcludeDispatchKeyGuard(
        torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)
    ):
        xz, x_proj, dt_proj = (t.to(dtype) for t in (xz, x_proj, dt_proj))
        return _mixer(xz, conv_weight, conv_bias, x_proj, dt_proj, *rest)


_LIBRARY.impl("mixer", differentiable(_mixer, _Mixer), "Autograd")
_LIBRARY.impl(
    "mixer_backward", once_only(_mixer_backward, "the fused mixer", "scan_form='chunked'"),
    "Autograd",
)
_LIBRARY.impl("mixer", _autocast, "AutocastCUDA")
