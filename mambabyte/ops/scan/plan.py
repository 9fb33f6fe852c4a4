"""How the kernels of ``scan.cu`` cut the work: blocks, segments in time, and what they keep.

A warp of the ``tile`` family walks 8 channels of one sequence through time. Blocks of several warps
share the rows of B and C. A card wants a number of warps at once; where the sequences give too few,
each is cut in time, and a segment hands its state over to the next.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from mambabyte.ops.build.kernel import multiprocessors

CHUNK = 8  # steps between checkpoints, as in scan.cu
ANY_WARPS = 4  # warps a block
# Warps a block and blocks a multiprocessor: what the register files hold at 80, 80, 128 and 96
# registers a thread in the forward, 168 (192 for eight warps) in the backward.
FORWARD_SHAPES = ((24, 1), (12, 2), (8, 2), (4, 5))
BACKWARD_SHAPES = ((12, 1), (8, 1), (6, 2), (4, 3))
# Warps a multiprocessor that a plan aims at, and how many times those of whole sequences they must
# be before it cuts them in time.
_FORWARD_WANTED, _FORWARD_LEAST = 16, 3
_BACKWARD_WANTED, _BACKWARD_LEAST = 12, 2
_H200 = 132  # multiprocessors of an H100 or H200
CARRY_WARPS = 4
_CARRY_WANTED = 24  # warps a multiprocessor


def ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


def padded_states(d_state: int) -> int:
    if not 1 <= d_state <= 64:
        raise ValueError(f"the CUDA scan takes 1 to 64 states, not {d_state}")
    return next(n for n in (4, 8, 16, 32, 64) if n >= d_state)


def is_tile(length: int, dtype: torch.dtype, channels: int, d_state: int) -> bool:
    """The tile kernels round h to bf16 for dC; over a few steps only, that would show."""
    return dtype == torch.bfloat16 and d_state == 16 and channels % 8 == 0 and length >= 16


def saved_shape(
    batch: int, length: int, channels: int, d_state: int, dtype: torch.dtype
) -> tuple[int, ...]:
    """Shape of the checkpoints that ``forward(save=True)`` returns, in fp32 elements."""
    words = 8 if is_tile(length, dtype, channels, d_state) else padded_states(d_state)
    return (batch, ceil_div(length, CHUNK), channels, words)


def partial_sums_shape(
    batch: int, length: int, channels: int, d_state: int, dtype: torch.dtype
) -> tuple[int, ...]:
    """Shape of the partial sums of dB and dC that ``backward`` makes, in fp32 elements.

    For an H100 or H200; a card with room for narrower blocks only makes more.
    """
    padded = padded_states(d_state)
    if is_tile(length, dtype, channels, d_state):
        width = 8 * _widest(_backward_shapes(batch, channels // 8, _H200), channels // 8)
    else:
        width = 128 // padded * ANY_WARPS
    return (ceil_div(channels, width), batch, CHUNK * ceil_div(length, CHUNK), 2 * padded)


def forward_shared(warps: int) -> int:
    """Bytes: eight stages of the ring, a room of each warp (see scan.cu)."""
    return 8 * (warps * 528 + 512 + 16) + warps * 256


def backward_shared(warps: int, boxes: bool = False) -> int:
    """Bytes: sums and rooms of each warp, four stages of the ring, barriers (see scan.cu)."""
    stage = warps * (512 + 256) + 512 + 128 if boxes else warps * (528 + 256) + 512 + 16
    return warps * (4096 + 1536) + 4 * stage + 16


def _backward_shapes(sequences: int, tiles: int, count: int) -> dict[int, int]:
    """Warps a block -> blocks a multiprocessor. Eight warps alone on one are two thirds of what
    it holds: they pay where whole sequences fill the card, not where the plan cuts for twelve."""
    cut = _BACKWARD_WANTED * count // (sequences * tiles) >= _BACKWARD_LEAST
    return {warps: blocks for warps, blocks in BACKWARD_SHAPES if not (cut and warps == 8)}


def _widest(shapes: dict[int, int], tiles: int) -> int:
    """Of these warps a block, those with the fewest idle, then the widest: the fewest partial
    sums of dB and dC."""
    return min(shapes, key=lambda n: (-tiles % n, -n))


@functools.cache
def block_shared(device: int) -> int:
    properties: Any = torch.cuda.get_device_properties(device)  # its stub lacks the limit
    return properties.shared_memory_per_block_optin


def forward_shape(device: int, tiles: int, rows: int) -> tuple[int, int]:
    """(warps a block, blocks a multiprocessor) for ``rows`` times ``tiles`` warps. The warps of a
    block keep step, so that none is left to run alone at the end: the widest block that keeps nine
    tenths of the multiprocessors' warps busy, else the narrowest."""
    for warps, resident in FORWARD_SHAPES[:-1]:
        blocks = ceil_div(tiles, warps) * rows
        rounds = ceil_div(blocks, multiprocessors(device))
        if warps == 8 and rounds > resident:
            continue  # with 16 warps a multiprocessor the fewest: it pays in the only round alone
        busy = tiles * rows / (rounds * multiprocessors(device) * warps)
        if busy >= 0.9 and forward_shared(warps) <= block_shared(device):
            return warps, resident
    return FORWARD_SHAPES[-1]


