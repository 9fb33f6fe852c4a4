"""One call of the scan as its kernels take it: layouts, the plan of the work, buffers between
segments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from mambabyte.ops.arguments import address
from mambabyte.ops.scan import plan as cuda_plan
from mambabyte.ops.scan.cuda import launch
from mambabyte.ops.scan.cuda.launch import true
from mambabyte.ops.scan.plan import (
    CARRY_WARPS,
    CHUNK,
    Plan,
    ceil_div,
    is_tile,
    padded_states,
    plan_scan,
)


def _has_map(x: Tensor | None) -> bool:
    """Whether a tensor map can describe it: an expanded axis, of stride 0, it cannot."""
    return x is None or (x.stride(1) > 0 and (x.stride(0) > 0 or x.shape[0] == 1))


@overload
def rows_of(x: Tensor, aligned: bool) -> Tensor: ...
@overload
def rows_of(x: None, aligned: bool) -> None: ...
def rows_of(x: Tensor | None, aligned: bool) -> Tensor | None:
    """``x`` with unit stride on its last axis and, for the tile kernels, rows on 16 bytes."""
    if x is None:
        return None
    if x.stride(-1) != 1:
        x = x.contiguous()
    if aligned and (x.data_ptr() % 16 or x.stride(0) % 8 or x.stride(1) % 8 or x.stride(1) >> 26):
        x = x.clone(memory_format=torch.contiguous_format)
    return x


def continuous(x: Tensor | None) -> bool:
    """Whether a sequence begins where the one before it ends."""
    return x is None or x.stride(0) == x.shape[1] * x.stride(1)


@overload
def weights(x: Tensor) -> Tensor: ...
@overload
def weights(x: None) -> None: ...
def weights(x: Tensor | None) -> Tensor | None:
    """``x`` in fp32, contiguous and on 16 bytes."""
    if x is None:
        return None
    x = x.to(torch.float32).contiguous()
    return x.clone() if x.data_ptr() % 16 else x


class Scan:
    """One call's inputs in the form that the kernels take."""

    def __init__(
        self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
        z: Tensor | None, delta_bias: Tensor | None, initial_state: Tensor | None, softplus: bool,
        ages: Tensor | None,
    ) -> None:
        self.batch, self.length, self.channels = u.shape
        self.d_state, self.dtype, self.device = A.shape[1], u.dtype, u.device.index
        self.tile = is_tile(self.length, u.dtype, self.channels, self.d_state)
        self.softplus, self.gated = softplus, z is not None
        self.u, self.delta, self.B, self.C = (rows_of(x, self.tile) for x in (u, delta, B, C))
        self.z = rows_of(z, self.tile)
        self.A, self.D, self.bias = weights(A), weights(D), weights(delta_bias)
        self.h0 = weights(initial_state)
        self.ages = None if ages is None else ages.contiguous()
        self.padded = padded_states(self.d_state)
        # Channels in a warp; warps that one segment gives.
        self.warp_channels = 8 if self.tile else 128 // self.padded
        self.warps = self.batch * ceil_div(self.channels, self.warp_channels)
        self.fold = 1  # sequences that are walked as one, of so many chunks each
        self.period = 0
        self.foldable = (
            self.tile and self.h0 is None and self.length % CHUNK == 0 and self.length <= 1024
            and all(continuous(x) for x in (self.u, self.delta, self.B, self.C, self.z))
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
        return true(self.ages is not None)

    def plan(self, backward: bool) -> Plan:
        return plan_scan(self.device, self.tile, self.warps, self.length, backward)

    def maps(self, warps: int, dy: Tensor) -> bytes:
        """The tensor maps of u, delta, z, dy, B and C for blocks of so many warps; empty where the
        rows are to be copied by threads: not on Hopper, or without three warps in every block,
        which ask in turn."""
        tensors = ((self.u, warps), (self.delta, warps), (self.z, warps), (dy, warps),
                   (self.B, 2), (self.C, 2))  # fmt: skip
        if not (launch.takes_boxes(self.device) and (self.channels // 8 - 1) % warps >= 2
                and all(_has_map(x) for x, _ in tensors)):  # fmt: skip
            return b""
        found = [
            bytes(launch.MAP) if x is None else launch.encode(
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
            *map(address, pointers), *strides, *sizes, *plan, self.period, out_time,
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

    def carry(
        self, adjoint: bool, plan: Plan, upstream: Sequence[int], states: Tensor | None,
        dts: Tensor | None, every: bool = False,
    ) -> None:
        """Fill the buffers with what each segment of a tile scan hands to its neighbour; ``every``:
        the one at the end too, to what is beyond."""
        steps, segments, parts, pieces = plan
        first, count = (parts, pieces - parts) if adjoint else (0, parts * (segments - 1))
        if every:
            first, count = 0, pieces
        problem = self.problem(Plan(steps // parts, pieces, 1, pieces))
        flags = f"{true(adjoint)}, {true(adjoint and self.gated)}, {true(self.softplus)}"
        launch.launch(
            self.device, f"tile_carry<{flags}, {CARRY_WARPS}, {self.documents}>",
            launch.PROBLEM + launch.UPSTREAM + "2P2q",
            self.blocks(CARRY_WARPS, count), (32 * CARRY_WARPS, 1), 0,
            *problem, *upstream, address(states), address(dts), first, count,
        )  # fmt: skip


    def handed_over(
        self, adjoint: bool, plan: Plan, states: Tensor | None, dts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What all pieces together hand over (batch, channels, states), and the sum of dt (batch,
        channels)."""
        assert states is not None  # there are several pieces
        assert dts is not None
        states = states.view(self.batch, plan.pieces, self.channels, 16)
        dts = dts.view(self.batch, plan.pieces, self.channels)
        way = dts if adjoint else dts.flip(1)  # from the place where they are handed over
        way = torch.cumsum(way, 1) - way  # an error beside the piece's own dt, not the sum's
        way = way if adjoint else way.flip(1)
        return (torch.exp(way[..., None] * self.A) * states).sum(1), dts.sum(1)
