"""One streaming step of a Mamba layer on the GPU, as operators that a CUDA graph can capture.

``mamba_step`` is everything between in_proj and out_proj, in two launches; ``scan_step`` is the
scan at length 1. Both are functions of the state: they return a new one. Inference only.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from mambabyte.errors import UserError
from mambabyte.ops.cuda_conv import ELEMENTS, MAX_TAPS
from mambabyte.ops.nvrtc import Kernel, Program, raw_stream
from mambabyte.ops.operator import MAX_STATES, differentiable

# Each batch row reads the weights anew; with more rows, matrix products are faster.
MOST_ROWS = 32
_SLICE, _LANES = 64, 4  # as in cuda_step.cu


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
    """One byte through a layer's convolution, projections and scan, on a GPU.

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
        _check(name, tensor, shape, x)
    weights = x_proj.dtype
    if any(w.dtype != weights for w in (conv_weight, dt_proj)) or weights not in ELEMENTS:
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
    """The scan at length 1 on a GPU: u, delta, z (B, D); B, C (B, N); state (B, D, N).

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
        _check(name, tensor, shape, u)
    return torch.ops.mambabyte.scan_step.default(
        u, delta, A, B, C, D, z, delta_bias, state, delta_softplus
    )


def _check_rows(x: Tensor, like: Tensor) -> tuple[int, int]:
    if x.ndim != 2 or 0 in x.shape or x.dtype not in ELEMENTS or x.device.type != "cuda":
        raise UserError(
            f"a step takes (batch, channels) on a GPU in {', '.join(map(str, ELEMENTS))}: got "
            f"{tuple(x.shape)}, {x.dtype} on {x.device}"
        )
    _check("its companion", like, tuple(x.shape), x)
    return x.shape[0], x.shape[1]


def _check(name: str, tensor: Tensor | None, shape: tuple[int, ...], x: Tensor) -> None:
    if tensor is None:
        return
    if tensor.shape != shape or tensor.device != x.device:
        raise UserError(
            f"{name} is {tuple(tensor.shape)} on {tensor.device}: expected {shape} on {x.device}"
        )


# --------------------------------------------------------------------------------------- kernels


_PER_LANE = (1, 2, 4, 8, 16)  # states a thread


@functools.cache
def program(dtype: torch.dtype) -> Program:
    """The step kernels for activations of that dtype."""
    element = ELEMENTS[dtype]
    names = [f"scan_step<{element}>"]
    for weight in sorted({element, "float"}):
        names.append(f"step_input<{element}, {weight}>")
        names += [f"step_state<{element}, {weight}, {per}>" for per in _PER_LANE]
    return Program.from_file("cuda_types.cu", "cuda_step.cu", names=names)


@functools.cache
def _step_kernels(
    dtype: torch.dtype, weights: torch.dtype, states: int, device: int
) -> tuple[Kernel, Kernel]:
    types, kernels = f"{ELEMENTS[dtype]}, {ELEMENTS[weights]}", program(dtype)
    per = next(n for n in _PER_LANE if n * _LANES >= states)
    return (
        kernels.kernel(f"step_input<{types}>", device, "PPPPPPPPqiiii"),
        kernels.kernel(f"step_state<{types}, {per}>", device, "PPPPPPPPPPqiiii"),
    )


@functools.cache
def _scan_kernel(dtype: torch.dtype, device: int) -> Kernel:
    return program(dtype).kernel(f"scan_step<{ELEMENTS[dtype]}>", device, "P" * 11 + "qqqqqqiii")


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _mamba_step(
    x: Tensor, z: Tensor, tail: Tensor, state: Tensor, conv_weight: Tensor,
    conv_bias: Tensor | None, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A: Tensor,
    D: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (batch, channels), device = x.shape, x.device.index
    (states, rank), taps = (A.shape[1], dt_proj.shape[1]), conv_weight.shape[1]
    if batch > MOST_ROWS or x_proj.dtype not in (x.dtype, torch.float32):
        return _wide_step(
            x, z, tail, state, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D
        )
    x, z, tail, state = _rows(x), _rows(z), tail.contiguous(), state.float().contiguous()
    conv_weight, x_proj, dt_proj = (w.contiguous() for w in (conv_weight, x_proj, dt_proj))
    conv_bias = None if conv_bias is None else conv_bias.to(x_proj.dtype).contiguous()
    dt_bias, A, D = (p.float().contiguous() for p in (dt_bias, A, D))
    rows, slices = rank + 2 * states, -(-channels // _SLICE)
    aligned = x_proj.data_ptr() % 32 == 0 and channels % 8 == 0
    y = torch.empty((batch, channels), dtype=x.dtype, device=x.device)
    new_tail, new_state = torch.empty_like(tail), torch.empty_like(state)
    scratch = torch.empty(batch * (channels + slices * rows), device=x.device)
    u = scratch.data_ptr()
    parts = u + 4 * batch * channels
    stream = raw_stream(device)
    first, second = _step_kernels(x.dtype, x_proj.dtype, states, device)
    first.launch(
        (slices, batch, 1), (256, 1, 1), 0, stream,
        x.data_ptr(), tail.data_ptr(), conv_weight.data_ptr(), _pointer(conv_bias),
        x_proj.data_ptr(), new_tail.data_ptr(), u, parts,
        x.stride(0), channels, rows, taps, aligned,
    )  # fmt: skip
    second.launch(
        (-(-channels * _LANES // 128), batch, 1), (128, 1, 1), 4 * rows, stream,
        u, parts, z.data_ptr(), state.data_ptr(), dt_proj.data_ptr(), dt_bias.data_ptr(),
        A.data_ptr(), D.data_ptr(), y.data_ptr(), new_state.data_ptr(),
        z.stride(0), channels, states, rank, slices,
    )  # fmt: skip
    return y, new_tail, new_state


def _wide_step(
    x: Tensor, z: Tensor, tail: Tensor, state: Tensor, conv_weight: Tensor,
    conv_bias: Tensor | None, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A: Tensor,
    D: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The same for many rows: the convolution at length 1, two matrix products, a scan step."""
    u, tail = torch.ops.mambabyte.causal_conv.default(
        x.unsqueeze(1),
        conv_weight.float(),
        None if conv_bias is None else conv_bias.float(),
        tail,
        True,
    )
    u, (states, rank) = u.squeeze(1), (A.shape[1], dt_proj.shape[1])
    low, B, C = F.linear(u, x_proj.to(u.dtype)).split([rank, states, states], dim=1)
    delta = F.linear(low, dt_proj.to(u.dtype))
    y, state = _scan_step(u, delta, A, B, C, D, z, dt_bias, state, True)
    return y, tail, state


