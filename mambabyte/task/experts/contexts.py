"""Counts of bytes after contexts that are no plain suffix: words, with gaps, without case, long.

A context of position i is a run of bytes that ends ``skip`` bytes before i, and is known by a hash
of 55 bits; with the byte that followed it is one int64, so that counting a text is one sort. Two
contexts of 100 MB of text share a hash with a probability of some percent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from mambabyte.config.checks import Checked, between
from mambabyte.corpus.utf8 import START_BYTE
from mambabyte.task.ngram import Discounts, V, blend, modified_discounts, ragged

LONGEST = 32  # bytes of a context, and of the gap behind it
PADDING = 2 * LONGEST  # bytes before a text, so that each position has its context
_CHUNK = 1 << 22  # positions hashed at a time
_BASE, _SCRAMBLE = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93  # odd, as the powers must be invertible


@dataclass(frozen=True)
class Context(Checked):
    """Which bytes before a position are its context: ``length`` of them, or, with ``words``, those
    from the beginning of a word on, 1 for the present word, 2 for the one before as well, but not
    more than ``length``. Letters are those of ASCII and all bytes of longer characters."""

    length: Annotated[int, between(1, LONGEST)] = LONGEST
    words: Annotated[int, between(0, LONGEST)] = 0
    skip: Annotated[int, between(0, LONGEST)] = 0  # bytes between the context and the position
    fold: bool = False  # capitals of ASCII count as small


def hashes(text: Tensor, context: Context) -> Tensor:
    """Hash of the context of every position PADDING ... len(text), (len(text) - PADDING + 1,)
    int64 below 2**55, of text (L,) uint8.

    The hash of bytes b is sum_j (b_j + 1) BASE**j modulo 2**64, from prefix sums, scrambled.
    """
    device = text.device
    size = min(_CHUNK, len(text) - PADDING + 1)
    power, inverse = (_powers(base, size + PADDING, device) for base in (_BASE, pow(
        _BASE, -1, 1 << 64)))
    made = torch.empty(len(text) - PADDING + 1, dtype=torch.int64, device=device)
    letters = _table(_is_letter, device)
    small = _table(_small if context.fold else int, device)
    for low in range(0, len(made), size):
        here = text[low : low + size + PADDING - 1].long()
        sums = torch.zeros(len(here) + 1, dtype=torch.int64, device=device)
        torch.cumsum((small[here] + 1) * power[: len(here)], 0, out=sums[1:])
        end = torch.arange(PADDING, len(here) + 1, device=device) - context.skip
        begin = end - context.length
        if context.words:
            gap = letters[here] == 0
            before = torch.zeros_like(sums)  # how many gaps there are before each place
            torch.cumsum(gap, 0, out=before[1:])
            places = torch.cat([gap.nonzero()[:, 0], end.new_zeros(1)])
            rank = before[end] - context.words
            word = torch.where(rank >= 0, places[rank.clamp(min=0)] + 1, 0)
            begin = torch.maximum(begin, word)
        total = (sums[end] - sums[begin]) * inverse[begin] * _signed(_SCRAMBLE)
        made[low : low + len(end)] = (total >> 9) & ((1 << 55) - 1)
    return made


def _is_letter(byte: int) -> int:
    return int(byte >= 128 or chr(byte).isalpha())


def _small(byte: int) -> int:
    return byte + 32 if ord("A") <= byte <= ord("Z") else byte


def _table(of: Callable[[int], int], device: torch.device) -> Tensor:
    return torch.tensor([of(byte) for byte in range(V)], device=device)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word


def _powers(base: int, n: int, device: torch.device) -> Tensor:
    """base**0 ... base**(n - 1) modulo 2**64, by doubling."""
    powers = torch.ones(1, dtype=torch.int64, device=device)
    while len(powers) < n:
        step = _signed(pow(base, len(powers), 1 << 64))
        powers = torch.cat([powers, powers * step])
    return powers[:n]


@dataclass(frozen=True)
class ContextTable:
    """What followed each context: E distinct pairs, sorted by hash."""

    context: Context
    key: Tensor  # (E,) int64: hash * 256 + the byte that followed
    count: Tensor  # (E,) int32
    discounts: Discounts

    @property
    def n_bytes(self) -> int:
        return 12 * len(self.key)

    def to(self, device: torch.device | str) -> ContextTable:
        return ContextTable(self.context, self.key.to(device), self.count.to(device),
                            self.discounts)

    def interpolate(self, hashed: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """Turn p (B, V) into the distributions after contexts hashed (B,); returns the sum of
        counts of each and how many bytes have one, (B,) both."""
        key = hashed << 8
        begin = torch.searchsorted(self.key, key)
        distinct = torch.searchsorted(self.key, key + V) - begin
        pair, owner = ragged(begin, distinct)
        total = torch.zeros_like(distinct).index_add_(0, owner, self.count[pair].long())
        row = distinct.nonzero()[:, 0]
        rank = torch.cumsum(distinct > 0, 0) - 1  # of each of B among the rows
        blend(p, row, total[row], rank[owner], self.key[pair] & 255, self.count[pair],
              self.discounts)
        return total, distinct


def count_contexts(text: Tensor, context: Context) -> ContextTable:
    """Count what follows each context in text (L,) uint8, on its device; modified discounts."""
    whole = padded(text)
    key = hashes(whole[:-1], context) << 8
    key += text
    key, count = torch.unique_consecutive(key.sort().values, return_counts=True)
    count = count.int()
    return ContextTable(context, key, count, modified_discounts(count))


def padded(text: Tensor) -> Tensor:
    """``text`` (L,) behind PADDING start bytes."""
    return torch.cat([text.new_full((PADDING,), START_BYTE), text])
