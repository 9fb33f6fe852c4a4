"""Fused selective scan on NVIDIA GPUs: launches ``scan.cu`` as ``plan`` cuts the work.

Two families of kernels, chosen by :func:`plan.is_tile` alone: ``tile`` (bf16, 16 states,
channels a multiple of 8, 16 steps or more; tensor cores) and ``any`` (every other case, in fp32).

``forward(save=True)`` keeps the state every 8 steps for the backward (4 bytes a step and channel in
the tile family). With ``save=False`` nothing is kept, and a backward called with the empty tensor
recomputes, an eighth of the work at a time: a few sequences, or of fewer than eight sequences a
stretch of one. Forward and backward then take 1.9 to 2.7 times as long, for two thirds of the peak
(data/records/throughput/h200-scan).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mambabyte.ops.arguments import address
from mambabyte.ops.library import Tensors
from mambabyte.ops.scan.cuda import launch
from mambabyte.ops.scan.cuda.call import Scan, continuous, rows_of, weights
from mambabyte.ops.scan.cuda.launch import PROBLEM, UPSTREAM, true
from mambabyte.ops.scan.plan import (
    ANY_WARPS,
    CHUNK,
    backward_shape,
    backward_shared,
    ceil_div,
    forward_shape,
    forward_shared,
    plan_whole,
    saved_shape,
)

_C_TYPE = {torch.float32: "float", torch.float16: "fp16", torch.bfloat16: "bf16"}


def forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, initial_state: Tensor | None, delta_softplus: bool, save: bool,
    arrive: Callable[[Tensor, Tensor], Tensor] | None = None, ages: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> (y, final_state, saved). ``saved`` is for :func:`backward`; empty unless ``save``.

    ``arrive`` is for a stretch of a longer sequence: of the state that this stretch comes to from a
    zero one (B, D, N) and its sum of step sizes (B, D), it makes the initial state, in place of
    ``initial_state``. The pass over states that segments want anyway then serves both.
    """
    s = Scan(u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, ages)
    if arrive is not None and not s.hands_over(False):
        _, end, _ = forward(
            u, delta, A, B, C, D, None, delta_bias, None, delta_softplus, False, ages=ages)
        step = delta.float() if delta_bias is None else delta.float() + delta_bias
        step = torch.nn.functional.softplus(step) if delta_softplus else step
        s.h0, arrive, s.foldable = weights(arrive(end, step.sum(1))), None, False
    y = s.new(s.batch, s.length, s.channels, dtype=s.dtype)
    final_state = s.new(s.batch, s.channels, s.d_state)
    shape = saved_shape(s.batch, s.length, s.channels, s.d_state, s.dtype)
    saved = s.new(*(shape if save else (0,)))

    plan = s.plan(backward=False)
    segments = plan.segments
    warps, resident = (
        forward_shape(s.device, s.channels // 8, s.batch * segments)
        if s.tile
        else (ANY_WARPS, 0)
    )
    if s.foldable and segments == 1:
        s.fold_sequences(s.blocks(warps, 1), resident)
        plan = plan_whole(s.length)
    states, dts = s.segment_buffers(plan)
    outputs = (address(y), address(final_state), address(saved) if save else 0)
    if s.tile and segments > 1:
        s.carry(False, plan, (0, 0, 0, 0), states, dts, arrive is not None)
    if arrive is not None:
        s.h0 = weights(arrive(*s.handed_over(False, plan, states, dts)))
    problem = s.problem(plan, y)
    for part in ("STATE_ONLY", "FULL") if segments > 1 and not s.tile else ("FULL",):
        if s.tile:
            flags = f"{true(s.gated)}, {true(s.softplus)}"
            name = f"tile_forward<{flags}, {warps}, {resident}, {true(s.fold > 1)}, {s.documents}>"
        else:
            name = f"any_forward<{_C_TYPE[s.dtype]}, {s.padded}, {true(s.softplus)}, {part}>"
        launch.launch(
            s.device, name, PROBLEM + "5P", s.blocks(warps, segments - (part == "STATE_ONLY")),
            (32 * warps, 1), forward_shared(warps) if s.tile else 0,
            *problem, *outputs, address(states), address(dts),
            overlap=s.tile and segments > 1 and arrive is None,
        )  # fmt: skip
    return y, final_state, saved


def backward(
    dy: Tensor, dfinal_state: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor,
    C: Tensor, D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None,
    initial_state: Tensor | None, saved: Tensor, delta_softplus: bool,
    into: tuple[Tensor | None, ...] | None = None, leave: Callable[[Tensor], Tensor] | None = None,
    ages: Tensor | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """-> (du, ddelta, dA, dB, dC, dD, dz, dbias, dh0), None where the input was None.

    ``leave`` is for a stretch of a longer sequence, whose initial state ``arrive`` gave: of the
    gradient that dy alone gives the initial state (B, D, N), it makes that of the final state, in
    place of ``dfinal_state``.

    ``into`` holds du, ddelta, dz, dB and dC to be filled, instead of new ones: columns of wider
    dense tensors, one for the first three and one for the last two.
    """
    batch, length, channels = u.shape
    d_state = A.shape[1]
    given = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    if leave is not None and not (
            saved.numel() and Scan(*given, delta_softplus, ages).hands_over(True)):
        arrived = backward(dy, None, *given, saved, delta_softplus, ages=ages)[-1]
        assert arrived is not None
        dfinal_state, leave = leave(arrived), None

    def like(x: Tensor | None, *shape: int, dtype: torch.dtype = u.dtype) -> Tensor | None:
        return None if x is None else u.new_empty((batch, *shape), dtype=dtype)

    rows = (dy, dfinal_state, u, delta, B, C, z, ages, initial_state)  # what has a batch axis
    outputs = (
        *(into or (
            *(like(x, length, channels) for x in (u, delta, z)),
            *(like(x, length, d_state) for x in (B, C)),
        )),
        like(initial_state, channels, d_state, dtype=torch.float32),
    )  # fmt: skip
    if saved.numel() > 0:
        sums = _backward(
            rows, A, D, delta_bias, saved.contiguous(), delta_softplus, outputs, leave)
    else:
        steps = CHUNK * ceil_div(ceil_div(length, ceil_div(8, batch)), CHUNK)
        count, sums = ceil_div(batch, 8), ()  # sequences at a time
        for first in range(0, batch, count):
            of, to = (_cut(xs, slice(first, first + count)) for xs in (rows, outputs))
            for more in _recompute(of, A, D, delta_bias, delta_softplus, to, steps):
                sums = tuple(map(torch.add, sums, more)) if sums else more
    (du, ddelta, dz, dB, dC, dh0), (dA, dD, dbias) = outputs, sums
    return (
        du, ddelta, dA, dB, dC, None if D is None else dD, dz,
        None if delta_bias is None else dbias, dh0,
    )  # fmt: skip


def _cut(tensors: Iterable[Tensor | None], *where: slice) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x[where] for x in tensors)


def _recompute(
    rows: Sequence[Any], A: Tensor, D: Tensor | None, delta_bias: Tensor | None, softplus: bool,
    outputs: Sequence[Any], steps: int,
) -> Iterator[Tensors]:
    """:func:`_backward` with a forward before it, ``steps`` steps at a time, the last ones first;
    yields each piece's sums. The states between the pieces take a forward of their own."""
    *rows, h0 = rows
    *outputs, dh0 = outputs
    dh, starts = rows.pop(1), range(0, rows[0].shape[1], steps)

    def piece(tensors: Iterable[Tensor | None], start: int) -> tuple[Any, ...]:
        return _cut(tensors, slice(None), slice(start, start + steps))

    def run(start: int, state: Tensor | None, save: bool) -> Tensors:
        u, delta, B, C, z, ages = piece(rows[1:], start)
        return forward(u, delta, A, B, C, D, z, delta_bias, state, softplus, save, ages=ages)

    states = [h0]
    for start in starts[:-1]:
        states.append(run(start, states[-1], False)[1])
    while states:
        state = states.pop()
        start = starts[len(states)]
        dh_start = dh0 if start == 0 else torch.empty_like(state)
        dy, *others = piece(rows, start)
        yield _backward(
            (dy, dh, *others, state), A, D, delta_bias, run(start, state, True)[2], softplus,
            (*piece(outputs, start), dh_start),
        )  # fmt: skip
        dh = dh_start


def _backward(
    rows: Sequence[Any], A: Tensor, D: Tensor | None, delta_bias: Tensor | None, saved: Tensor,
    softplus: bool, outputs: Sequence[Any], leave: Callable[[Tensor], Tensor] | None = None,
) -> Tensors:
    """Fill ``outputs`` (du, ddelta, dz, dB, dC, dh0) and return the sums (dA, dD, dbias)."""
    dy, dh_end, u, delta, B, C, z, ages, h0 = rows
    du, ddelta, dz, dB, dC, dh0 = outputs
    s = Scan(u, delta, A, B, C, D, z, delta_bias, h0, softplus, ages)
    dy, dh_end = rows_of(dy, s.tile), weights(dh_end)
    sums = s.new(s.channels, s.d_state), s.new(s.channels), s.new(s.channels)

    warps, resident = (
        backward_shape(s.device, s.batch, s.channels // 8)
        if s.tile
        else (ANY_WARPS, 0)
    )
    plan = s.plan(backward=True)
    segments = plan.segments
    if s.foldable and segments == 1 and dh_end is None and continuous(dy):
        s.fold_sequences(s.blocks(warps, 1), resident)
        plan = plan_whole(s.length)
    states, dts = s.segment_buffers(plan)
    problem = s.problem(plan, du)
    maps = s.maps(warps, dy) if s.tile else b""
    upstream = [address(dy), address(dh_end), dy.stride(0) * s.fold, dy.stride(1)]
    padded_length = CHUNK * ceil_div(s.length, CHUNK)
    partial_BC = s.new(s.groups(warps), s.batch, padded_length, 2 * s.padded)
    count = s.batch * segments
    partials = (
        s.new(count, s.channels, s.d_state),
        s.new(count, s.channels),
        s.new(count, s.channels),
    )

    flags = f"{true(s.gated)}, {true(s.softplus)}"
    typed = f"{_C_TYPE[s.dtype]}, {s.padded}"
    if segments > 1 and s.tile:
        s.carry(True, plan, upstream, states, dts, leave is not None)
        if leave is not None:
            dh_end = weights(leave(s.handed_over(True, plan, states, dts)[0]))
            upstream[1] = address(dh_end)
    elif segments > 1:
        name = f"any_adjoint<{typed}, {true(s.softplus)}>"
        launch.launch(
            s.device, name, PROBLEM + UPSTREAM + "2P", s.blocks(ANY_WARPS, segments - 1),
            (32 * ANY_WARPS, 1), 0, *problem, *upstream, address(states), address(dts),
        )  # fmt: skip
    if s.tile:
        more = ", ".join(map(true, (h0 is not None, s.fold > 1, bool(maps), ages is not None)))
        name = f"tile_backward<{flags}, {warps}, {resident}, {more}>"
        shared = backward_shared(warps, bool(maps))
    else:
        name, shared = f"any_backward<{typed}, {true(s.softplus)}>", 0
    first, given = ((launch.MAPS, (maps,)) if maps else ("q", (0,))) if s.tile else ("", ())
    launch.launch(
        s.device, name, first + PROBLEM + UPSTREAM + "11P",
        s.blocks(warps, segments), (32 * warps, 1), shared, *given, *problem, *upstream,
        *map(address, (saved, states, dts, du, ddelta, dz, dh0, partial_BC, *partials)),
        overlap=s.tile and segments > 1 and leave is None,
    )  # fmt: skip
    _add_up(s, warps, partial_BC, (dB, dC), partials, sums)
    return sums


def _add_up(
    s: Scan, warps: int, partial_BC: Tensor, outputs: tuple[Tensor, Tensor], partials: Tensors,
    sums: Tensors,
) -> None:
    """Fill ``outputs`` (dB, dC) from those of each block of channels, and ``sums`` (dA, dD, dbias)
    from those of each sequence and segment, in one launch."""
    dB, dC = outputs
    if s.tile:
        name, values = "tile_sums", s.batch * partial_BC.shape[2] * 8
        sizes = (s.groups(warps), s.batch, s.length)
    else:
        name = f"any_sums<{_C_TYPE[s.dtype]}, {s.padded}>"
        values = s.batch * s.length * 2 * s.padded
        sizes = (s.groups(warps), s.batch * s.length, s.d_state)
    width = s.channels * s.d_state
    blocks = ceil_div(values, 256)  # for dB and dC; the rest of the blocks add up dA, dD and dbias
    more_blocks = ceil_div(width + 2 * s.channels, 32)
    launch.launch(
        s.device, name, "P3q2P2q" + "3P3q3P", blocks + more_blocks, (256, 1), 0,
        address(partial_BC), *sizes, address(dB), address(dC), dB.stride(1), blocks,
        *map(address, partials), len(partials[0]), width, s.channels, *map(address, sums),
        overlap=s.tile,
    )  # fmt: skip
