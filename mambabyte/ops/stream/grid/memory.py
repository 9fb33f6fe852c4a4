"""Memory of the device that ``hybrid.cu`` works in: what it remembers of texts, whose the rows of a
cache of keys and values are, and where its blocks exchange numbers."""

from __future__ import annotations

import threading
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambabyte.ops.stream.server import Served, Server, halves


class HybridState(NamedTuple):
    """What all layers remember of B texts: numbers of a fixed size, and keys and values."""

    numbers: Tensor  # (B, blocks * floats)
    cache: Tensor  # (B, layers of attention, 2, n_kv_head, chunks, slots, head_dim): row i of a
    # layer's keys and values is slot i // chunks of chunk i % chunks
    begin: int  # rows begin to stored of the cache are theirs
    stored: int
    position: int  # bytes seen before


class Taken:
    """That rows of a cache are taken, for as long as a state holds this."""

    __slots__ = ("__weakref__",)


class Room:
    """A cache, and how many of its rows are taken; ``words`` are for an order of a kernel that
    stays: where it lies, and slots of a share."""

    def __init__(self, rows: int | None, end: int, cache: Tensor, stream: int) -> None:
        # No rows: None. The CUDA stream that all rows were added on; None after another.
        self.rows, self.words, self.slots = rows, halves(cache.data_ptr()), cache.shape[5]
        self.stream: int | None = stream
        self._end = end  # of the rows that all states here share
        self._taken: list[tuple[int, weakref.ref[Taken]]] = []  # behind them, ends in order
        self._lock = threading.Lock()

    def extend(self, end: int, length: int, stream: int) -> Taken | None:
        """Take ``length`` rows behind row ``end`` for a launch on ``stream``; None where they are
        not there, or a state that still is has them. Rows of one that is gone are free again where
        what wrote them comes before: not on several streams."""
        taken = Taken()
        if self.rows is None:
            return taken
        with self._lock:
            if stream != self.stream:
                self.stream = None
            while (self.stream is not None and self._taken and self._taken[-1][0] > end
                   and self._taken[-1][1]() is None):
                self._taken.pop()
            free = (self._taken[-1][0] if self._taken else self._end) == end
            if not free or end + length > self.rows:
                return None
            self._taken.append((end + length, weakref.ref(taken)))
        return taken


class Held(HybridState):
    """A state whose cache may be added to in place; see ``Room``."""

    room: Room
    taken: Taken

    def __reduce__(self) -> tuple[Any, ...]:
        return HybridState, tuple(self)


class ServedHybrid(Served, HybridState):
    """A state of one text with a kernel that stays."""

    room: Room
    taken: Taken


def taken_out(server: Server, state: ServedHybrid) -> HybridState:
    """What is made of a ServedHybrid, in memory of the current stream."""
    numbers, cache = server.copies(state.numbers, state.cache)
    return HybridState(numbers[None], cache, *state[2:])


class Exchange:
    """Where blocks exchange packets, each with the number of its exchange; one a CUDA stream, as
    the launches on one come one after another."""

    def __init__(self, packets: int, device: torch.device) -> None:
        self.packets = torch.zeros(packets, 4, dtype=torch.int32, device=device)
        self._next = 1

    def take(self, count: int) -> int:
        """The first of ``count`` exchanges that nobody else has."""
        if self._next + count >= 1 << 32:
            self.packets.zero_()
            self._next = 1
        self._next += count
        return self._next - count
