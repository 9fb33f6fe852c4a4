"""Attention over windows and documents: one compiled kernel that skips what no query sees, a call
for each document, and what a window costs.

FlexAttention (arXiv:2412.05496) takes or skips TILE queries by TILE keys together.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mambabyte.errors import UserError

if TYPE_CHECKING:  # its import loads the compiler
    from torch.nn.attention.flex_attention import BlockMask

MAX_BLOCK = 1024  # queries in one block of a sliding window
TILE = 128  # queries, and keys, that FlexAttention skips or takes together


def window_tiles(length: int, window: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of TILE queries by TILE keys each: whether any pair is visible, and whether all are; bool
    (ceil(length / TILE), the same)."""
    row = torch.arange(-(-length // TILE), device=device)[:, None]
    before = TILE * (row - row.T)  # from the first key of a tile to its first query
    reached = (before >= 0) & (before - (TILE - 1) < window)
    return reached, (before > 0) & (before + TILE - 1 < window)


def flex_window(
    length: int, window: int, device: torch.device
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """``windowed_attention`` of whole sequences, for a compiler: one kernel that visits only what
    the window reaches, in tiles of TILE by TILE (FlexAttention, arXiv:2412.05496).

    (q (B, H, length, d), k, v (B, G, length, d)) -> (B, H, length, d). Called without a compiler it
    computes all scores.
    """
    from torch.nn.attention.flex_attention import flex_attention  # loads the compiler

    reached, whole = window_tiles(length, window, device)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query - key < window)

    mask = _block_mask(reached, whole, visible, length)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])

    return attention


def flex_documents(q: Tensor, k: Tensor, v: Tensor, window: int, ids: Tensor) -> Tensor:
    """``windowed_attention`` within documents, for a compiler as ``flex_window`` is: tiles that
    share no document are skipped.

    q (B, H, L, d), k, v (B, G, L, d); ids (B, L), the number of each step's document, which ascend.
    Returns (B, H, L, d).
    """
    from torch.nn.attention.flex_attention import flex_attention

    length = q.shape[2]
    reached, whole = window_tiles(length, window, q.device)
    spare = -length % TILE
    tiles = torch.cat([ids, ids[:, -1:].expand(-1, spare)], 1).unflatten(1, (-1, TILE))
    first, last = tiles[:, :, 0], tiles[:, :, -1]  # documents of each tile
    reached = reached & (first[:, :, None] <= last[:, None, :])
    whole = whole & (last[:, :, None] == first[:, None, :])

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = (key <= query) & (query - key < window)
        return near & (ids[batch, query] == ids[batch, key])

    mask = _block_mask(reached, whole, visible, length)
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def _block_mask(
    reached: Tensor, whole: Tensor, visible: Callable[..., Tensor], length: int
) -> BlockMask:
    """Of tiles, (.., rows, columns) bool: any pair is visible; all are."""
    from torch.nn.attention.flex_attention import BlockMask

    def listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
        # how many of each row, and which: those come first
        order = tiles.int().argsort(dim=-1, descending=True, stable=True).int()
        counts = tiles.sum(-1, dtype=torch.int32)
        if tiles.ndim == 2:
            counts, order = counts[None], order[None]
        return counts[:, None], order[:, None]

    return BlockMask.from_kv_blocks(
        *listed(reached & ~whole), *listed(whole), BLOCK_SIZE=TILE, mask_mod=visible,
        seq_lengths=(length, length))


def each_document(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor,
    starts: Tensor, others: Tensor,
) -> Tensor:
    """``attend(q, k, v)`` of each document by itself, so that nothing is computed for a mask.

    q (B, H, L, d), k, v (B, G, S, d), of which the last L positions are those of q; starts (B, L)
    bool, where documents begin; others (B,), how many first keys are of documents that have ended
    before. Returns (B, H, L, d). It waits for the device.
    """
    length, before, rows = q.shape[2], k.shape[2] - q.shape[2], []
    for row in range(len(q)):
        begins = starts[row].nonzero().flatten().tolist()
        own, parts = slice(row, row + 1), []
        for begin, end in itertools.pairwise(sorted({0, *begins, length})):
            keys = slice(before + begin if begin in begins else int(others[row]), before + end)
            parts.append(attend(q[own, :, begin:end], k[own, :, keys], v[own, :, keys]))
        rows.append(torch.cat(parts, 2))
    return torch.cat(rows)


def blocks_of(length: int, window: int) -> tuple[int, int, int]:
    """How ``windowed_attention`` cuts a sequence without a past: (bytes of plain causal
    attention, blocks behind them, queries a block)."""
    block = min(window, MAX_BLOCK)
    return min(length, window), max(0, -(-(length - window) // block)), block


def mean_keys(length: int, window: int, causal: bool = True) -> float:
    """Mean number of keys that a query of a sequence of ``length`` sees.

    Query t (from 1) sees min(t, window) keys. ``causal=False`` is the mean that is computed before
    masking, where no kernel skips what is masked. Raises UserError for one below 1.
    """
    if length < 1 or window < 1:
        raise UserError(f"length {length} and window {window}: both must be at least 1")
    first, count, block = blocks_of(length, window)
    if not causal:
        return (first * first + count * block * (window + block)) / length
    return (first * (first + 1) / 2 + (length - first) * first) / length
