"""Selective scan on the CPU in C: forward, backward and single steps.

The C source beside this file is compiled on first use (``native_build``). Where that is impossible,
:func:`available` says why in one line and the caller takes another form.

Symbols and layouts: u, delta, z, y ``(B, L, D)``; B, C ``(B, L, N)``; A ``(D, N)``;
D, delta_bias ``(D,)``; states ``(B, D, N)``. Any batch and time strides; a last axis whose stride
is not one is copied. Streams may be float32, bfloat16 or float16 and are computed in float32;
a float64 ``u`` makes everything float64.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from mambabyte.ops.arguments import address
from mambabyte.ops.build import c as native_build

__all__ = ["available", "backward", "conv_step", "forward", "saved_shape", "scan_step"]

SOURCE = Path(__file__).with_name("scan.c")
TILE = 16  # time steps between two saved states
PAD = 32  # saved states are padded to this many channels
GROUP = 128  # channels of one partial sum of dB and dC

_FORWARD_WORDS = 6 + 6 * 4 + 7
_BACKWARD_WORDS = _FORWARD_WORDS + 6 * 4 + 7
_pack = struct.Struct(f"{_BACKWARD_WORDS}q").pack
_pack_step = struct.Struct("21q").pack
_pack_conv = struct.Struct("10q").pack
_ABSENT = (0, 0, 0, 0)


_MaybeTensor = TypeVar("_MaybeTensor", Tensor, "Tensor | None")


class _Library(NamedTuple):
    forward: Callable[[bytes], int]
    backward: Callable[[bytes], int]
    scan_step: Callable[[bytes], int]
    conv_step: Callable[[bytes], int]


# ------------------------------------------------------------------------------- library


@functools.cache
def _load(double: bool) -> _Library | str:
    """The library for one element type, or the reason why there is none."""
    defines = [f"-DTILE={TILE}", f"-DPAD={PAD}", f"-DGROUP={GROUP}"]
    library = native_build.load(SOURCE, [*defines, "-DSCAN_DOUBLE"] if double else defines)
    if isinstance(library, str):
        return library
    names = ("scan_forward", "scan_backward", "scan_step", "conv_step")
    functions = [getattr(library, name) for name in names]
    for function in functions:
        function.argtypes = [ctypes.c_char_p]
        function.restype = ctypes.c_int
    return _Library(*functions)


@functools.cache
def _library(double: bool) -> _Library:
    found = _load(double)
    if isinstance(found, str):
        raise RuntimeError(f"the native selective scan is not available: {found}")
    return found


@functools.cache
def available() -> tuple[bool, str]:
    """Whether this form can run here, and if not the reason in one line.

    The first call compiles the library if the cache has none (about a second).
    """
    found = _load(False)
    return (False, found) if isinstance(found, str) else (True, "")


# ------------------------------------------------------------------------------- scan


def saved_shape(batch: int, length: int, channels: int, d_state: int) -> tuple[int, ...]:
    """Shape of the checkpoints that :func:`forward` leaves: one state every TILE steps."""
    return (batch, -(-length // TILE), d_state, -(-channels // PAD) * PAD)


def _stream(x: Tensor | None, real: torch.dtype) -> Tensor | None:
    """A stream that the C code reads as it is: ``real`` or bfloat16, unit stride at the end."""
    if x is None:
        return None
    if x.dtype != real and (x.dtype != torch.bfloat16 or real == torch.float64):
        x = x.to(real)
    return x if x.stride(-1) == 1 else x.contiguous()


def _words(x: Tensor | None) -> tuple[int, int, int, int]:
    """The C struct ``tensor``."""
    if x is None:
        return _ABSENT
    return (x.data_ptr(), int(x.dtype == torch.bfloat16), x.stride(0), x.stride(1))


def _plain(x: Tensor | None, real: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(real).contiguous()


def _stream_dtype(x: Tensor, real: torch.dtype) -> torch.dtype:
    """The type in which the C code writes what the caller sees in ``x.dtype``."""
    return x.dtype if x.dtype == torch.bfloat16 and real == torch.float32 else real


def forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, initial_state: Tensor | None, delta_softplus: bool, save: bool,
    ages: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The scan of ``ops/scan/recurrent.py``; shapes as in the module's docstring, ``ages`` as of
    ``document_ages``.

    Returns y ``(B, L, D)`` in u's dtype, the final state ``(B, D, N)`` in float32 (float64 if u
    is), and the checkpoints for :func:`backward`, of shape :func:`saved_shape` (empty if not
    ``save``). Shapes are the caller's business and are not checked here. Raises RuntimeError
    where :func:`available` is false, MemoryError when scratch memory cannot be had.
    """
    real = torch.float64 if u.dtype == torch.float64 else torch.float32
    batch, length, channels = u.shape
    d_state = A.shape[1]
    y = torch.empty((batch, length, channels), dtype=_stream_dtype(u, real), device=u.device)
    last = torch.empty((batch, channels, d_state), dtype=real, device=u.device)
    shape = saved_shape(batch, length, channels, d_state) if save else (0,)
    saved = torch.empty(shape, dtype=real, device=u.device)
    inputs = [_stream(x, real) for x in (u, delta, B, C, z)]
    params = [_plain(x, real) for x in (A, D, delta_bias, initial_state)]
    ages = _plain(ages, torch.uint8)
    if length == 0 or y.numel() == 0:
        last = torch.zeros_like(last) if params[3] is None else params[3].clone()
        return y.to(u.dtype), last, saved
    words = _pack(
        *(batch, length, channels, d_state, delta_softplus, torch.get_num_threads()),
        *(word for x in (*inputs, y) for word in _words(x)),
        *(address(x) for x in (*params, last)),
        saved.data_ptr() if save else 0,
        address(ages),
        *(0,) * (_BACKWARD_WORDS - _FORWARD_WORDS),
    )
    if _library(real == torch.float64).forward(words):
        raise MemoryError("native selective scan: no scratch memory")
    return y.to(u.dtype), last, saved


