"""Interpolated Kneser-Ney n-gram model over bytes, counted by sorting, exact at any order.

Absolute discounting with continuation counts (Kneser & Ney 1995; Chen & Goodman 1998, "An
Empirical Study of Smoothing Techniques for Language Modeling", section 4.1.6), either with one
discount for all, or modified (section 4.1.7 there): three an order, for counts of 1, 2 and more,
estimated from how many counts there are of each. For a context of m bytes, with c the count of byte
w after it, summed to t::

    p_m(w) = (c(w) - d(c(w))) / t + sum_v d(c(v)) / t * p_{m-1}(w),    p_{-1}(w) = 1 / V

c is the number of occurrences at the longest context, and the number of distinct bytes seen before
(context, w) at every shorter one. A context never seen leaves p_{m-1} as it is.

Counting sorts the positions of the text once, by their reversed contexts: then every context of
every length is one run of neighbours, and the length of the common prefix of two neighbours says
where runs end. The contexts form a tree, in which a child has one older byte more: ``key`` is
parent * 256 + that byte, sorted, so a context is found by one binary search a byte.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mambabyte.corpus.files import bytes_of
from mambabyte.corpus.utf8 import START_BYTE
from mambabyte.errors import NonFiniteError, UserError
from mambabyte.task import ngram_native

V = 256
MAX_ORDER = 255  # lengths of common prefixes are kept in a byte
DISCOUNT = 0.5
_WORD = 7  # bytes of a sort key in one int64, so that none is negative
Discounts = tuple[float, float, float]  # of counts of 1, 2, and 3 or more
_ROWS = 4096  # contexts whose (V,) distributions are computed at a time


@dataclass(frozen=True)
class Level:
    """All contexts of one length: U contexts, E distinct (context, byte) pairs."""

    key: Tensor  # (U,) int64, sorted: index of the context without its oldest byte * 256 + that
    start: Tensor  # (U + 1,) int32: pairs of context i are start[i] : start[i + 1]
    total: Tensor  # (U,) int32, sum of its counts
    symbol: Tensor  # (E,) uint8, ascending within a context
    count: Tensor  # (E,) int32

    @property
    def n_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in vars(self).values())




class NgramModel:
    """Byte distributions from the last ``order - 1`` bytes; ``levels[m]`` has m bytes of context.

    A text begins after ``order - 1`` start bytes, in counting and in use.
    """

    def __init__(
        self, levels: list[Level], discount: float | None, bytes_counted: int,
        discounts: list[Discounts] | None = None,
    ) -> None:
        self.levels, self.discount, self.bytes_counted = levels, discount, bytes_counted
        self.discounts = discounts or [
            (discount,) * 3 if discount is not None else modified_discounts(level.count)
            for level in levels]

    @property
    def order(self) -> int:
        return len(self.levels)

    @property
    def device(self) -> torch.device:
        return self.levels[0].key.device

    @property
    def n_bytes(self) -> int:
        """Memory that the tables take."""
        return sum(level.n_bytes for level in self.levels)

    @functools.cached_property
    def tables(self) -> ngram_native.Tables | None:
        return ngram_native.tables(
            [vars(level).values() for level in self.levels], self.discounts)

    @functools.cached_property
    def near(self) -> NgramModel:
        """The same on the CPU, where a few look-ups cost less than launches on a GPU do."""
        return self if self.device.type == "cpu" else self.to("cpu")

    def after(self, context: bytes) -> Tensor:
        """Log-probabilities (V,) float32 on the CPU after ``context``, ``order - 1`` bytes."""
        if (tables := self.near.tables) is not None:
            return tables.look_up_one(context)
        return self.near.log_probs_after(
            torch.tensor([list(context)], dtype=torch.int64, device="cpu"))[0]

    def to(self, device: torch.device | str) -> NgramModel:
        levels = [Level(**{k: t.to(device) for k, t in vars(lv).items()}) for lv in self.levels]
        return NgramModel(levels, self.discount, self.bytes_counted, self.discounts)

    # ------------------------------------------------------------------------------- lookup

    def find(self, contexts: Tensor) -> list[Tensor]:
        """Index of each context at every length, -1 where it was never seen.

        ``contexts`` (B, order - 1) integers, the newest byte last. Returns ``order`` tensors (B,).
        """
        found = [torch.zeros(len(contexts), dtype=torch.int64, device=self.device)]
        for m in range(1, self.order):
            key = self.levels[m].key
            wanted = found[-1] * V + contexts[:, -m]
            at = torch.searchsorted(key, wanted).clamp_(max=len(key) - 1)
            found.append(torch.where((key[at] == wanted) & (found[-1] >= 0), at, -1))
        return found

    def probabilities(
        self, contexts: Tensor, orders: bool = False, keep: list[Tensor] | None = None
    ) -> Tensor:
        """Distributions (B, V) in float64 after ``contexts`` (B, order - 1), the newest byte last.

        With ``orders`` those of every order from 1 on, (order, B, V). With ``keep``, one mask (U,)
        a level, as if the contexts outside it had not been seen.
        """
        contexts = contexts.to(self.device, torch.int64)
        steps = self.chain(contexts, self.find(contexts), keep)
        if orders:
            return torch.stack([p.clone() for p, _ in steps])
        *_, (p, _) = steps
        return p

    def chain(
        self, contexts: Tensor, found: list[Tensor], keep: list[Tensor] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """From order 1 on p (B, V) float64, the same tensor each time, and the contexts' indices
        (B,), -1 for those not seen. ``found``: what ``find`` returned."""
        p = torch.full((len(contexts), V), 1 / V, dtype=torch.float64, device=self.device)
        for m, node in enumerate(found):
            if keep is not None:
                node = torch.where(keep[m][node.clamp(min=0)], node, -1)
            row = (node >= 0).nonzero()[:, 0]
            if len(row):
                self.interpolate(m, p, row, node[row])
            yield p, node

    def interpolate(self, m: int, p: Tensor, row: Tensor, node: Tensor) -> None:
        """Turn p (B, V) of the shorter context into that of level m in the rows given."""
        level = self.levels[m]
        begin, end = level.start[node].long(), level.start[node + 1].long()
        pair, owner = ragged(begin, end - begin)
        blend(p, row, level.total[node], owner, level.symbol[pair], level.count[pair],
                 self.discounts[m])

    def log_probs(self, data: bytes | np.ndarray, history: bytes = b"") -> Tensor:
        """Log-probabilities (L, V) float32 of every byte of ``data``, each given all before it."""
        return self.log_probs_after(self.contexts(data, history))

    def log_probs_after(self, contexts: Tensor) -> Tensor:
        """Log-probabilities (B, V) float32 after ``contexts`` (B, order - 1), newest byte last."""
        if (tables := self.tables) is not None:
            return tables.look_up(contexts.to(self.device))[0]
        return torch.cat([self.probabilities(c).log().float() for c in contexts.split(_ROWS)])

    def contexts(self, data: bytes | np.ndarray, history: bytes = b"") -> Tensor:
        """The ``order - 1`` bytes before each byte of ``data``, a view (L, order - 1)."""
        width = self.order - 1
        text = (bytes([START_BYTE]) * width + history)[len(history):] + bytes(data)
        tokens = torch.from_numpy(np.frombuffer(bytearray(text), np.uint8)).to(self.device)
        return tokens[: len(tokens) - 1].unfold(0, width, 1) if width else tokens[:, None][:, :0]

    def scores_by_order(
        self, data: bytes | np.ndarray, report: Callable[[float], None] = lambda done: None
    ) -> list[dict[str, float]]:
        """Bits per byte and greedy byte accuracy on ``data`` of every order from 1 on.

        ``report`` is called with the share done.
        """
        if not len(data):
            raise UserError("there is nothing to score: the text is empty")
        target = torch.tensor(bytearray(data), device=self.device).long()
        bits = torch.zeros(self.order, dtype=torch.float64, device=self.device)
        right = torch.zeros_like(bits)
        rows, done = _ROWS // 4, 0
        for contexts, wanted in zip(self.contexts(data).split(rows), target.split(rows),
                                    strict=True):
            p = self.probabilities(contexts, orders=True)  # (order, rows, V)
            index = wanted.expand(self.order, -1)[:, :, None]
            bits -= p.gather(2, index)[:, :, 0].log2().sum(1)
            right += (p.argmax(2) == wanted).sum(1)
            done += len(wanted)
            report(done / len(target))
        if not bits.isfinite().all():
            raise NonFiniteError("the probabilities of the text are not finite: the tables or the "
                                 f"discount, {self.discount}, are damaged")
        return [{"order": i + 1, "bits_per_byte": float(bits[i]) / len(target),
                 "byte_accuracy": float(right[i]) / len(target)} for i in range(self.order)]

    def digest(self) -> str:
        """SHA-256 of the tables and what they are of."""
        return digest(*self.named())

    def named(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tables by name, on the CPU, and what they are of."""
        return ({f"{m}.{name}": t.cpu().contiguous()
                 for m, level in enumerate(self.levels) for name, t in vars(level).items()},
                {"order": str(self.order), "discount": repr(self.discount),
                 "bytes_counted": str(self.bytes_counted)})


