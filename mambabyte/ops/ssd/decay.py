"""Decays between all pairs of steps of a chunk, as products that never leave [0, 1].

What a step writes is read at a later one times the decays between them. For decays a_s in [0, 1]
(of a head, or of each channel of a head) the chunked forms need ``prod_{j < s <= i} a_s`` for all
pairs j <= i. As a quotient of two products it divides by what may have underflowed, as
exp(cs_i - cs_j) it is a difference of large numbers; both fail under strong decay.

Here it is split where the chunk is halved. For j in the first half and i in the second the product
is (steps after j in the first half) x (steps up to i in the second): two factors in [0, 1], one
of them of i alone and one of j alone, so a quarter of all pairs is a matrix product. The other
pairs are in one half, and are halved again. The factors of a block are those of its halves times
one number, so a chunk of T steps takes log2(T) rounds of products, no exponential and no
division. A decay of 0 is exact.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def without_past(log_decay: Tensor, ages: Tensor | None) -> Tensor:
    """Log-decays (B, L, ...) with -inf, a factor of exactly 0, where ``ages`` (B, L) is 0: there a
    document starts. The form that follows needs to know no more of documents."""
    if ages is None:
        return log_decay
    return log_decay.masked_fill((ages == 0).view(*ages.shape, *[1] * (log_decay.ndim - 2)),
                                 -math.inf)


def chunk_length(chunk: int, length: int) -> int:
    """The chunk to use: ``chunk`` rounded down to a power of two, shorter for a short sequence."""
    return 1 << (min(chunk.bit_length() - 1, (length - 1).bit_length()))


def fold(x: Tensor, steps: int) -> Tensor:
    """Cut into chunks, the last filled up with zeros: (B, L, H, c) -> (B, K, H, T, c)."""
    pad = -x.shape[1] % steps
    # In order once, here: every product would else copy it again.
    return F.pad(x, (0, 0, 0, 0, 0, pad)).unflatten(1, (-1, steps)).transpose(2, 3).contiguous()


def unfold(x: Tensor, length: int) -> Tensor:
    """Back from chunks, without what they were filled up with: (B, K, H, T, c) -> (B, L, H, c)."""
    return x.transpose(2, 3).flatten(1, 2)[:, :length].contiguous()


def decayed_products(
    rows: tuple[Tensor, ...], keys: Tensor, decay: Tensor
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """``M_ij = sum_c rows_i[c] keys_j[c] prod_{j < s <= i} decay_s[c]`` for j <= i, else 0.

    Shapes: each of ``rows`` and ``keys`` (..., T, c) with T a power of two; ``decay`` (..., T, c),
    or (..., T, 1) where all channels decay alike, in [0, 1]. Returns M (..., T, T) for each of
    ``rows``, and two cumulated decays of decay's shape: from before the chunk up to and with step
    i, and from after step j to the chunk's end.
    """
    if decay.shape[-1] == 1:
        one = torch.ones_like(decay)
        (pairs,), since_start, to_end = _halved((one,), one, decay)
        return tuple(row @ keys.mT * pairs for row in rows), since_start, to_end
    return _halved(rows, keys, decay)


def _halved(
    rows: tuple[Tensor, ...], keys: Tensor, decay: Tensor
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    def halves(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
        first, second = x.unflatten(-2, (-1, 2, size)).unbind(-3)
        return first, second  # (..., blocks, size, c)

    # In blocks of `size` steps: the matrix of each, and the cumulated decays inside of it.
    size, steps = 1, decay.shape[-2]
    blocks = [(row * keys).sum(-1)[..., None, None] for row in rows]  # (..., T, 1, 1)
    since_start, to_end = decay, torch.ones_like(decay)
    while size < steps:
        start_1, start_2 = halves(since_start, size)
        end_1, end_2 = halves(to_end, size)
        early = (halves(keys, size)[0] * end_1).mT
        for n, row in enumerate(rows):
            first, second = blocks[n].unflatten(-3, (-1, 2)).unbind(-3)
            across = (halves(row, size)[1] * start_2) @ early
            blocks[n] = torch.cat([
                torch.cat([first, torch.zeros_like(first)], -1), torch.cat([across, second], -1)
            ], -2)
        since_start = torch.cat([start_1, start_1[..., -1:, :] * start_2], -2).flatten(-3, -2)
        to_end = torch.cat([end_1 * start_2[..., -1:, :], end_2], -2).flatten(-3, -2)
        size *= 2
    return tuple(block.squeeze(-3) for block in blocks), since_start, to_end
