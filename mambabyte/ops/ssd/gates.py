"""Steps and log-decays of heads, ``torch.ops.mambabyte.gates``: one kernel forward and one backward
on a GPU, where torch needs a dozen, each of which takes longer to start than to run."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambabyte.ops.arguments import address, check_tensors
from mambabyte.ops.build.kernel import Kernel, Program, raw_stream
from mambabyte.ops.library import Tensors, define
from mambabyte.ops.scan.operator import fused_available
from mambabyte.ops.ssd.decay import without_past

DTYPES = {torch.bfloat16: "bfloat16", torch.float32: "float"}
_THREADS, _ROWS = 128, 1024
_PARAMETERS = {"gates": "6P4q3i", "gates_backward": "8P4q3i"}


def gates(
    dt: Tensor, A: Tensor, dt_bias: Tensor | None, softplus: bool, ages: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``step = dt + dt_bias``, through softplus if so wanted, and ``log_decay = A step``, which is
    -inf where ``ages`` (B, L), as of ``document_ages``, say that a document begins.

    Shapes: dt (B, L, H); A and dt_bias (H,) in float32, or float64 beside which all is computed in
    float64. Returns both (B, L, H) in A's dtype. No gradient is lost; the operator's sums over
    batch and steps have a fixed order.
    """
    if dt.is_cuda and dt.dtype in DTYPES and A.dtype == torch.float32 and (
            fused_available(dt.device)[0]):
        step, log_decay = _gates(dt, A, dt_bias, ages, softplus)
        return step, log_decay
    return _in_torch(dt, A, dt_bias, ages, softplus)


def _in_torch(
    dt: Tensor, A: Tensor, dt_bias: Tensor | None, ages: Tensor | None, softplus: bool
) -> tuple[Tensor, Tensor]:
    step = dt.to(A.dtype)
    if dt_bias is not None:
        step = step + dt_bias
    if softplus:
        step = F.softplus(step)
    return step, without_past(step * A, ages)


def _check(
    dt: Tensor, A: Tensor, dt_bias: Tensor | None, ages: Tensor | None, softplus: bool
) -> None:
    check_tensors("dt", dt, None, tuple(DTYPES), (
        ("A", A, dt.shape[2:], torch.float32), ("dt_bias?", dt_bias, dt.shape[2:], torch.float32),
        ("ages?", ages, dt.shape[:2], torch.uint8)))


def names() -> list[str]:
    return [f"{kernel}<{element}>" for kernel in _PARAMETERS for element in DTYPES.values()]


@functools.cache
def program() -> Program:
    return Program.from_file("build/types.cu", "ssd/gates.cu", names=names())


@functools.cache
def _kernel(name: str, device: int) -> Kernel:
    return program().kernel(name, device, _PARAMETERS[name.partition("<")[0]])


def _launch(device: int, name: str, blocks: int, *args: int) -> None:
    _kernel(name, device).launch((blocks, 1, 1), (_THREADS, 1, 1), 0, raw_stream(device), *args)


def _forward(
    dt: Tensor, A: Tensor, dt_bias: Tensor | None, ages: Tensor | None, softplus: bool
) -> Tensors:
    given = [None if t is None else t.contiguous() for t in (A, dt_bias, ages)]
    step, log_decay = (torch.empty(dt.shape, dtype=A.dtype, device=dt.device) for _ in range(2))
    _launch(
        dt.device.index, f"gates<{DTYPES[dt.dtype]}>", -(-dt.numel() // _THREADS),
        *map(address, (dt, *given, step, log_decay)), *dt.stride(), dt.numel(), *dt.shape[1:],
        softplus)
    return step, log_decay


def _backward(
    dstep: Tensor | None, dlog_decay: Tensor | None, dt: Tensor, A: Tensor,
    dt_bias: Tensor | None, ages: Tensor | None, softplus: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    batch, length, heads = dt.shape
    blocks = -(-batch * length // _ROWS)
    rows = [None if t is None else t.contiguous() for t in (A, dt_bias, ages, dstep, dlog_decay)]
    ddt = torch.empty(dt.shape, dtype=dt.dtype, device=dt.device)
    sums = torch.empty(blocks, 2, heads, dtype=torch.float32, device=dt.device)
    _launch(
        dt.device.index, f"gates_backward<{DTYPES[dt.dtype]}>", blocks * heads,
        *map(address, (dt, *rows, ddt, sums)), *dt.stride(), batch * length,
        length, heads, softplus)
    dA, dbias = sums.sum(0).unbind()
    return ddt, dA, None if dt_bias is None else dbias.clone(), None


def _shapes(
    dt: Tensor, A: Tensor, dt_bias: Tensor | None, ages: Tensor | None, softplus: bool
) -> Tensors:
    return A.new_empty(dt.shape), A.new_empty(dt.shape)


_gates: Any = define(
    "gates", "Tensor dt, Tensor A, Tensor? dt_bias, Tensor? ages", "step, log_decay",
    flags="bool softplus", forward={"cuda": _forward}, backward={"cuda": _backward},
    check=_check, shapes=_shapes, in_torch=_in_torch)
