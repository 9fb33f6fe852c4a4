"""Attention over windows and documents: by blocks under masks, by a compiled kernel that skips what
no query sees, by a kernel for sequences of many lengths, by a call for each document; and what a
window costs.

FlexAttention (arXiv:2412.05496) takes or skips TILE queries by TILE keys together. FlashAttention
(Dao 2023, arXiv:2307.08691) takes sequences one behind another; its kernels come with torch.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambabyte.errors import UserError
from mambabyte.ops.arguments import cumulative_lengths
from mambabyte.ops.library import transformed

if TYPE_CHECKING:  # its import loads the compiler
    from torch.nn.attention.flex_attention import BlockMask

MAX_BLOCK = 1024  # queries in one block of a sliding window
TILE = 128  # queries, and keys, that FlexAttention skips or takes together
# Bytes of a document, on average, below which FlashAttention is not asked: its backward pass keeps
# 128 rows of the queries' gradient a document, in float32.
SHORT = 16


def windowed_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, ids: Tensor | None = None
) -> Tensor:
    """Softmax attention in which a query sees itself and the ``window`` - 1 keys before it.

    q (B, H, L, d) are the last L positions of k and v (B, G, S, d), S >= L, of one dtype; H is a
    multiple of G. Returns (B, H, L, d). Child et al. 2019 (arXiv:1904.10509), section 4, call
    this local attention; Beltagy et al. 2020 (arXiv:2004.05150) compute it by blocks as here.

    Operations and memory are linear in L. Up to the window it is plain causal attention. Beyond
    it, the queries go in blocks of a window (at most MAX_BLOCK) against the keys of the block and
    of a window before it, all under one mask of that size. What makes a mask of more than
    2 MAX_BLOCK keys, a wider window or a long past of a wide window, warns that it does.

    With ``ids`` (B, S), the number of each key's document, a query sees no other one's: everything
    is under masks, a row its own.
    """
    length, before = q.shape[2], k.shape[2] - q.shape[2]
    if before >= window:
        k, v = k[:, :, before - window + 1 :], v[:, :, before - window + 1 :]
        ids = None if ids is None else ids[:, before - window + 1 :]
        before = window - 1

    def causal(end: int) -> Tensor:  # the first queries, where no key lies before
        mask = None if ids is None else _visible(end, 0, window, q.device, ids[:, :end])
        return _sdpa(q[:, :, :end], k[:, :, :end], v[:, :, :end], mask, causal=ids is None)

    if length == 1 and ids is None:
        return _sdpa(q, k, v)  # its window is all there is
    if before == 0 and length <= window:
        return causal(length)
    block = min(window, MAX_BLOCK)
    done, parts = 0, []
    if before == 0:
        done = window
        parts.append(causal(done))
    while done < length and before + done < window:  # until a window of keys lies before
        end = min(length, done + block)
        keys = slice(0, before + end)
        mask = _visible(end - done, before + done, window, q.device,
                        None if ids is None else ids[:, keys])
        parts.append(_sdpa(q[:, :, done:end], k[:, :, keys], v[:, :, keys], mask))
        done = end
    if done < length:
        start = before + done - window
        mask = _visible(block, window, window, q.device)
        parts.append(_blocks(q[:, :, done:], k[:, :, start:], v[:, :, start:], mask,
                             None if ids is None else ids[:, start:]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _blocks(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, ids: Tensor | None = None
) -> Tensor:
    """Blocks of queries q (B, H, L, d), each against its own stretch of k and v (B, G, W + L, d),
    as rows of one batch under ``mask`` (block, W + block), within documents ``ids`` (B, W + L)."""
    block, reach = mask.shape
    batch, _, length, _ = q.shape
    count = -(-length // block)
    spare = count * block - length  # queries that are not there, at the end
    q, k, v = (F.pad(x, (0, 0, 0, spare)) if spare else x for x in (q, k, v))
    if ids is not None:  # what fills up is a document too: no query is without a key
        ids = F.pad(ids, (0, spare), value=-2).unfold(1, reach, block).flatten(0, 1)
        mask = mask & _of_one_document(ids, block)
    q = q.unflatten(2, (count, block)).transpose(1, 2).flatten(0, 1)  # (B n, H, block, d)
    k, v = (x.unfold(2, reach, block).permute(0, 2, 1, 4, 3).flatten(0, 1) for x in (k, v))
    y = _sdpa(q, k, v, mask).unflatten(0, (batch, count)).transpose(1, 2).flatten(2, 3)
    return y[:, :, :length]


def _of_one_document(ids: Tensor, queries: int) -> Tensor:
    """Whether the last ``queries`` of ids (B, S) equal each: (B, 1, queries, S) bool."""
    return (ids[:, -queries:, None] == ids[:, None, :])[:, None]


def _visible(
    queries: int, past: int, window: int, device: torch.device, ids: Tensor | None = None
) -> Tensor:
    """Whether each query sees each key, ``past`` of which come before the queries: (queries,
    past + queries) bool; with ``ids`` (B, past + queries) a row, (B, 1, queries, past + queries).
    """
    keys = past + queries
    if keys > 2 * MAX_BLOCK and not torch.compiler.is_compiling():
        warnings.warn(
            f"attention with window {window} builds a mask of {queries} by {keys}: a window of at "
            f"most {MAX_BLOCK}, or a whole text within the window in one call, needs none so wide",
            RuntimeWarning, stacklevel=2)
    age = past + torch.arange(queries, device=device)[:, None] - torch.arange(keys, device=device)
    near = (age >= 0) & (age < window)
    return near if ids is None else near & _of_one_document(ids, queries)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


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


def flash_window(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor | None:
    """``windowed_attention`` by FlashAttention. None where the window is all there is, and where it
    cannot be asked: not on a GPU, another dtype or width, a compiler or a transform that looks in.

    q (B, H, L, d), k, v (B, G, S, d), S >= L. Returns (B, H, L, d).
    """
    if k.shape[2] <= window or q.shape[2] == 1 or not _takes_flash(q, k, v):
        return None
    y: Tensor = _Flash.apply(*(x.transpose(1, 2) for x in (q, k, v)), None,
                             (q.shape[2], k.shape[2]), window - 1)
    return y.transpose(1, 2)


def flash_documents(
    q: Tensor, k: Tensor, v: Tensor, window: int, ages: Tensor
) -> Tensor | None:
    """``windowed_attention`` within documents by FlashAttention. None where it cannot be asked: as
    of :func:`flash_window`, keys of a past, a number of documents that is not known
    (``cumulative_lengths``), or very short ones.

    q (B, H, L, d), k, v (B, G, L, d); ages (B, L) of :func:`mambabyte.ops.arguments.document_ages`.
    Returns (B, H, L, d).
    """
    if q.shape[2] != k.shape[2] or not _takes_flash(q, k, v):
        return None
    lengths = cumulative_lengths(ages)
    if lengths is None or SHORT * len(lengths) > ages.numel():
        return None
    return packed_attention(q, k, v, window, lengths)


def flash_takes(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether FlashAttention has a kernel for heads of that width in that type."""
    return dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= 256


