"""A byte model guided by an n-gram model: its network is trained on what counting leaves open.

Counting 100 MB takes a second and knows the spelling of common words; a network needs most of a
short training run to learn as much. So the network is given, before each byte, what the n-gram
model says, and its logits are added to the n-gram's log-probabilities:

    logits = network + gate * log p_ngram,      gate = 1 + w . hidden

The network also reads p_ngram, the byte that came most often after the longest context seen
before, and how long and how clear that context is.

The counts that guide training must not include the text trained on, where they would know every
answer: one part of the training text is counted, the other trained on, and both counted in the end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mambabyte.config import ModelConfig
from mambabyte.corpus.utf8 import START_BYTE
from mambabyte.model import ByteLM, embed
from mambabyte.model.lm import symbols
from mambabyte.ops.stream.feeding import nothing
from mambabyte.stream import Engine
from mambabyte.stream.streams import network_engine, numbers
from mambabyte.task import ngram_native
from mambabyte.task.mixture import as_tensor, as_text
from mambabyte.task.ngram import NgramModel, V

Layers = Callable[[Tensor, Any], tuple[Tensor, Any]]
_CLEAR = 4  # classes of how clear the longest context is
_CHUNK = 1 << 22  # bytes of text looked up at a time
_AT_ONCE = {"cpu": 4096, "cuda": 1 << 16}  # contexts looked up at a time
_NODES = 1 << 20  # contexts tabulated at a time
_ALONE = 4  # bytes that are fed sooner one by one than in one launch
_FEW = 16  # bytes for which looking up on the CPU is the quicker way


@dataclass(frozen=True)
class Hint:
    """What the n-gram model says before a byte; leading axes as the bytes."""

    log_p: Tensor  # (..., V) after the longest context seen more than once
    best: Tensor  # (...) the most frequent byte after the longest context seen at all
    kind: Tensor  # (...) its length and clearness, below ``Guide.n_kinds``


class Guide:
    """Hints from an n-gram model.

    Most long contexts were seen once. They are left out of the distributions, since what they say
    is in ``best`` and ``kind``: that makes the distributions that a text meets few enough for a
    table.
    """

    def __init__(self, ngram: NgramModel) -> None:
        self.ngram = ngram
        self._keep = _repeated(ngram)
        self._best = [_best_symbol(lv.start, lv.symbol, lv.count) for lv in ngram.levels]

    @functools.cached_property
    def near(self) -> Guide:
        """The same on the CPU, where a few look-ups cost less than launches on a GPU do."""
        if self.ngram.device.type == "cpu":
            return self
        other = object.__new__(Guide)
        other.ngram = self.ngram.near
        other._keep = [keep.cpu() for keep in self._keep]
        other._best = [(symbol.cpu(), top.cpu()) for symbol, top in self._best]
        return other

    @functools.cached_property
    def _native(self) -> ngram_native.Tables | None:
        tables = self.ngram.tables
        return None if tables is None else tables.with_hints(
            (keep, symbol) for keep, (symbol, _) in zip(self._keep, self._best, strict=True))

    def hint_into(self, context: bytes, log_p: int, best: int, kind: int) -> None:
        """``hint`` after the ``width`` bytes of ``context``, which needs tables in C, into memory
        of the host at these addresses: 256 float32, a byte, a byte."""
        assert self._native is not None
        self._native.look_up_into(context, log_p, best, kind)

    @property
    def looks_up_natively(self) -> bool:
        return self._native is not None

    @property
    def width(self) -> int:
        """Bytes of context that a hint looks at."""
        return self.ngram.order - 1

    @property
    def n_kinds(self) -> int:
        return _CLEAR * self.ngram.order

    @property
    def n_bytes(self) -> int:
        return self.ngram.n_bytes + sum(
            len(keep) + 5 * len(best) for keep, (best, _) in zip(self._keep, self._best,
                                                                strict=True))

    def hint(self, contexts: Tensor) -> Hint:
        """Hints after contexts (n, width), the newest byte last; log_p in float32."""
        if self._native is not None:
            return Hint(*self._native.look_up(contexts.to(self.ngram.device)))
        contexts = contexts.to(self.ngram.device, torch.int64)
        log_p = self.ngram.probabilities(contexts, keep=self._keep).log().float()
        return Hint(log_p, *self._longest(self.ngram.find(contexts)))

    def along(self, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For every byte of ``text`` (L,) uint8: the longest context kept, (L,) int64, numbered
        through all levels, the shortest first; best byte; kind."""
        device = self.ngram.device
        pad = torch.full((self.width,), START_BYTE, dtype=torch.uint8, device=text.device)
        whole = torch.cat([pad, text]).to(device)
        longest = torch.zeros(len(text), dtype=torch.int64, device=device)
        best, kind = (torch.empty(len(text), dtype=torch.uint8, device=device) for _ in range(2))
        for low in range(0, len(text), _CHUNK):
            high = min(low + _CHUNK, len(text))
            contexts = whole[low : high + self.width - 1].unfold(0, self.width, 1)
            found, first = self.ngram.find(contexts), 0
            for node, keep in zip(found, self._keep, strict=True):
                kept = (node >= 0) & keep[node.clamp(min=0)]
                longest[low:high] = torch.where(kept, node + first, longest[low:high])
                first += len(keep)
            best[low:high], kind[low:high] = self._longest(found)
        return longest, best, kind

    def tabulate(self, longest: Tensor) -> tuple[Tensor, Tensor]:
        """log p after each context that ``longest`` (L,) has, and those that it rests on,
        (rows, V) float16, 512 bytes a row; and the row of each of ``longest``, (L,) int32."""
        levels, device = self.ngram.levels, self.ngram.device
        sizes = [len(level.key) for level in levels]
        wanted = torch.zeros(sum(sizes), dtype=torch.bool, device=device)
        wanted[longest] = True
        each = wanted.split(sizes)
        for m in range(len(levels) - 1, 0, -1):
            each[m - 1][levels[m].key[each[m]] >> 8] = True
        row_of = torch.cumsum(wanted, 0, dtype=torch.int32) - 1
        rows = row_of.split(sizes)
        table = torch.empty(int(row_of[-1]) + 1, V, dtype=torch.float16, device=device)
        used = 0
        for m, level in enumerate(levels):
            for low in range(0, sizes[m], _NODES):
                node = low + each[m][low : low + _NODES].nonzero()[:, 0]
                if not len(node):
                    continue
                if m:
                    p = table[rows[m - 1][level.key[node] >> 8]].float().exp_()
                else:
                    p = torch.full((1, V), 1 / V, device=device)
                self.ngram.interpolate(m, p, torch.arange(len(node), device=device), node)
                table[used : used + len(node)] = p.log_()
                used += len(node)
        return table, row_of[longest]

    def _longest(self, found: list[Tensor]) -> tuple[Tensor, Tensor]:
        best = torch.zeros(len(found[0]), dtype=torch.uint8, device=self.ngram.device)
        kind = torch.zeros_like(best)
        for m, (level, node) in enumerate(zip(self.ngram.levels, found, strict=True)):
            at = node.clamp(min=0)
            types, total = level.start[at + 1] - level.start[at], level.total[at]
            symbol, top = (t[at] for t in self._best[m])
            clear = torch.where(types == 1, (total > 1).int(), 2 + (5 * top >= 4 * total).int())
            seen = node >= 0
            best = torch.where(seen, symbol, best)
            kind = torch.where(seen, (m * _CLEAR + clear).to(torch.uint8), kind)
        return best, kind


