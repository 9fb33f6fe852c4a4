"""The loops of n-gram counting and of looking up in C, for the CPU; ``ngram.c`` beside this file.

Compiled on first use (``ops/build/c.py``). Where that is impossible ``library`` is None, and
torch does both.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Iterable, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambabyte.ops.build import c as native_build

SOURCE = Path(__file__).with_name("ngram.c")
MAX_ORDER = 16
SHARED = 64  # contexts whose longer ones are looked for together, as in ngram.c and experts.c


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, None without a C compiler or a place to keep what it makes."""
    loaded = native_build.load(SOURCE)
    if isinstance(loaded, str):
        return None
    loaded.shorten.restype = ctypes.c_int64
    number, pointer = ctypes.c_int64, ctypes.c_void_p  # told once, as a byte is looked up often
    loaded.look_up.argtypes = pointer, number, pointer, number, *[pointer] * 4
    return loaded


def sort_contexts(text: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """Positions of ``text`` (uint8, on the CPU) sorted by their contexts, int32, and the leading
    key bytes that each shares with the one before it, uint8."""
    loaded = library()
    assert loaded is not None
    length = len(text) - order + 1
    place = torch.empty(length, dtype=torch.int32, device="cpu")
    common = torch.empty(length, dtype=torch.uint8, device="cpu")
    text = text.contiguous()
    failed = loaded.sort_contexts(_at(text), ctypes.c_int64(length), order,
                                  torch.get_num_threads(), _at(place), _at(common))
    if failed:
        raise MemoryError(f"sorting {length} contexts needs {48 * length} bytes")
    return place, common


def shorten(
    key: Tensor, contexts: int, start: Tensor, symbol: Tensor, count: Tensor, continuation: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """start, total, symbol and count, as in ``ngram.Level``, of the ``contexts`` contexts one byte
    shorter than those given, whose ``key`` says which each belongs to."""
    loaded = library()
    assert loaded is not None
    child = torch.searchsorted(key, torch.arange(contexts + 1, device="cpu") * 256)
    starts = torch.empty(contexts + 1, dtype=torch.int32, device="cpu")
    totals = torch.empty(contexts, dtype=torch.int32, device="cpu")
    symbols, counts = torch.empty_like(symbol), torch.empty_like(count)
    made = loaded.shorten(
        ctypes.c_int64(contexts), _at(child), _at(start), _at(symbol), _at(count),
        int(continuation), _at(starts), _at(totals), _at(symbols), _at(counts))
    return starts, totals, symbols[:made].clone(), counts[:made].clone()


def tables(
    levels: Sequence[Iterable[Tensor]], discounts: Sequence[Sequence[float]]
) -> Tables | None:
    """What looks up in these levels; None where they are not on the CPU, or without a compiler."""
    found = [list(level) for level in levels]
    on_cpu = all(t.device.type == "cpu" for t in found[0])
    return Tables(found, discounts) if on_cpu and library() is not None else None


class Tables:
    """Levels (key, start, total, symbol and count as ``ngram.Level`` has them, and maybe keep and
    best as ``guide.Guide`` does), each with its three discounts, for looking up, on the CPU."""

    def __init__(
        self, levels: Sequence[Iterable[Tensor]], discounts: Sequence[Sequence[float]],
        begins: Sequence[Tensor] | None = None,
    ) -> None:
        self._held = [[t.contiguous() for t in level] for level in levels]
        self.begins = _begins([level[0] for level in self._held]) if begins is None else begins
        self._levels = b"".join(
            struct.pack("9q", len(level[0]), begin.data_ptr(), *[t.data_ptr() for t in level],
                        *[0] * (7 - len(level)))
            for level, begin in zip(self._held, self.begins, strict=True))
        self._others = torch.empty(2, dtype=torch.uint8, device="cpu")  # results not asked for
        loaded = library()
        assert loaded is not None
        self._look_up, self._given = loaded.look_up, discounts
        self._discounts = struct.pack(f"{3 * len(levels)}d", *chain(*discounts))

    def __reduce__(self) -> tuple[Any, ...]:
        """For copy and pickle: the addresses are of these tensors."""
        return Tables, (self._held, self._given, self.begins)

    def with_hints(self, more: Iterable[Iterable[Tensor]]) -> Tables:
        """These with keep and best of each level."""
        levels = [[*level, *parts] for level, parts in zip(self._held, more, strict=True)]
        return Tables(levels, self._given, self.begins)

    def look_up(self, contexts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """After contexts (n, order - 1), the newest byte last: log p (n, 256) float32; and, with
        ``best`` in the tables, best byte and kind (n,) uint8 as in ``guide.Hint``."""
        contexts = contexts.to(torch.uint8).contiguous()
        log_p = torch.empty(len(contexts), 256, dtype=torch.float32, device="cpu")
        best, kind = (torch.empty(len(contexts), dtype=torch.uint8, device="cpu") for _ in range(2))
        self._look_up(self._levels, len(self._held), self._discounts, len(contexts), _at(contexts),
                      _at(log_p), _at(best), _at(kind))
        return log_p, best, kind

    def look_up_one(self, context: bytes) -> Tensor:
        """Log p (256,) float32 after one context."""
        log_p = torch.empty(256, dtype=torch.float32, device="cpu")
        others = self._others.data_ptr()
        self.look_up_into(context, log_p.data_ptr(), others, others + 1)
        return log_p

    def look_up_into(self, context: bytes, log_p: int, best: int, kind: int) -> None:
        """As ``look_up`` of one context, into memory at these addresses: 1 KiB, a byte, a byte."""
        self._look_up(self._levels, len(self._held), self._discounts, 1, context, log_p, best, kind)


def _begins(keys: Sequence[Tensor]) -> list[Tensor]:
    """Of the sorted keys of each length of context, where those begin that extend contexts 0,
    SHARED, 2 * SHARED, ... of the length below, and their end: a short search then finds one."""
    found = [torch.zeros(2, dtype=torch.int32, device="cpu")]
    for shorter, key in pairwise(keys):
        first = torch.arange(len(shorter) // SHARED + 2, device="cpu") * (SHARED * 256)
        found.append(torch.searchsorted(key, first, out_int32=True))
    return found


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
