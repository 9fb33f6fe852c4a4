"""Causal depthwise convolution with SiLU on the GPU, in layout (B, L, D): launches ``conv.cu``.

It is bound by memory, so passes over the data are what it costs. Checks are in ``operator.py``.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mambabyte.ops.arguments import address
from mambabyte.ops.build.kernel import Kernel, Program, multiprocessors, raw_stream

ELEMENTS = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float"}
_THREADS = 128
# Loads in flight a thread and blocks a multiprocessor in the backward: measured, as in _plan.
_AHEAD, _BLOCKS = 4, 3
_PARAMETERS = {
    "conv_forward": "7Pqqqiiii", "conv_backward": "10Pqqqqqqqiiii", "conv_sums": "PPPqii"}


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
    spare = lanes * length // (multiprocessors(x.device.index) * 1024)
    if backward:
        steps = 16 if spare < 4 else 32 if spare < 32 else 64 if spare < 64 else 128
    else:
        steps = 16 if spare < 8 else 32 if spare < 64 else 64
    return width, steps, lanes * -(-length // steps)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, silu: bool,
    ages: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The causal depthwise convolution of x (B, L, D) on a GPU, with SiLU behind it where ``silu``.

    weight (D, K) and bias (D,) in float32, tail (B, K - 1, D) what came before x, None where
    nothing did, and ages (B, L) uint8 as of ``document_ages``. Returns y (B, L, D) and the last
    K - 1 inputs, both in x's dtype.
    """
    batch, length, channels = x.shape
    taps, device = weight.shape[1], x.device.index
    x, weight = _rows(x), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    tail = None if tail is None else tail.contiguous()
    ages = None if ages is None else ages.contiguous()
    width, steps, threads = _plan((x,) if tail is None else (x, tail), False)
    y = torch.empty((batch, length, channels), dtype=x.dtype, device=x.device)
    last = torch.empty((batch, taps - 1, channels), dtype=x.dtype, device=x.device)
    kernel = _kernel("conv_forward", x.dtype, taps, width, device)
    kernel.launch(
        (-(-threads // _THREADS), 1, 1), (_THREADS, 1, 1), 0, raw_stream(device),
        x.data_ptr(), weight.data_ptr(), address(bias), address(tail), address(ages),
        y.data_ptr(), last.data_ptr(), x.stride(0), x.stride(1), threads, length, channels, steps,
        silu,
    )  # fmt: skip
    return y, last


def backward(
    dy: Tensor, dlast: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None,
    tail: Tensor | None, silu: bool, dx: Tensor | None = None, ages: Tensor | None = None,
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
    ages = None if ages is None else ages.contiguous()
    if dx is None:
        dx = torch.empty((batch, length, channels), dtype=x.dtype, device=x.device)
    width, steps, threads = _plan((x, dy, dx, *(t for t in (tail, dlast) if t is not None)), True)
    dtail = x.new_empty(0) if tail is None else torch.empty_like(tail)
    segments = -(-length // steps)
    partial = weight.new_empty(batch * segments, (taps + 1) * channels)
    kernel = _kernel("conv_backward", x.dtype, taps, width, device)
    kernel.launch(
        (-(-threads // _THREADS), 1, 1), (_THREADS, 1, 1), 0, raw_stream(device),
        dy.data_ptr(), address(dlast), x.data_ptr(), weight.data_ptr(), address(bias),
        address(tail), address(ages), dx.data_ptr(), 0 if tail is None else dtail.data_ptr(),
        partial.data_ptr(),
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