def digest(tensors: dict[str, Tensor], about: dict[str, str]) -> str:
    """SHA-256 of tensors on the CPU by name, and of what is said about them."""
    total = hashlib.sha256(repr(sorted(about.items())).encode())
    for name in sorted(tensors):
        total.update(f"{name} {tensors[name].dtype}".encode())
        total.update(tensors[name].numpy().data)
    return total.hexdigest()


def count(
    data: bytes | np.ndarray | Tensor, order: int = 12, discount: float | None = DISCOUNT,
    device: torch.device | str | None = None, *, continuation: bool = True,
    report: Callable[[float], None] = lambda done: None,
) -> NgramModel:
    """Count ``data`` and return its Kneser-Ney model of n-grams of up to ``order`` bytes.

    ``discount`` None is modified Kneser-Ney; ``device`` None is where the text is.
    Without ``continuation`` shorter contexts count occurrences too: plain absolute discounting.
    The work is sorting, on ``device``: by torch on a GPU, about 60 bytes of memory a byte of text
    at the peak; in C on the CPU where there is a compiler, else by torch too, five times slower.
    ``report`` is told the share that is done: sorting, the orders going up, then going down.
    Raises UserError for an empty text, an order outside [1, 255] or a discount outside (0, 1).
    """
    if not 1 <= order <= MAX_ORDER:
        raise UserError(f"order is {order}: it must be from 1 to {MAX_ORDER}")
    if discount is not None and not 0 < discount < 1:
        raise UserError(f"discount is {discount}: it must be between 0 and 1")
    if not isinstance(data, Tensor):
        data = torch.from_numpy(np.frombuffer(bytes_of(data), np.uint8).copy())
    if not len(data):
        raise UserError("there is nothing to count: the text is empty")
    data = data.to(data.device if device is None else device)
    text = torch.nn.functional.pad(data, (order - 1, 0), value=START_BYTE)

    native = (text.device.type == "cpu" and order <= ngram_native.MAX_ORDER
              and ngram_native.library() is not None)
    keys, pair, counts = _distinct(text, order, native, report)
    levels = [_level(keys[-1], pair, counts)]
    if native:  # a level is enough for the next
        del pair, counts
    for m in range(order - 1, 0, -1):
        report((3 * order - m) / (3 * order))
        if native:
            longer = levels[-1]
            levels.append(Level(keys[m - 1], *ngram_native.shorten(
                keys[m], len(keys[m - 1]), longer.start, longer.symbol, longer.count,
                continuation)))
        else:
            pair, counts = _shortened(keys[m], pair, counts, continuation)
            levels.append(_level(keys[m - 1], pair, counts))
    return NgramModel(levels[::-1], discount, len(data))