def backward_shape(device: int, sequences: int, tiles: int) -> tuple[int, int]:
    """(warps a block, blocks a multiprocessor), of what fits."""
    return _backward_shape(multiprocessors(device), block_shared(device), sequences, tiles)


@functools.cache
def _backward_shape(count: int, limit: int, sequences: int, tiles: int) -> tuple[int, int]:
    found = _backward_shapes(sequences, tiles, count)
    shapes = {n: blocks for n, blocks in found.items() if backward_shared(n) <= limit}
    warps = _widest(shapes, tiles)
    return warps, shapes[warps]


class Plan(NamedTuple):
    """How a sequence is cut; see ``Problem`` in scan.cu."""

    steps: int  # of a segment
    segments: int
    parts: int  # of a segment, for what it hands over
    pieces: int  # parts of the sequence


def _plan_segments(
    warps: int, wanted_warps: int, least: int, length: int, longest: int
) -> tuple[int, int]:
    """(steps a segment, segments). A cut costs another pass over the input, so it takes place only
    where one segment's warps are fewer than 1 / ``least`` of those the card wants at once; then it
    gives that many, or a multiple of it where segments would exceed ``longest`` steps. Segments are
    whole chunks, at least 64 steps, none empty."""
    segments = wanted_warps // warps
    if segments < least:
        segments = 1
    else:
        segments = wanted_warps * max(1, length // (segments * longest)) // warps
    steps = max(64, CHUNK * ceil_div(ceil_div(length, segments), CHUNK))
    return steps, ceil_div(length, steps)


def plan_scan(device: int, tile: bool, warps: int, length: int, backward: bool) -> Plan:
    """A plan for sequences of which one segment each gives ``warps``. In the tile family a long
    segment's hand-over is short, so one round of long segments is best; in the other one a few
    rounds keep the last one a small part."""
    count = multiprocessors(device)
    wanted, least = _FORWARD_WANTED, _FORWARD_LEAST
    if backward:
        wanted, least = _BACKWARD_WANTED, _BACKWARD_LEAST
    elif tile and length * warps >= 24 * count * 2048:
        wanted = 24
    longest = length if tile else 1536
    steps, segments = _plan_segments(warps, wanted * count, least, length, longest)
    if not tile or segments == 1:
        return Plan(steps, segments, 1, segments)
    # A hand-over has fewer segments, and needs more warps for its latency.
    parts = _CARRY_WANTED * count // (warps * (segments - 1))
    # (Long ones are walked in part only: less of all, the fewer they are.)
    parts = max(1, min(parts, steps // 64)) if steps <= 1024 else 1
    steps = CHUNK * parts * ceil_div(steps, CHUNK * parts)
    pieces = ceil_div(length, steps // parts)
    return Plan(steps, ceil_div(length, steps), parts, pieces)


def plan_whole(length: int) -> Plan:
    """Every sequence in one piece."""
    return Plan(CHUNK * ceil_div(length, CHUNK), 1, 1, 1)