def _repeated(ngram: NgramModel) -> list[Tensor]:
    """Of every level the contexts with a count above 1, and those without their oldest bytes."""
    keep = [level.total > 1 for level in ngram.levels]
    for m in range(len(keep) - 1, 0, -1):
        keep[m - 1][ngram.levels[m].key[keep[m]] >> 8] = True
    keep[0][:] = True
    return keep


def _best_symbol(start: Tensor, symbol: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Most frequent symbol of each context, the first of equals, and its count."""
    contexts = len(start) - 1
    owner = torch.repeat_interleave(
        torch.arange(contexts, device=start.device), (start[1:] - start[:-1]).long())
    packed = count.long() * V + (V - 1 - symbol.long())
    top = torch.zeros(contexts, dtype=torch.int64, device=start.device)
    top.scatter_reduce_(0, owner, packed, "amax")
    return (V - 1 - top % V).to(torch.uint8), (top // V).int()


class GuidedLM(nn.Module):
    """A ByteLM with the hints of a guide; a byte model, whose state is the network's and the last
    bytes. ``guide`` is exchanged for one that counted more once training is over."""

    def __init__(self, config: ModelConfig, n_kinds: int) -> None:
        super().__init__()
        d = config.d_model
        self.lm = ByteLM(config)
        self.prior = nn.Linear(config.vocab_size, d, bias=False)
        self.best = nn.Embedding(config.vocab_size, d)
        self.kind = nn.Embedding(n_kinds, d)
        for embedding in (self.best, self.kind):
            nn.init.normal_(embedding.weight, std=config.embed_std)
        self.gate = nn.Linear(d, 1)
        nn.init.zeros_(self.gate.weight)
        nn.init.ones_(self.gate.bias)
        self.guide: Guide | None = None

    @property
    def device(self) -> torch.device:
        return self.lm.device

    def digest(self) -> str:
        """For ``weights_digest``: the guide's tables are no parameters."""
        return "" if self.guide is None else self.guide.ngram.digest()

    def embedded(self, tokens: Tensor, hint: Hint) -> Tensor:
        """Input of the layers (B, L, d_model): the bytes, and what is said of the next ones."""
        likely = torch.exp(0.5 * hint.log_p.float())  # of norm 1
        return (embed(tokens, self.lm.embedding.weight) + self.prior(likely)
                + embed(hint.best.long(), self.best.weight)
                + embed(hint.kind.long(), self.kind.weight))

    def combined(self, hidden: Tensor, hint: Hint) -> Tensor:
        return self.lm.logits(hidden).float() + self.gate(hidden).float() * hint.log_p.float()

    def loss(self, tokens: Tensor, log_p: Tensor, best: Tensor, kind: Tensor) -> Tensor:
        """Mean cross-entropy in nats; tokens (B, L + 1), hints (B, L, ...) of tokens[:, 1:]."""
        tokens = symbols(tokens, least=2)
        hint = Hint(log_p, best, kind)
        x = self.lm.through_layers(self.embedded(tokens[:, :-1], hint))
        return self.lm.run_head(self.lm, x, tokens[:, 1:], self.gate, hint.log_p)

    def forward(self, tokens: Tensor, state: tuple | None = None) -> tuple[Tensor, tuple]:
        """Logits (B, L, V) of the byte after each of ``tokens`` (B, L), and the state."""
        assert self.guide is not None, "a guided model needs its guide"
        return self.through(symbols(tokens), state, self.guide, self.lm.hidden)

    def streamed(self) -> Engine:
        """What a stream goes on by: the network in its engine, the hints from tables on the CPU."""
        return _GuidedEngine(self)

    def through(
        self, tokens: Tensor, state: tuple | None, guide: Guide, network: Layers
    ) -> tuple[Tensor, tuple]:
        """As ``forward``, with the hints of ``guide``, ``network`` for the layers."""
        width = guide.width
        inner, last = (None, None) if state is None else state
        if last is None:
            last = torch.full((len(tokens), width), START_BYTE, dtype=torch.uint8, device="cpu")
        text = torch.cat([last.to(tokens.device), tokens.to(torch.uint8)], 1)
        contexts = text[:, 1:].unfold(1, width, 1).flatten(0, 1)
        parts = [guide.hint(c) for c in contexts.split(_AT_ONCE.get(tokens.device.type, 4096))]
        log_p, best, kind = (
            torch.cat([getattr(p, name) for p in parts]).to(tokens.device)
            .unflatten(0, tokens.shape) for name in ("log_p", "best", "kind"))
        hint = Hint(log_p, best, kind)
        hidden, inner = network(self.embedded(tokens, hint), inner)
        return self.combined(hidden, hint), (inner, text[:, text.shape[1] - width :].cpu())


class _GuidedEngine(Engine):
    """The network in its engine, the hints from tables on the CPU; the last bytes are kept as such
    where bytes are fed alone."""

    sees_nan = True

    def __init__(self, model: GuidedLM) -> None:
        self._model, self._network = model, network_engine(model.lm, model)
        self.name = self._network.name

    def __call__(
        self, data: bytes, state: Any, meanwhile: Callable[[], None] = nothing
    ) -> tuple[Tensor, Any]:
        """Also calls ``meanwhile``, while the card has the last byte."""
        assert self._model.guide is not None, "a guided model needs its guide"
        guide, network = self._model.guide.near, self._network
        if not (network.fills and guide.looks_up_natively and len(data) <= _ALONE):
            meanwhile()
            log_p, state = self._several(data, state)
            return numbers(log_p), state
        # Bytes alone: no tensor is made of them.
        inner, last = (None, bytes([START_BYTE]) * guide.width) if state is None else state
        last = as_text(last)
        for i in range(len(data)):
            last = (last + data[i : i + 1])[1:]
            log_p, inner = network.guided_byte(
                data[i : i + 1], inner, functools.partial(guide.hint_into, last),
                meanwhile if i == len(data) - 1 else nothing)
        return log_p, (inner, last)

    beside = __call__

    @torch.inference_mode()
    def _several(self, data: bytes, state: Any) -> tuple[Tensor, Any]:
        guide, few = self._model.guide, len(data) <= _FEW
        assert guide is not None
        if few:
            guide = guide.near
        inner, last = (None, bytes([START_BYTE]) * guide.width) if state is None else state
        last = as_tensor(last)
        if few and self._network.hints:
            text = torch.cat([last[0], torch.frombuffer(bytearray(data), dtype=torch.uint8)])
            hint = guide.hint(text[1:].unfold(0, guide.width, 1))
            log_p, inner = self._network.guided(data, inner, (hint.log_p, hint.best, hint.kind))
            return log_p, (inner, text[None, len(text) - guide.width :])
        tokens = torch.tensor([list(data)], device=self._model.device)
        logits, state = self._model.through(tokens, (inner, last), guide, self._network)
        return torch.log_softmax(logits[0, -1], -1).cpu(), state

    def for_model(self, state: tuple) -> tuple:
        inner, last = state
        return self._network.for_model(inner), as_tensor(last)


class GuidedWindows:
    """Windows of a text with their hints: the arguments of ``GuidedLM.loss``."""

    def __init__(self, text: Tensor, guide: Guide, context: int) -> None:
        self.text = text
        self._offsets = torch.arange(context + 1, device=text.device)
        longest, *seen = guide.along(text)
        self._table, rows = guide.tabulate(longest)
        self._along = rows, *seen

    @property
    def n_bytes(self) -> int:
        """Memory that the hints take."""
        return sum(t.numel() * t.element_size() for t in (self._table, *self._along))

    def __call__(self, starts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        positions = starts[:, None] + self._offsets
        rows, best, kind = (t[positions[:, 1:]] for t in self._along)
        return self.text[positions].long(), self._table[rows], best, kind
