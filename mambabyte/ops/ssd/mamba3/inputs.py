"""What Mamba-3's scan reads of a layer's projection: norms of B and C, and gates. One kernel
forward and one backward on a GPU, where torch needs two dozen."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mambabyte.ops.arguments import address, check_tensors, without_autocast
from mambabyte.ops.build.kernel import Kernel, Program, raw_stream
from mambabyte.ops.library import Tensors, define
from mambabyte.ops.scan.operator import fused_available
from mambabyte.ops.ssd.gates import DTYPES

LEAST_RATE = 1e-4  # of decay, a unit of time
NORM_EPS = 1e-5
_THREADS, _WARPS, _ROWS = 256, 8, 64
_PARAMETERS = {"inputs_forward": "10P3q5i2f", "inputs_backward": "12P3q5i2f"}


class Inputs(NamedTuple):
    """Inputs of ``mamba3_scan``, by their names there."""

    B: Tensor  # (B, L, G, N)
    C: Tensor  # (B, L, G, N)
    dt: Tensor  # (B, L, H)
    log_decay: Tensor  # (B, L, H)
    theta: Tensor  # (B, L, S)
    mix: Tensor  # (B, L, H)


def mamba3_inputs(
    tail: Tensor, dt_bias: Tensor, B_weight: Tensor, C_weight: Tensor, groups: int
) -> Inputs:
    """From ``tail`` (B, L, 2 G N + 3 H + S), what in_proj of a Mamba-3 layer gives behind z and x:
    B and C of ``groups`` G, and dt, decay, mix (H each) and angle (S).

    B and C are divided by their RMS over N and multiplied by B_weight and C_weight (N,);
    ``dt = softplus(dt + dt_bias)``, ``log_decay = -max(softplus(decay), LEAST_RATE) dt``,
    ``mix = sigmoid(mix)``, ``theta = pi tanh(angle)`` (arXiv:2603.15569, the public module's
    parametrisation). B and C come in tail's dtype, the others in dt_bias', float32 or float64.
    """
    if tail.is_cuda and tail.dtype in DTYPES and dt_bias.dtype == torch.float32 and (
            fused_available(tail.device)[0]):
        return Inputs(*_inputs(tail, dt_bias, B_weight, C_weight, groups))
    return Inputs(*_in_torch(tail, dt_bias, B_weight, C_weight, groups))


def _parts(tail: Tensor, dt_bias: Tensor, B_weight: Tensor, groups: int) -> list[int]:
    """How tail is split; the last is how many pairs of states turn."""
    shared, heads = groups * len(B_weight), len(dt_bias)
    return [shared, shared, heads, heads, heads, tail.shape[-1] - 2 * shared - 3 * heads]


def _in_torch(
    tail: Tensor, dt_bias: Tensor, B_weight: Tensor, C_weight: Tensor, groups: int
) -> Tensors:
    def normed(x: Tensor, weight: Tensor) -> Tensor:
        x = x.unflatten(-1, (groups, -1))
        # Some releases of torch take it to float32 under autocast.
        with without_autocast(x.device):
            return F.rms_norm(x, x.shape[-1:], eps=NORM_EPS) * weight.to(x.dtype)

    B, C, *gates = tail.split(_parts(tail, dt_bias, B_weight, groups), -1)
    dt, rate, mix, angle = (t.to(dt_bias.dtype) for t in gates)
    dt = F.softplus(dt + dt_bias)
    log_decay = -(F.softplus(rate).clamp(min=LEAST_RATE) * dt)
    return (normed(B, B_weight), normed(C, C_weight), dt, log_decay, math.pi * torch.tanh(angle),
            torch.sigmoid(mix))


def _check(
    tail: Tensor, dt_bias: Tensor, B_weight: Tensor, C_weight: Tensor, groups: int
) -> None:
    shape = (*tail.shape[:2], max(tail.shape[-1], sum(
        _parts(tail, dt_bias, B_weight, groups)[:5]) + 1))
    check_tensors("tail", tail, shape, tuple(DTYPES), (
        ("dt_bias", dt_bias, (dt_bias.numel(),), torch.float32),
        ("B_weight", B_weight, (B_weight.numel(),), torch.float32),
        ("C_weight", C_weight, (B_weight.numel(),), torch.float32)))


def names() -> list[str]:
    return [f"{kernel}<{element}>" for kernel in _PARAMETERS for element in DTYPES.values()]


@functools.cache
def program() -> Program:
    return Program.from_file("build/types.cu", "ssd/mamba3/inputs.cu", names=names())


@functools.cache
def _kernel(name: str, device: int) -> Kernel:
    return program().kernel(name, device, _PARAMETERS[name.partition("<")[0]])


def _launch(
    device: int, name: str, blocks: int, shared: int, *args: float
) -> None:
    kernel = _kernel(name, device)
    kernel.allow_shared(shared)
    kernel.launch((blocks, 1, 1), (_THREADS, 1, 1), shared, raw_stream(device), *args)


def _sizes(tail: Tensor, parts: list[int], groups: int) -> tuple[float, ...]:
    """The kernels' last arguments."""
    batch, length, _ = tail.shape
    return (batch * length, *tail.stride()[:2], length, groups, parts[0] // groups, parts[2],
            parts[5], NORM_EPS, LEAST_RATE)


