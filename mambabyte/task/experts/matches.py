"""What came after the latest places of a stream whose last bytes are the present ones.

For each of some lengths of context, a match of that length is an earlier place of the history with
the same bytes before it; the bytes after the latest few of them are counted. That is a cache of the
text being read: names and phrases come again. Nothing is kept but the last bytes themselves, which
are searched anew for every byte, some 10 microseconds for 64 kB: so a state is a value.
"""

from __future__ import annotations

import ctypes
import functools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mambabyte.ops.build import c as native_build
from mambabyte.task.ngram import Discounts

SOURCE = Path(__file__).with_name("experts.c")
SHORTEST = 3  # bytes of context, as in the source
MATCH_DISCOUNT: Discounts = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Matches:
    """Which matches are counted."""

    lengths: tuple[int, ...] = (3, 4, 5, 6, 8, 11, 16, 24)  # bytes of context, ascending
    reach: int = 1 << 16  # bytes that are searched
    newest: int = 8  # places counted of each length

    def __post_init__(self) -> None:
        assert not self.lengths or self.lengths[0] >= SHORTEST
        assert list(self.lengths) == sorted(set(self.lengths))
        assert self.newest >= 1


@dataclass(frozen=True)
class Found:
    """Counts at some positions, in their order: one entry a position, length and byte."""

    row: Tensor  # (E,) int64: position, from 0
    kind: Tensor  # (E,) int64: index of the length
    symbol: Tensor  # (E,) int64
    count: Tensor  # (E,) int32


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, None without a C compiler or a place to keep what it makes."""
    loaded = native_build.load(SOURCE)
    return None if isinstance(loaded, str) else loaded


def find_matches(
    text: np.ndarray, begin: int, end: int, matches: Matches, first: int = 0, threads: int = 1
) -> Found:
    """Matches at the positions ``begin`` ... ``end`` - 1 of text (L,) uint8, each with what is
    before it from ``first`` on as its history."""
    assert 0 <= first <= begin <= end <= len(text) + 1
    size, kinds = end - begin, len(matches.lengths)
    loaded = library()
    if not size or not kinds:
        return _found([])
    if loaded is None:
        return _found([
            (i, kind, symbol, times) for i in range(size)
            for kind, counts in enumerate(matches_before(
                text[max(first, begin + i - matches.reach) : begin + i], matches))
            for symbol, times in sorted(counts.items())])
    threads = max(1, min(threads, 64, size // 64))
    room = -(-size // threads) * kinds * min(256, matches.newest)
    made = np.zeros(threads, np.int64)
    row, kind, symbol, count = (np.empty(threads * room, kind_of) for kind_of in (
        np.int32, np.uint8, np.uint8, np.uint16))
    lengths, text = np.array(matches.lengths, np.int64), np.ascontiguousarray(text)
    number = ctypes.c_int64
    loaded.find_matches(
        address(text), number(first), number(begin), number(end), number(matches.reach),
        number(matches.newest), address(lengths), kinds, threads, number(room), address(made),
        address(row), address(kind), address(symbol), address(count))
    parts = [slice(i * room, i * room + n) for i, n in enumerate(made.tolist())]
    row, kind, symbol, count = (np.concatenate([a[p] for p in parts]) for a in (
        row, kind, symbol, count))
    return Found(torch.from_numpy(row).long() - begin, torch.from_numpy(kind).long(),
                 torch.from_numpy(symbol).long(), torch.from_numpy(count.astype(np.int32)))


def matches_before(history: np.ndarray, matches: Matches) -> list[Counter[int]]:
    """The definition: counts of the bytes after the latest matches in history (L,) uint8, a length
    each. What matches n bytes is among what matches fewer, and has n bytes before it."""
    counts, compared = [], 0
    places = np.arange(len(history) - 1, -1, -1)
    for length in matches.lengths:
        for back in range(compared + 1, length + 1):
            places = places[places >= back]
            places = places[history[places - back] == history[-back]] if len(places) else places
        compared = length
        counts.append(Counter(history[places[: matches.newest]].tolist()))
    return counts


def _found(entries: list[tuple[int, int, int, int]]) -> Found:
    row, kind, symbol, count = torch.tensor(entries, dtype=torch.int64).reshape(-1, 4).unbind(1)
    return Found(row, kind, symbol, count.int())


def address(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
