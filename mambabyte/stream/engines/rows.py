"""Keys and values of an attention layer that are added to in place, shared by branches of a stream.

A state is rows of a buffer. Whoever goes on from it first has the rows behind it; another branch
copies.
"""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor

from mambabyte.model.families.attention import AttentionState


class Room:
    """A buffer of keys and values, and how many of its rows are taken."""

    def __init__(self, buffer: Tensor, end: int) -> None:
        self.buffer, self._end = buffer, end  # (2, n_kv_head, rows, head_dim)
        self._lock = threading.Lock()

    def extend(self, end: int, length: int) -> bool:
        """Take ``length`` rows behind row ``end``, if they are there and nobody has them."""
        with self._lock:
            free = self._end == end and end + length <= self.buffer.shape[2]
            self._end += length * free
            return free

    def give_back(self, end: int, length: int) -> None:
        """Free the ``length`` rows before row ``end``, which was the last, as nobody has them."""
        with self._lock:
            self._end -= length * (self._end == end)


class Cache(AttentionState):
    """A state whose keys and values lie in a room, from row ``first`` on."""

    room: Room | None = None
    first = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return AttentionState, tuple(self)

    def without(self, length: int, window: int) -> Cache:
        """The state before the last ``length`` bytes, which are given up."""
        assert self.room is not None
        last = self.first + self.k.shape[2]
        end = last - length
        self.room.give_back(last, length)
        first = max(0, end - (window - 1))
        k, v = self.room.buffer[:, None, :, first:end]
        before = Cache(k, v, self.position - length)
        before.room, before.first = self.room, first
        return before
