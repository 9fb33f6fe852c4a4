"""Fused selective scan on NVIDIA GPUs: launches ``scan.cu`` as ``plan`` cuts the work.

Two families of kernels, chosen by :func:`cuda_plan.is_tile` alone: ``tile`` (bf16, 16 states,
channels a multiple of 8, 16 steps or more; tensor cores) and ``any`` (every other case, in fp32).

``forward(save=True)`` keeps the state every 8 steps for the backward (4 bytes a step and channel in
the tile family). With ``save=False`` nothing is kept, and a backward called with the empty tensor
recomputes, an eighth of the work at a time: a few sequences, or of fewer than eight sequences a
stretch of one. Forward and backward then take 1.9 to 2.7 times as long, for two thirds of the peak
(data/records/throughput/h200-scan).
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from mambabyte.ops.build.kernel import Kernel, Program, encode_tiled, places_parameters, raw_stream
from mambabyte.ops.scan import plan as cuda_plan
from mambabyte.ops.scan.plan import (
    ANY_WARPS,
    CARRY_WARPS,
    CHUNK,
    Plan,
    backward_shape,
    backward_shared,
    ceil_div,
    forward_shape,
    forward_shared,
    is_tile,
    padded_states,
    plan_scan,
    plan_whole,
    saved_shape,
)

_PROBLEM = "10P21q"
_UPSTREAM = "2P2q"
_MAP = 128  # bytes of a tensor map
_MAPS = f"{6 * _MAP}s"
_C_TYPE = {torch.float32: "float", torch.float16: "fp16", torch.bfloat16: "bf16"}


def _has_map(x: Tensor | None) -> bool:
    """Whether a tensor map can describe it: an expanded axis, of stride 0, it cannot."""
    return x is None or (x.stride(1) > 0 and (x.stride(0) > 0 or x.shape[0] == 1))


@functools.lru_cache(1024)  # training comes back to the same addresses; to encode takes 10 us
def _encode(
    device: int, address: int, batch: int, length: int, channels: int, by_batch: int,
    by_time: int, groups: int,
) -> bytes:  # fmt: skip
    """CUtensorMap of (batch, channels / 8, time, 8), for boxes of 1 x ``groups`` x 8 x 8; empty
    where the driver does not take it."""
    tensor_map = (ctypes.c_uint64 * 32)()
    to = (ctypes.addressof(tensor_map) + 63) // 64 * 64
    sizes = (ctypes.c_uint64 * 4)(8, length, channels // 8, batch)
    steps = (ctypes.c_uint64 * 3)(2 * by_time, 16, max(16, 2 * by_batch))
    box, ones = (ctypes.c_uint32 * 4)(8, 8, groups, 1), (ctypes.c_uint32 * 4)(1, 1, 1, 1)
    # bf16, 4 dimensions; not interleaved, not swizzled, L2 sectors of 128 bytes, zeros outside
    taken = encode_tiled(
        device, to, 9, 4, ctypes.c_void_p(address), sizes, steps, box, ones, 0, 0, 2, 0)
    return ctypes.string_at(to, _MAP) if taken else b""


# ------------------------------------------------------------------------------------ launching


def program(name: str) -> Program:
    """The program of that kernel alone."""
    return Program.from_file("scan/scan.cu", names=(name,))


def trained(hopper: bool) -> list[str]:
    """The kernels that training launches in bf16: gated, from no state, of one document, as a plan
    may cut it."""
    flags, both = "true, true", (False, True)
    return [
        *(f"tile_forward<{flags}, {warps}, {resident}, {_true(fold)}, false>"
          for warps, resident in cuda_plan.FORWARD_SHAPES for fold in both),
        *(f"tile_backward<{flags}, {warps}, {resident}, false, {_true(fold)}, {_true(hopper)}, "
          "false>"
          for warps, resident in cuda_plan.BACKWARD_SHAPES for fold in both),
        *(f"tile_carry<{_true(adjoint)}, {_true(adjoint)}, true, {CARRY_WARPS}, false>"
          for adjoint in both),
        "tile_sums",
    ]  # fmt: skip


@functools.cache
def _kernel(name: str, device: int, parameters: str) -> Kernel:
    return program(name).kernel(name, device, parameters)


def _launch(
    device: int, name: str, parameters: str, blocks: int, threads: tuple[int, int], shared: int,
    *args: int, overlap: bool = False,
) -> None:
    """With ``overlap``, only to be used after another kernel of the same call, the launch need not
    wait for that one's end."""
    kernel = _kernel(name, device, parameters)
    kernel.allow_shared(shared)
    overlap = overlap and _is_hopper(device)
    kernel.launch((blocks, 1, 1), (*threads, 1), shared, raw_stream(device), *args, overlap=overlap)