def _distinct(
    text: Tensor, order: int, native: bool, report: Callable[[float], None]
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The keys of the contexts of every length below ``order``, and the distinct n-grams of
    ``order`` bytes, as context and symbol, with their counts."""
    common, symbol, older = _sorted_contexts(text, order, native)
    keys = [torch.zeros(1, dtype=torch.int64, device=text.device)]
    node = torch.zeros(len(common), dtype=torch.int32, device=text.device)  # of every position
    for m in range(1, order):
        report((order + m) / (3 * order))
        new = common < m
        at = new.nonzero()[:, 0]
        keys.append(node[at].long() * V + older(m, at))
        torch.cumsum(new, 0, dtype=torch.int32, out=node)
        node -= 1
    at = (common < order).nonzero()[:, 0]  # one position of each distinct n-gram
    counts = at.diff(append=at.new_tensor([len(common)])).int()
    return keys, node[at].long() * V + symbol[at], counts


def _shortened(
    keys: Tensor, pair: Tensor, counts: Tensor, continuation: bool
) -> tuple[Tensor, Tensor]:
    """Pairs of context and symbol, and their counts, where each context has lost its oldest byte:
    with ``continuation`` each distinct pair counts once, else its counts are added."""
    shorter = ((keys[pair >> 8] >> 8) << 8) | (pair & 255)
    shorter, moved = shorter.sort()
    pair, sizes = torch.unique_consecutive(shorter, return_counts=True)
    if not continuation:
        running = torch.cat([sizes.new_zeros(1), counts[moved].cumsum(0)])
        ends = sizes.cumsum(0)
        sizes = running[ends] - running[ends - sizes]
    return pair, sizes.int()


def _sorted_contexts(
    text: Tensor, order: int, native: bool
) -> tuple[Tensor, Tensor, Callable[[int, Tensor], Tensor]]:
    """Sort the positions by (newest context byte, ..., oldest, the byte itself).

    Returns the number of leading key bytes that each position shares with the one before it in
    that order, (L,) uint8, the byte itself, and a function (m, at) -> m-th newest context byte.
    """
    length = len(text) - order + 1

    def column(rank: int) -> Tensor:  # byte of this rank in the key, for every position
        back = order - 1 if rank == order - 1 else order - 2 - rank
        return text[back : back + length]

    if native:
        position, common = ngram_native.sort_contexts(text, order)
        return common, column(order - 1)[position], lambda m, at: column(m - 1)[position[at]]

    words = [range(low, min(low + _WORD, order)) for low in range(0, order, _WORD)]

    def pack(ranks: range) -> Tensor:
        word = torch.zeros(length, dtype=torch.int64, device=text.device)
        for rank in ranks:
            word.mul_(V).add_(column(rank))
        return word

    place: Tensor | None = None
    for ranks in reversed(words):  # least significant first; each sort keeps the one before
        word = pack(ranks)
        if place is not None:
            word = word[place]
        moved = word.sort(stable=True).indices
        place = moved if place is None else place[moved]
        del word, moved
    assert place is not None

    common = torch.zeros(length, dtype=torch.uint8, device=text.device)
    same = torch.ones(length, dtype=torch.bool, device=text.device)
    same[0] = False
    for ranks in words:
        word = pack(ranks)[place]
        differs = torch.zeros_like(word)
        torch.bitwise_xor(word[1:], word[:-1], out=differs[1:])
        for rank in ranks:
            same &= (differs >> (8 * (ranks[-1] - rank))) == 0
            common += same
    return common, column(order - 1)[place], lambda m, at: column(m - 1)[place[at]]


def _level(key: Tensor, pair: Tensor, counts: Tensor) -> Level:
    contexts = len(key)
    lengths = torch.bincount(pair >> 8, minlength=contexts)
    start = torch.zeros(contexts + 1, dtype=torch.int32, device=key.device)
    torch.cumsum(lengths, 0, dtype=torch.int32, out=start[1:])
    running = torch.cat([counts.new_zeros(1, dtype=torch.int64), counts.cumsum(0)])
    total = running[start[1:].long()] - running[start[:-1].long()]
    return Level(key, start, total.int(), (pair & 255).to(torch.uint8), counts)


def modified_discounts(count: Tensor) -> Discounts:
    """Discounts of counts of 1, 2, and 3 or more (Chen & Goodman 1998, equation 26), from all
    counts (E,); where there are too few counts to tell, that of the next smaller, or ``DISCOUNT``.
    """
    n = torch.bincount(count.clamp(max=5), minlength=6).tolist()
    found, last = [], DISCOUNT
    for c in (1, 2, 3):
        if n[1] and n[c] and n[c + 1]:
            estimate = c - (c + 1) * n[1] / (n[1] + 2 * n[2]) * n[c + 1] / n[c]
            last = min(max(estimate, 0.01), c - 0.01)
        found.append(last)
    return found[0], found[1], found[2]


def blend(
    p: Tensor, row: Tensor, total: Tensor, owner: Tensor, symbol: Tensor, count: Tensor,
    discounts: Discounts,
) -> None:
    """Turn p (B, V) into discounted counts and what they leave of it, in the rows (R,) given.

    ``total`` (R,) is the sum of counts of each; pair i has ``symbol[i]`` ``count[i]`` times in
    ``row[owner[i]]``, no symbol twice in a row.
    """
    off = torch.tensor(discounts, dtype=p.dtype, device=p.device)[count.clamp(max=3).long() - 1]
    total = total.to(p.dtype)
    left = torch.zeros(len(row), V, dtype=p.dtype, device=p.device)  # the sum is the same each time
    left[owner, symbol.long()] = off
    p[row] *= (left.sum(1) / total)[:, None]
    p[row[owner], symbol.long()] += (count.to(p.dtype) - off) / total[owner]


def ragged(begin: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """Indices begin[i] ... begin[i] + length[i] - 1, all i of (n,) in a row, and the i of each."""
    owner = torch.repeat_interleave(torch.arange(len(begin), device=begin.device), length)
    shift = begin - (length.cumsum(0) - length)
    return torch.arange(len(owner), device=begin.device) + shift[owner], owner