def _takes_flash(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return (q.is_cuda and q.numel() > 0 and q.dtype == k.dtype == v.dtype
            and flash_takes(q.dtype, q.shape[3])
            and not torch.compiler.is_compiling() and not transformed()
            and torch.cuda.get_device_capability(q.device) >= (8, 0))


def packed_attention(q: Tensor, k: Tensor, v: Tensor, window: int, lengths: Tensor) -> Tensor:
    """FlashAttention of rows one behind another, cut at the cumulative ``lengths`` (n + 1,) int32;
    otherwise as :func:`flash_documents`."""
    rows = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B L, heads, d)
    y: Tensor = _Flash.apply(*rows, lengths, (q.shape[2], q.shape[2]), window - 1)
    return y.unflatten(0, (len(q), -1)).transpose(1, 2)


class _Flash(torch.autograd.Function):
    """torch's own kernels: sequences (B, L, heads, d), or with ``lengths`` (B L, heads, d)."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None,
        longest: tuple[int, int], before: int,
    ) -> Tensor:
        ctx.how = *longest, 0.0, True
        # As many keys as there may be are no window: there is a kernel for that.
        ctx.window = {} if before >= longest[1] - 1 else {
            "window_size_left": before, "window_size_right": 0}
        y, log_sums, *random, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, lengths, lengths, *ctx.how, False, **ctx.window)
        ctx.save_for_backward(q, k, v, y, log_sums, lengths, *random)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *kept, lengths, state, spare = ctx.saved_tensors
        found = torch.ops.aten._flash_attention_backward(
            dy, *kept, lengths, lengths, *ctx.how, state, spare, **ctx.window)
        return *found, None, None, None


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
