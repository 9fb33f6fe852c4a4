"""Where the tiles of a block's matrices lie in its shared memory, for ``hybrid.cu``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mambabyte.ops.build.nvrtc import NvrtcError

RING = 16384  # floats through which tiles pass that find no place of their own


class Tile(NamedTuple):
    """Where a tile comes from and lies, in floats; as in the kernel."""

    start: int
    floats: int
    place: int
    gap: int  # it takes the place of the gap-th of the ring's tiles before it; 0: it stays


def schedule(sizes: Sequence[int], space: int) -> list[Tile]:
    """Tiles of these sizes in ``space`` floats of shared memory: where not all can stay, some do,
    evenly among the others, which pass through a ring in the order of their use."""
    if sum(sizes) <= space:
        ring = 0
    elif (ring := max(RING, 3 * max(sizes))) > space:
        raise NvrtcError(f"the model's states and small weights leave {4 * space:,} bytes of "
                         f"shared memory a block for its matrices, which take {4 * ring:,}")
    stays, kept, due = [], 0, 0.0
    for size in sizes:  # an even share of what was met so far
        due += size * (space - ring) / sum(sizes)
        stays.append(ring == 0 or kept + size <= due)
        kept += size * stays[-1]
    moving = [size for size, stay in zip(sizes, stays, strict=True) if not stay]
    places, at = [], 0
    for size in moving:
        at = 0 if at + size > ring else at
        places.append(at)
        at += size

    def gap(i: int) -> int:
        """How far back, over the end of the byte before, is the last tile that overlaps."""
        def overlaps(j: int) -> bool:
            return places[j] < places[i] + moving[i] and places[i] < places[j] + moving[j]
        return next(back for back in range(1, len(moving) + 1) if overlaps(i - back))

    gaps = [gap(i) for i in range(len(moving))]
    found, start, pinned, of_ring = [], 0, ring, iter(zip(places, gaps, strict=True))
    for size, stay in zip(sizes, stays, strict=True):
        found.append(Tile(start, size, *((pinned, 0) if stay else next(of_ring))))
        start, pinned = start + size, pinned + size * stay
    return found
