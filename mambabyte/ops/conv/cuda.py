"""Causal depthwise convolution with SiLU on the GPU, in layout (B, L, D), as one operator.

``torch.ops.mambabyte.causal_conv`` replaces a transpose, ``conv1d``, a transpose back and SiLU: it
is bound by memory, so passes over the data are what it costs. Sources in ``conv.cu``.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from mambabyte.errors import UserError
from mambabyte.ops.build.kernel import Kernel, Program, raw_stream
from mambabyte.ops.scan.operator import differentiable, once_only

MAX_TAPS = 8
ELEMENTS = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float"}
_THREADS = 128
# Loads in flight a thread and blocks a multiprocessor in the backward: measured, as in _plan.
_AHEAD, _BLOCKS = 4, 3
_PARAMETERS = {
    "conv_forward": "PPPPPPqqqiiii", "conv_backward": "PPPPPPPPPqqqqqqqiiii", "conv_sums": "PPPqii"}


def fused_causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    tail: Tensor | None = None,
    silu: bool = True,
) -> tuple[Tensor, Tensor]:
    """``silu(bias + sum_k weight_k x_{t-K+1+k})``; positions before x come from ``tail``.

    Shapes: x (B, L, D) on a GPU, with any strides of B and L; weight (D, K), K from 2 to 8; bias
    (D,); tail (B, K-1, D), zero when None. Returns y (B, L, D) and the tail to carry on with,
    both in x's dtype. Gradients flow to all inputs and through both results, in a fixed order.

    Raises UserError for shapes, dtypes or devices that do not fit.
    """
    _check(x, weight, bias, tail)
    y, last = _conv(
        x,
        weight.float(),
        None if bias is None else bias.float(),
        None if tail is None else tail.to(x.dtype),
        silu,
    )
    return y, last


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None) -> None:
    if x.device.type != "cuda":
        raise UserError(f"x is on {x.device}: the fused convolution runs on a GPU")
    if x.ndim != 3 or 0 in x.shape:
        raise UserError(f"x has shape {tuple(x.shape)}: expected (batch, length, channels), none 0")
    if x.dtype not in ELEMENTS and not torch.is_autocast_enabled("cuda"):
        known = ", ".join(map(str, ELEMENTS))
        raise UserError(f"x is {x.dtype}: the fused convolution takes {known}")
    batch, _, channels = x.shape
    taps = weight.shape[-1]
    if weight.shape != (channels, taps) or not 2 <= taps <= MAX_TAPS:
        raise UserError(
            f"weight has shape {tuple(weight.shape)}: expected ({channels}, K), K 2 to {MAX_TAPS}"
        )
    for name, tensor, shape in (
        ("weight", weight, (channels, taps)),
        ("bias", bias, (channels,)),
        ("tail", tail, (batch, taps - 1, channels)),
    ):
        if tensor is not None and tensor.shape != shape:
            raise UserError(f"{name} has shape {tuple(tensor.shape)}: expected {shape}")
        if tensor is not None and tensor.device != x.device:
            raise UserError(f"{name} is on {tensor.device} and x on {x.device}: move it")


# --------------------------------------------------------------------------------------- kernels


def widths(dtype: torch.dtype) -> tuple[int, ...]:
    """Channels a thread, widest first: 8 bytes are enough to fill the bus, and save registers."""
    return (4, 1) if dtype != torch.float32 else (2, 1)


@functools.cache
def program(dtype: torch.dtype, taps: int) -> Program:
    """The convolution of one dtype and number of taps."""
    names = [
        f"{kernel}<{ELEMENTS[dtype]}, {width}>"
        for kernel in ("conv_forward", "conv_backward")
        for width in widths(dtype)
    ] + ["conv_sums"]
    options = (f"-DTAPS={taps}", f"-DAHEAD={_AHEAD}", f"-DBLOCKS={_BLOCKS}")
    return Program.from_file("build/types.cu", "conv/conv.cu", names=names, options=options)


@functools.cache
def _kernel(name: str, dtype: torch.dtype, taps: int, width: int, device: int) -> Kernel:
    full_name = name if name == "conv_sums" else f"{name}<{ELEMENTS[dtype]}, {width}>"
    return program(dtype, taps).kernel(full_name, device, _PARAMETERS[name])


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _plan(tensors: tuple[Tensor, ...], backward: bool) -> tuple[int, int, int]:
    """(channels a thread, steps a thread, threads) for x (B, L, D), first of the tensors."""
    x = tensors[0]
    batch, length, channels = x.shape
    width = widths(x.dtype)[0]
    size = width * x.element_size()
    if channels % width or any(
        t.data_ptr() % size or (t.stride(0) | t.stride(1)) % width for t in tensors
    ):
        width = 1
    lanes = batch * (channels // width)
    # Long enough that the K - 1 positions read twice do not count, short enough to fill the GPU.
    # The backward walks longer, for each thread leaves partial sums to be added up.
    spare = lanes * length // (_multiprocessors(x.device.index) * 1024)
    if backward:
        steps = 16 if spare < 4 else 32 if spare < 32 else 64 if spare < 64 else 128
    else:
        steps = 16 if spare < 8 else 32 if spare < 64 else 64
    return width, steps, lanes * -(-length // steps)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    batch, length, channels = x.shape
    taps, device = weight.shape[1], x.device.index
    x, weight = _rows(x), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    tail = None if tail is None else tail.contiguous()
    width, steps, threads = _plan((x,) if tail is None else (x, tail), False)
    y = torch.empty((batch, length, channels), dtype=x.dtype, device=x.device)
    last = torch.empty((batch, taps - 1, channels), dtype=x.dtype, device=x.device)
    kernel = _kernel("conv_forward", x.dtype, taps, width, device)
    kernel.launch(
        (-(-threads // _THREADS), 1, 1), (_THREADS, 1, 1), 0, raw_stream(device),
        x.data_ptr(), weight.data_ptr(), _pointer(bias), _pointer(tail), y.data_ptr(),
        last.data_ptr(), x.stride(0), x.stride(1), threads, length, channels, steps, silu,
    )  # fmt: skip
    return y, last


def backward(
    dy: Tensor, dlast: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None,
    tail: Tensor | None, silu: bool, dx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight, bias, tail; empty for one that is None.

    ``dx`` is filled where it is given: rows of unit stride, which share no memory with dy's.
    """
    batch, length, channels = x.shape
    taps, device = weight.shape[1], x.device.index
    x, dy, weight = _rows(x), _rows(dy), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    tail = None if tail is None else tail.contiguous()
    dlast = None if dlast is None else dlast.contiguous()
    if dx is None:
        dx = torch.empty((batch, length, channels), dtype=x.dtype, device=x.device)
    width, steps, threads = _plan((x, dy, dx, *(t for t in (tail, dlast) if t is not None)), True)
    dtail = x.new_empty(0) if tail is None else torch.empty_like(tail)
    segments = -(-length // steps)
    partial = weight.new_empty(batch * segments, (taps + 1) * channels)
    kernel = _kernel("conv_backward", x.dtype, taps, width, device)
    kernel.launch(
        (-(-threads // _THREADS), 1, 1), (_THREADS, 1, 1), 0, raw_stream(device),
        dy.data_ptr(), _pointer(dlast), x.data_ptr(), weight.data_ptr(), _pointer(bias),
        _pointer(tail), dx.data_ptr(), 0 if tail is None else dtail.data_ptr(), partial.data_ptr(),
        dy.stride(0), dy.stride(1), x.stride(0), x.stride(1), dx.stride(0), dx.stride(1), threads,
        length, channels, steps, silu,
    )  # fmt: skip
    dweight, dbias = torch.empty_like(weight), weight.new_empty(channels)
    sums = _kernel("conv_sums", x.dtype, taps, width, device)
    sums.launch(
        (-(-(taps + 1) * channels // 32), 1, 1), (1024, 1, 1), 0, raw_stream(device),
        partial.data_ptr(), dweight.data_ptr(), dbias.data_ptr(), len(partial), channels * taps,
        (taps + 1) * channels,
    )  # fmt: skip
    return dx, dweight, weight.new_empty(0) if bias is None else dbias, dtail


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


# -------------------------------------------------------------------------------------- operator

_LIBRARY = torch.library.Library("mambabyte", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? tail, bool silu"
_LIBRARY.define(f"causal_conv({_INPUTS}) -> (Tensor y, Tensor last)", tags=_TAGS)
_LIBRARY.define(
    f"causal_conv_backward(Tensor dy, Tensor? dlast, {_INPUTS}) -> "
    "(Tensor dx, Tensor dweight, Tensor dbias, Tensor dtail)",
    tags=_TAGS,
)
_LIBRARY.impl("causal_conv", forward, "CUDA")
_LIBRARY.impl("causal_conv_backward", backward, "CUDA")
_conv = torch.ops.mambabyte.causal_conv.default
_conv_backward = torch.ops.mambabyte.causal_conv_backward.default


@torch.library.register_fake("mambabyte::causal_conv", lib=_LIBRARY)
def _forward_shapes(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    batch, _, channels = x.shape
    return x.new_empty(x.shape), x.new_empty(batch, weight.shape[1] - 1, channels)


@torch.library.register_fake("mambabyte::causal_conv_backward", lib=_LIBRARY)
def _backward_shapes(
    dy: Tensor, dlast: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None,
    tail: Tensor | None, silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(0) if bias is None else bias.new_empty(bias.shape),
        x.new_empty(0) if tail is None else tail.new_empty(tail.shape),
    )


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            y, last = _conv(*args)
        *tensors, ctx.silu = args
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        return y, last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, dlast = grads
        inputs = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros_like(inputs[0])
        gradients = _conv_backward(dy, dlast, *inputs, ctx.silu)
        wanted = zip(ctx.needs_input_grad[:4], gradients, strict=True)
        return (*[gradient if needed else None for needed, gradient in wanted], None)


def _autocast(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    dtype = torch.get_autocast_dtype("cuda")
    with torch._C._ExcludeDispatchKeyGuard(
        torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)
    ):
        return _conv(x.to(dtype), weight, bias, None if tail is None else tail.to(dtype), silu)


_LIBRARY.impl("causal_conv", differentiable(_conv, _Conv), "Autograd")
_LIBRARY.impl(
    "causal_conv_backward",
    once_only(_conv_backward, "the fused causal convolution", "conv1d"), "Autograd",
)
_LIBRARY.impl("causal_conv", _autocast, "AutocastCUDA")