def _forward(
    tail: Tensor, dt_bias: Tensor, B_weight: Tensor, C_weight: Tensor, groups: int
) -> Tensors:
    tail = tail if tail.stride(2) == 1 else tail.contiguous()
    weights = [t.contiguous() for t in (dt_bias, B_weight, C_weight)]
    found = _shapes(tail, dt_bias, B_weight, C_weight, groups)
    _launch(
        tail.device.index, f"inputs_forward<{DTYPES[tail.dtype]}>",
        -(-tail.shape[0] * tail.shape[1] // _WARPS), 0, *map(address, (tail, *weights, *found)),
        *_sizes(tail, _parts(tail, dt_bias, B_weight, groups), groups))
    return found


def _backward(
    dB: Tensor, dC: Tensor | None, ddt: Tensor | None, dlog_decay: Tensor | None,
    dtheta: Tensor | None, dmix: Tensor | None, tail: Tensor, dt_bias: Tensor, B_weight: Tensor,
    C_weight: Tensor, groups: int,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    tail = tail if tail.stride(2) == 1 else tail.contiguous()
    given = [None if t is None else t.contiguous()
             for t in (dB, dC, ddt, dlog_decay, dtheta, dmix, tail, dt_bias, B_weight, C_weight)]
    given[6] = tail
    parts = _parts(tail, dt_bias, B_weight, groups)
    states, heads = len(B_weight), len(dt_bias)
    d_tail = torch.empty(tail.shape, dtype=tail.dtype, device=tail.device)
    blocks = -(-tail.shape[0] * tail.shape[1] // _ROWS)
    sums = dt_bias.new_empty(blocks, 2 * states + heads)
    _launch(
        tail.device.index, f"inputs_backward<{DTYPES[tail.dtype]}>", blocks,
        4 * _WARPS * sums.shape[1], *map(address, (*given, d_tail, sums)),
        *_sizes(tail, parts, groups))
    of_B, of_C, of_bias = sums.sum(0).split([states, states, heads])
    return d_tail, of_bias.clone(), of_B.clone(), of_C.clone()


def _shapes(
    tail: Tensor, dt_bias: Tensor, B_weight: Tensor, C_weight: Tensor, groups: int
) -> Tensors:
    *rows, _ = tail.shape
    *_, pairs = _parts(tail, dt_bias, B_weight, groups)
    B, C = (tail.new_empty(*rows, groups, len(B_weight)) for _ in range(2))
    dt, log_decay, mix = (dt_bias.new_empty(*rows, len(dt_bias)) for _ in range(3))
    return B, C, dt, log_decay, dt_bias.new_empty(*rows, pairs), mix


_inputs: Any = define(
    "mamba3_inputs", "Tensor tail, Tensor dt_bias, Tensor B_weight, Tensor C_weight",
    "B, C, dt, log_decay, theta, mix", flags="int groups", forward={"cuda": _forward},
    backward={"cuda": _backward}, check=_check, shapes=_shapes, in_torch=_in_torch)
