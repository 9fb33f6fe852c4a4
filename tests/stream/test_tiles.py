"""Where tiles of matrices lie in a block's shared memory: asked for and used as the kernel does,
none is written over before its use, and there is always one to go on with."""

from __future__ import annotations

import random

import pytest

from mambabyte.ops.build.nvrtc import NvrtcError
from mambabyte.ops.stream.grid import tiles as module

BYTES = 3  # that are fed


def run(tiles: list[module.Tile], space: int) -> None:
    """As ``supply`` and ``rows`` of the kernel."""
    memory: dict[int, tuple[int, int]] = {}  # what each float holds: a tile of a byte
    asked = used = lap = following = 0

    def ask() -> None:
        nonlocal asked, lap, following
        while lap < BYTES:
            tile = tiles[following]
            if tile.gap and used <= asked - tile.gap:
                return
            if tile.gap or lap == 0:
                assert 0 <= tile.place <= space - tile.floats
                for at in range(tile.place, tile.place + tile.floats):
                    memory[at] = following, lap if tile.gap else 0
            asked += tile.gap > 0
            following += 1
            if following == len(tiles):
                following, lap = 0, lap + 1 if asked else BYTES

    ask()
    for byte in range(BYTES):
        for i, tile in enumerate(tiles):
            here = i, byte if tile.gap else 0
            assert all(memory[at] == here for at in range(tile.place, tile.place + tile.floats))
            if tile.gap:
                used += 1
                ask()
    assert used == asked


@pytest.mark.parametrize("seed", range(20))
def test_tiles_lie_where_they_are_used(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RING", 40)
    draw = random.Random(seed)
    sizes = [draw.randrange(1, 20) for _ in range(draw.randrange(1, 40))]
    total, most = sum(sizes), max(40, 3 * max(sizes))
    for space in {total, total + 5, (total + most) // 2, most}:
        if space >= min(total, most):
            tiles = module.schedule(sizes, space)
            assert [t.floats for t in tiles] == sizes
            assert all(t.gap == 0 for t in tiles) == (total <= space)
            run(tiles, space)


def test_no_space_for_a_ring_is_said() -> None:
    with pytest.raises(NvrtcError, match="leave 4,000 bytes"):
        module.schedule([1000, 1000], 1000)