def backward(
    dy: Tensor, dfinal_state: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor,
    C: Tensor, D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None,
    initial_state: Tensor | None, saved: Tensor, delta_softplus: bool,
    ages: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of :func:`forward`, whose ``saved`` it takes.

    Returns (du, ddelta, dA, dB, dC, dD, dz, dbias, dh0), None where the input was None. du, ddelta
    and dz have u's dtype, dB and dC have B's, the others A's. Bit-equal on repetition and for any
    number of threads. Raises as :func:`forward` does.
    """
    real = torch.float64 if u.dtype == torch.float64 else torch.float32
    batch, length, channels = u.shape
    d_state = A.shape[1]
    inputs = [_stream(x, real) for x in (u, delta, B, C, z)]
    params = [_plain(x, real) for x in (A, D, delta_bias)]
    dlast = _plain(dfinal_state, real)
    dout, saved, ages = _stream(dy, real), saved.contiguous(), _plain(ages, torch.uint8)
    rows = (batch, length, channels)
    du = torch.empty(rows, dtype=_stream_dtype(u, real), device=u.device)
    ddelta = torch.empty_like(du)
    dz = None if z is None else torch.empty_like(du)
    dB = torch.empty((batch, length, d_state), dtype=_stream_dtype(B, real), device=u.device)
    dC = torch.empty_like(dB)
    dA = torch.empty((channels, d_state), dtype=real, device=u.device)
    dD = None if D is None else torch.empty(channels, dtype=real, device=u.device)
    dbias = None if delta_bias is None else torch.empty(channels, dtype=real, device=u.device)
    dh0 = None
    if initial_state is not None:
        dh0 = torch.empty((batch, channels, d_state), dtype=real, device=u.device)
    if du.numel() == 0:
        for x in (dA, dB, dC, dD, dbias):
            if x is not None:
                x.zero_()
        if dh0 is not None:
            dh0.copy_(dlast if dlast is not None else torch.zeros_like(dh0))
    else:
        groups = -(-channels // GROUP)
        part_bc = torch.empty((groups, batch, length, 2, d_state), dtype=real, device=u.device)
        padded = -(-channels // PAD) * PAD
        part_a = torch.empty((batch, d_state + 2, padded), dtype=real, device=u.device)
        words = _pack(
            *(batch, length, channels, d_state, delta_softplus, torch.get_num_threads()),
            *(word for x in (*inputs, None) for word in _words(x)),
            *(address(x) for x in (*params, None, None, saved, ages)),
            *(word for x in (dout, du, ddelta, dz, dB, dC) for word in _words(x)),
            *(address(x) for x in (dA, dD, dbias, dh0, dlast, part_bc, part_a)),
        )
        if _library(real == torch.float64).backward(words):
            raise MemoryError("native selective scan: no scratch memory")
    streams = [None if x is None else x.to(u.dtype) for x in (du, ddelta, dz)]
    sums = [None if x is None else x.to(A.dtype) for x in (dA, dD, dbias, dh0)]
    return (
        *streams[:2], sums[0], dB.to(B.dtype), dC.to(B.dtype), sums[1], streams[2], *sums[2:]
    )  # fmt: skip


# ------------------------------------------------------------------------------- single steps


def _row(x: Tensor, real: torch.dtype) -> Tensor:
    """A stream of one time step that the C code reads as it is; kept short, see conv_step."""
    if x.dtype != real and (x.dtype != torch.bfloat16 or real == torch.float64):
        x = x.to(real)
    return x if x.is_contiguous() else x.contiguous()


def _param(x: _MaybeTensor, real: torch.dtype) -> _MaybeTensor:
    """As :func:`_plain`; in the usual case, already so, it costs two comparisons."""
    if x is None or (x.dtype is real and x.is_contiguous()):
        return x
    return x.to(real).contiguous()


def scan_step(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, state: Tensor | None, delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """One time step: :func:`forward` at length 1, bit for bit, with less overhead per call.

    u, delta, z are ``(B, D)`` or ``(B, 1, D)``, B and C likewise with N; state ``(B, D, N)`` or
    None for zeros. Returns y in u's shape and dtype, and the new state. No autograd. Raises as
    :func:`forward` does.
    """
    dtype = u.dtype
    real = torch.float64 if dtype is torch.float64 else torch.float32
    u, delta, B, C = _row(u, real), _row(delta, real), _row(B, real), _row(C, real)
    if z is not None:
        z = _row(z, real)
    A, D, bias, h0 = _param(A, real), _param(D, real), _param(delta_bias, real), _param(state, real)
    batch, (channels, d_state) = u.shape[0], A.shape
    half = torch.bfloat16
    y = torch.empty_like(u)
    last = torch.empty((batch, channels, d_state), dtype=real, device=u.device)
    words = _pack_step(
        batch, channels, d_state, delta_softplus, torch.get_num_threads() if batch > 1 else 1,
        u.dtype is half, delta.dtype is half, B.dtype is half, C.dtype is half,
        z is not None and z.dtype is half, u.data_ptr(), delta.data_ptr(), B.data_ptr(),
        C.data_ptr(), address(z), y.data_ptr(), A.data_ptr(), address(D), address(bias),
        address(h0), last.data_ptr(),
    )
    if _library(real is torch.float64).scan_step(words):
        raise MemoryError("native selective scan: no scratch memory")
    return y if y.dtype is dtype else y.to(dtype), last


def conv_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor
) -> tuple[Tensor, Tensor]:
    """One time step of the causal depthwise convolution followed by SiLU.

    x ``(B, D)`` or ``(B, 1, D)``; weight ``(D, K)`` or ``(D, 1, K)`` with the newest input's tap
    last; bias ``(D,)`` or None; tail ``(B, K-1, D)``, the inputs before x, oldest first. Returns
    y in x's shape and dtype, and the next tail in x's dtype. No autograd. Raises RuntimeError
    where :func:`available` is false.
    """
    dtype = x.dtype
    real = torch.float64 if dtype is torch.float64 else torch.float32
    x = _row(x, real)
    tail = _row(tail if tail.dtype is x.dtype else tail.to(x.dtype), real)
    weight, bias = _param(weight, real), _param(bias, real)
    y, tail_out = torch.empty_like(x), torch.empty_like(tail)
    words = _pack_conv(
        x.shape[0], x.shape[-1], weight.shape[-1], x.dtype is torch.bfloat16, x.data_ptr(),
        tail.data_ptr(), y.data_ptr(), tail_out.data_ptr(), weight.data_ptr(),
        address(bias),
    )
    _library(real is torch.float64).conv_step(words)
    return (y, tail_out) if y.dtype is dtype else (y.to(dtype), tail_out.to(dtype))