@functools.cache
def _is_hopper(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def _takes_boxes(device: int) -> bool:
    """Whether a kernel can be given tensor maps there."""
    return _is_hopper(device) and places_parameters()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _true(flag: bool) -> str:
    return "true" if flag else "false"


def _rows(x: Tensor | None, aligned: bool) -> Tensor | None:
    """``x`` with unit stride on its last axis and, for the tile kernels, rows on 16 bytes."""
    if x is None:
        return None
    if x.stride(-1) != 1:
        x = x.contiguous()
    if aligned and (x.data_ptr() % 16 or x.stride(0) % 8 or x.stride(1) % 8 or x.stride(1) >> 26):
        x = x.clone(memory_format=torch.contiguous_format)
    return x


def _continuous(x: Tensor | None) -> bool:
    """Whether a sequence begins where the one before it ends."""
    return x is None or x.stride(0) == x.shape[1] * x.stride(1)


def _weights(x: Tensor | None) -> Tensor | None:
    """``x`` in fp32, contiguous and on 16 bytes."""
    if x is None:
        return None
    x = x.to(torch.float32).contiguous()
    return x.clone() if x.data_ptr() % 16 else x


class _Scan:
    """One call's inputs in the form that the kernels take."""

    def __init__(self, u, delta, A, B, C, D, z, delta_bias, initial_state, softplus, ages):
        self.batch, self.length, self.channels = u.shape
        self.d_state, self.dtype, self.device = A.shape[1], u.dtype, u.device.index
        self.tile = is_tile(self.length, u.dtype, self.channels, self.d_state)
        self.softplus, self.gated = softplus, z is not None
        self.u, self.delta, self.B, self.C, self.z = (
            _rows(x, self.tile) for x in (u, delta, B, C, z)
        )
        self.A, self.D, self.bias = _weights(A), _weights(D), _weights(delta_bias)
        self.h0 = _weights(initial_state)
        self.ages = None if ages is None else ages.contiguous()
        self.padded = padded_states(self.d_state)
        # Channels in a warp; warps that one segment gives.
        self.warp_channels = 8 if self.tile else 128 // self.padded
        self.warps = self.batch * ceil_div(self.channels, self.warp_channels)
        self.fold = 1  # sequences that are walked as one, of so many chunks each
        self.period = 0
        self.foldable = (
            self.tile and self.h0 is None and self.length % CHUNK == 0 and self.length <= 1024
            and all(_continuous(x) for x in (self.u, self.delta, self.B, self.C, self.z))
        )  # fmt: skip

    def fold_sequences(self, blocks: int, resident: int) -> None:
        """Walk several short sequences as one where one row of blocks a sequence is several rounds
        of the card: each round costs a start."""
        at_once = resident * cuda_plan.multiprocessors(self.device)
        rounds = ceil_div(blocks, at_once)
        for fold in range(min(rounds, self.batch), 1, -1):
            if self.batch % fold == 0 and fold * ceil_div(blocks // fold, at_once) <= rounds:
                self.fold, self.period = fold, self.length // CHUNK
                self.batch, self.length = self.batch // fold, self.length * fold
                return

    def hands_over(self, backward: bool) -> bool:
        """Whether the pass over states of a tile scan can walk this sequence to its end: it goes
        forward by whole chunks."""
        whole = backward or self.length % CHUNK == 0
        return self.tile and whole and self.plan(backward).segments > 1

    @property
    def documents(self) -> str:
        return _true(self.ages is not None)

    def plan(self, backward: bool) -> Plan:
        return plan_scan(self.device, self.tile, self.warps, self.length, backward)

    def maps(self, warps: int, dy: Tensor) -> bytes:
        """The tensor maps of u, delta, z, dy, B and C for blocks of so many warps; empty where the
        rows are to be copied by threads: not on Hopper, or without three warps in every block,
        which ask in turn."""
        tensors = ((self.u, warps), (self.delta, warps), (self.z, warps), (dy, warps),
                   (self.B, 2), (self.C, 2))  # fmt: skip
        if not (_takes_boxes(self.device) and (self.channels // 8 - 1) % warps >= 2
                and all(_has_map(x) for x, _ in tensors)):  # fmt: skip
            return b""
        found = [
            bytes(_MAP) if x is None else _encode(
                self.device, x.data_ptr(), self.batch, self.length, x.shape[2],
                x.stride(0) * self.fold, x.stride(1), groups)
            for x, groups in tensors]  # fmt: skip
        return b"".join(found) if all(found) else b""

    def problem(self, plan: Plan, output: Tensor | None = None) -> tuple[int, ...]:
        """``output`` is what the kernel writes a row a step of, if any."""
        rows = (self.u, self.delta, self.B, self.C, self.z)
        pointers = (*rows, self.A, self.D, self.bias, self.h0, self.ages)
        strides = [
            s
            for x in rows
            for s in ((0, 0) if x is None else (x.stride(0) * self.fold, x.stride(1)))
        ]
        sizes = (self.batch, self.length, self.channels, self.d_state)
        out_time = 0 if output is None else output.stride(1)
        return (
            *map(_address, pointers), *strides, *sizes, *plan, self.period, out_time,
            2 * CHUNK * out_time,
        )

    def blocks(self, warps: int, segments: int) -> int:
        return self.groups(warps) * self.batch * segments

    def groups(self, warps: int) -> int:
        """Blocks over the channels: each gives its own partial sums of dB and dC."""
        return ceil_div(self.channels, self.warp_channels * warps)

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.u.new_empty(shape, dtype=dtype)

    def segment_buffers(self, plan: Plan) -> tuple[Tensor | None, Tensor | None]:
        if plan.segments == 1:
            return None, None
        rows = self.batch * plan.pieces * self.channels
        return self.new(rows, self.padded), self.new(rows)

    def carry(self, adjoint, plan, upstream, states, dts, every=False) -> None:
        """Fill the buffers with what each segment of a tile scan hands to its neighbour; ``every``:
        the one at the end too, to what is beyond."""
        steps, segments, parts, pieces = plan
        first, count = (parts, pieces - parts) if adjoint else (0, parts * (segments - 1))
        if every:
            first, count = 0, pieces
        problem = self.problem(Plan(steps // parts, pieces, 1, pieces))
        flags = f"{_true(adjoint)}, {_true(adjoint and self.gated)}, {_true(self.softplus)}"
        _launch(
            self.device, f"tile_carry<{flags}, {CARRY_WARPS}, {self.documents}>",
            _PROBLEM + _UPSTREAM + "2P2q",
            self.blocks(CARRY_WARPS, count), (32 * CARRY_WARPS, 1), 0,
            *problem, *upstream, _address(states), _address(dts), first, count,
        )  # fmt: skip


    def handed_over(self, adjoint, plan, states, dts) -> tuple[Tensor, Tensor]:
        """What all pieces together hand over (batch, channels, states), and the sum of dt (batch,
        channels)."""
        states = states.view(self.batch, plan.pieces, self.channels, 16)
        dts = dts.view(self.batch, plan.pieces, self.channels)
        way = dts if adjoint else dts.flip(1)  # from the place where they are handed over
        way = torch.cumsum(way, 1) - way  # an error beside the piece's own dt, not the sum's
        way = way if adjoint else way.flip(1)
        return (torch.exp(way[..., None] * self.A) * states).sum(1), dts.sum(1)


# ----------------------------------------------------------------------------------- operations


def forward(
    u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, save, arrive=None,
    ages=None,
):  # fmt: skip
    """-> (y, final_state, saved). ``saved`` is for :func:`backward`; empty unless ``save``.

    ``arrive`` is for a stretch of a longer sequence: of the state that this stretch comes to from a
    zero one (B, D, N) and its sum of step sizes (B, D), it makes the initial state, in place of
    ``initial_state``. The pass over states that segments want anyway then serves both.
    """
    s = _Scan(u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, ages)
    if arrive is not None and not s.hands_over(False):
        _, end, _ = forward(
            u, delta, A, B, C, D, None, delta_bias, None, delta_softplus, False, ages=ages)
        step = delta.float() if delta_bias is None else delta.float() + delta_bias
        step = torch.nn.functional.softplus(step) if delta_softplus else step
        s.h0, arrive, s.foldable = _weights(arrive(end, step.sum(1))), None, False
    y = s.new(s.batch, s.length, s.channels, dtype=s.dtype)
    final_state = s.new(s.batch, s.channels, s.d_state)
    shape = saved_shape(s.batch, s.length, s.channels, s.d_state, s.dtype)
    saved = s.new(*(shape if save else (0,)))

    plan = s.plan(backward=False)
    segments = plan.segments
    warps, resident = (
        forward_shape(s.device, s.channels // 8, s.batch * segments)
        if s.tile
        else (ANY_WARPS, None)
    )
    if s.foldable and segments == 1:
        s.fold_sequences(s.blocks(warps, 1), resident)
        plan = plan_whole(s.length)
    states, dts = s.segment_buffers(plan)
    outputs = (_address(y), _address(final_state), _address(saved) if save else 0)
    if s.tile and segments > 1:
        s.carry(False, plan, (0, 0, 0, 0), states, dts, arrive is not None)
    if arrive is not None:
        s.h0 = _weights(arrive(*s.handed_over(False, plan, states, dts)))
    problem = s.problem(plan, y)
    for part in ("STATE_ONLY", "FULL") if segments > 1 and not s.tile else ("FULL",):
        if s.tile:
            flags = f"{_true(s.gated)}, {_true(s.softplus)}"
            name = f"tile_forward<{flags}, {warps}, {resident}, {_true(s.fold > 1)}, {s.documents}>"
        else:
            name = f"any_forward<{_C_TYPE[s.dtype]}, {s.padded}, {_true(s.softplus)}, {part}>"
        _launch(
            s.device, name, _PROBLEM + "5P", s.blocks(warps, segments - (part == "STATE_ONLY")),
            (32 * warps, 1), forward_shared(warps) if s.tile else 0,
            *problem, *outputs, _address(states), _address(dts),
            overlap=s.tile and segments > 1 and arrive is None,
        )  # fmt: skip
    return y, final_state, saved


def backward(
    dy, dfinal_state, u, delta, A, B, C, D, z, delta_bias, initial_state, saved, delta_softplus,
    into=None, leave=None, ages=None,
):  # fmt: skip
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
            saved.numel() and _Scan(*given, delta_softplus, ages).hands_over(True)):
        dfinal_state = leave(backward(dy, None, *given, saved, delta_softplus, ages=ages)[-1])
        leave = None

    def like(x, *shape, dtype=u.dtype):
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
        count, sums = ceil_div(batch, 8), None  # sequences at a time
        for first in range(0, batch, count):
            of, to = (_cut(xs, slice(first, first + count)) for xs in (rows, outputs))
            for more in _recompute(of, A, D, delta_bias, delta_softplus, to, steps):
                sums = more if sums is None else tuple(map(torch.add, sums, more))
    (du, ddelta, dz, dB, dC, dh0), (dA, dD, dbias) = outputs, sums
    return (
        du, ddelta, dA, dB, dC, None if D is None else dD, dz,
        None if delta_bias is None else dbias, dh0,
    )  # fmt: skip


def _cut(tensors, *where):
    return tuple(None if x is None else x[where] for x in tensors)


def _recompute(rows, A, D, delta_bias, softplus, outputs, steps):
    """:func:`_backward` with a forward before it, ``steps`` steps at a time, the last ones first;
    yields each piece's sums. The states between the pieces take a forward of their own."""
    *rows, h0 = rows
    *outputs, dh0 = outputs
    dh, starts = rows.pop(1), range(0, rows[0].shape[1], steps)

    def piece(tensors, start):
        return _cut(tensors, slice(None), slice(start, start + steps))

    def run(start, state, save):
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


def _backward(rows, A, D, delta_bias, saved, softplus, outputs, leave=None):
    """Fill ``outputs`` (du, ddelta, dz, dB, dC, dh0) and return the sums (dA, dD, dbias)."""
    dy, dh_end, u, delta, B, C, z, ages, h0 = rows
    du, ddelta, dz, dB, dC, dh0 = outputs
    s = _Scan(u, delta, A, B, C, D, z, delta_bias, h0, softplus, ages)
    dy, dh_end = _rows(dy, s.tile), _weights(dh_end)
    sums = s.new(s.channels, s.d_state), s.new(s.channels), s.new(s.channels)

    warps, resident = (
        backward_shape(s.device, s.batch, s.channels // 8)
        if s.tile
        else (ANY_WARPS, None)
    )
    plan = s.plan(backward=True)
    segments = plan.segments
    if s.foldable and segments == 1 and dh_end is None and _continuous(dy):
        s.fold_sequences(s.blocks(warps, 1), resident)
        plan = plan_whole(s.length)
    states, dts = s.segment_buffers(plan)
    problem = s.problem(plan, du)
    maps = s.maps(warps, dy) if s.tile else b""
    upstream = [_address(dy), _address(dh_end), dy.stride(0) * s.fold, dy.stride(1)]
    padded_length = CHUNK * ceil_div(s.length, CHUNK)
    partial_BC = s.new(s.groups(warps), s.batch, padded_length, 2 * s.padded)
    count = s.batch * segments
    partials = (
        s.new(count, s.channels, s.d_state),
        s.new(count, s.channels),
        s.new(count, s.channels),
    )

    flags = f"{_true(s.gated)}, {_true(s.softplus)}"
    typed = f"{_C_TYPE[s.dtype]}, {s.padded}"
    if segments > 1 and s.tile:
        s.carry(True, plan, upstream, states, dts, leave is not None)
        if leave is not None:
            dh_end = _weights(leave(s.handed_over(True, plan, states, dts)[0]))
            upstream[1] = _address(dh_end)
    elif segments > 1:
        name = f"any_adjoint<{typed}, {_true(s.softplus)}>"
        _launch(
            s.device, name, _PROBLEM + _UPSTREAM + "2P", s.blocks(ANY_WARPS, segments - 1),
            (32 * ANY_WARPS, 1), 0, *problem, *upstream, _address(states), _address(dts),
        )  # fmt: skip
    if s.tile:
        more = ", ".join(map(_true, (h0 is not None, s.fold > 1, bool(maps), ages is not None)))
        name = f"tile_backward<{flags}, {warps}, {resident}, {more}>"
        shared = backward_shared(warps, bool(maps))
    else:
        name, shared = f"any_backward<{typed}, {_true(s.softplus)}>", 0
    first, given = ((_MAPS, (maps,)) if maps else ("q", (0,))) if s.tile else ("", ())
    _launch(
        s.device, name, first + _PROBLEM + _UPSTREAM + "11P",
        s.blocks(warps, segments), (32 * warps, 1), shared, *given, *problem, *upstream,
        *map(_address, (saved, states, dts, du, ddelta, dz, dh0, partial_BC, *partials)),
        overlap=s.tile and segments > 1 and leave is None,
    )  # fmt: skip
    if s.tile:
        name, values = "tile_sums", s.batch * padded_length * 8
        sizes = (s.groups(warps), s.batch, s.length)
    else:
        name, values = f"any_sums<{typed}>", s.batch * s.length * 2 * s.padded
        sizes = (s.groups(warps), s.batch * s.length, s.d_state)
    width = s.channels * s.d_state
    blocks = ceil_div(values, 256)  # for dB and dC; the rest of the blocks add up dA, dD and dbias
    more_blocks = ceil_div(width + 2 * s.channels, 32)
    _launch(
        s.device, name, "P3q2P2q" + "3P3q3P", blocks + more_blocks, (256, 1), 0,
        _address(partial_BC), *sizes, _address(dB), _address(dC), dB.stride(1), blocks,
        *map(_address, partials), count, width, s.channels, *map(_address, sums),
        overlap=s.tile,
    )  # fmt: skip
    return sums
