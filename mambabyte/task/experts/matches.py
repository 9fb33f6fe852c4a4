"""What came after the latest places of a stream whose last bytes are the present ones.

For each of some lengths of context, a match of that length is an earlier place of the history with
the same bytes before it; the bytes after the latest few of them are counted. That is a cache of the
text being read: names and phrases come again. Nothing is kept but the last bytes themselves: so a
state is a value. For a stream ``experts.c`` searches them anew for every byte, some 10 microseconds
for 64 kB; many positions at once are one sort a length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from mambabyte.config.checks import Checked, between, entries
from mambabyte.task.experts.contexts import LONGEST, PADDING, Context, hashes
from mambabyte.task.ngram import Discounts, V

SHORTEST = 3  # bytes of context, as in experts.c
MATCH_DISCOUNT: Discounts = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Matches(Checked):
    """Which matches are counted."""

    lengths: Annotated[tuple[Annotated[int, between(SHORTEST, LONGEST)], ...], entries(
        0, rising=True)] = (3, 4, 5, 6, 8, 11, 16, 24)  # bytes of context
    reach: Annotated[int, between(1, 1 << 30)] = 1 << 16  # bytes searched, contexts included
    newest: Annotated[int, between(1, (1 << 16) - 1)] = 8  # places of each length, in 16 bits in C


@dataclass(frozen=True)
class Found:
    """Counts at some positions: one entry a position, length and byte, in this order."""

    row: Tensor  # (E,) int64: position, from 0
    kind: Tensor  # (E,) int64: index of the length
    symbol: Tensor  # (E,) int64
    count: Tensor  # (E,) int32


def find_matches(text: Tensor, begin: int, end: int, matches: Matches) -> Found:
    """Matches at the positions ``begin`` ... ``end`` - 1 of text (L,) uint8, each with what is
    before it as its history, but for the first PADDING bytes; on the text's device.

    Of positions sorted by the hash of their contexts, stably, the j-th before one is the j-th
    latest with the same context.
    """
    assert PADDING <= begin <= end <= len(text) + 1
    found = [torch.zeros(0, dtype=torch.int64, device=text.device)]
    text = text[: end - 1]
    for kind, length in enumerate(matches.lengths):
        hashed, order = hashes(text, Context(length)).sort(stable=True)
        order += PADDING
        for back in range(1, min(matches.newest, len(order) - 1) + 1):
            at, place = order[back:], order[:-back]
            low = (at - matches.reach).clamp(min=PADDING)
            match = (hashed[back:] == hashed[:-back]) & (place - length >= low) & (at >= begin)
            at, place = at[match], place[match]
            found.append(((at - begin) * len(matches.lengths) + kind) * V + text[place])
    key, count = torch.unique(torch.cat(found), return_counts=True)
    return Found(key // V // len(matches.lengths) if matches.lengths else key,
                 key // V % max(1, len(matches.lengths)), key % V, count.int())