def _scan_step(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, delta_bias: Tensor | None, state: Tensor, delta_softplus: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (batch, channels), states, device = u.shape, A.shape[1], u.device.index
    u, delta, B, C = (_rows(t.to(u.dtype)) for t in (u, delta, B, C))
    z = None if z is None else _rows(z.to(u.dtype))
    A, state = A.float().contiguous(), state.float().contiguous()
    D, delta_bias = (None if t is None else t.float().contiguous() for t in (D, delta_bias))
    y = torch.empty((batch, channels), dtype=u.dtype, device=u.device)
    new_state = torch.empty_like(state)
    _scan_kernel(u.dtype, device).launch(
        (-(-batch * channels * _LANES // 128), 1, 1), (128, 1, 1), 0, raw_stream(device),
        u.data_ptr(), delta.data_ptr(), A.data_ptr(), B.data_ptr(), C.data_ptr(), _pointer(D),
        _pointer(z), _pointer(delta_bias), state.data_ptr(), y.data_ptr(), new_state.data_ptr(),
        u.stride(0), delta.stride(0), B.stride(0), C.stride(0), 0 if z is None else z.stride(0),
        batch * channels, channels, states, delta_softplus,
    )  # fmt: skip
    return y, new_state


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
_LIBRARY.impl("mamba_step", _mamba_step, "CUDA")
_LIBRARY.impl("scan_step", _scan_step, "CUDA")


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
