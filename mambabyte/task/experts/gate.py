"""Experts over the next byte, and the gate that weighs them.

Each expert is a distribution over the next byte:

- the n-gram model's, at some orders;
- counts of the training text after other contexts (``contexts.py``): words, gaps, folded case;
- counts of the stream itself after matches of its last bytes (``matches.py``), the longer ones
  interpolated into the shorter ones;
- the network's.

All counts are discounted, and what that leaves goes to the distribution of less context: the
n-gram's, or the next shorter match's. The gate reads four numbers an expert (the probability of its
likeliest byte, the sum of squared probabilities, how often its context was seen and followed by how
many bytes) and gives the weights of a linear mixture::

    p = sum_e softmax(W2 tanh(W1 f + b1) + b2)_e p_e

It is fitted on training text that was not counted. Only the probabilities of the bytes that came
matter there, so a fit takes a moment. The torch form here is the definition and works on any
device; ``experts.c`` computes the same on the CPU.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from mambabyte.config import TrainConfig
from mambabyte.model.mixer import in_float32
from mambabyte.task.experts.contexts import PADDING, Context, ContextTable, hashes
from mambabyte.task.experts.matches import MATCH_DISCOUNT, Found, Matches, find_matches
from mambabyte.task.experts.native import FEATURES, MOST, MOST_HIDDEN, NativeExperts, library
from mambabyte.task.ngram import NgramModel, blend
from mambabyte.train.captured import CapturedStep
from mambabyte.train.optim import MuonAdamW

_ROWS = {"cpu": 1024, "cuda": 32768}  # positions whose distributions are computed at a time
_BATCH = 4096  # positions of a step of the fit
_LEAST_SCALE = 0.01  # of what hardly varies in the fit, and may elsewhere
_FIT = TrainConfig(precision="fp32", step="graph", grad_clip=0.0)


@dataclass(frozen=True)
class Mixing:
    """Which experts a system has beside its network, and how their gate is fitted."""

    orders: tuple[int, ...] = (3, 4, 5, 6, 7, 8, 10, 12)  # of the n-gram model, ascending
    contexts: tuple[Context, ...] = ()
    matches: Matches = field(default_factory=Matches)
    fit_bytes: int = 400_000  # of training text that is not counted, for the gate
    hidden: int = 128
    steps: int = 1000
    lr: float = 0.007


@dataclass
class Experts:
    """The counted experts: which orders of ``ngram``, which tables, which matches."""

    ngram: NgramModel
    orders: tuple[int, ...]  # ascending, from 1 to that of the n-gram model
    tables: list[ContextTable]
    matches: Matches

    @property
    def names(self) -> list[str]:
        return [*(f"order {order}" for order in self.orders),
                *(f"words {c.words}" if c.words else
                  f"{c.length} bytes" + (f", {c.skip} back" if c.skip else "")
                  + (", folded" if c.fold else "") for c in (t.context for t in self.tables)),
                *(f"match {length}" for length in self.matches.lengths)]

    @property
    def n_bytes(self) -> int:
        return self.ngram.n_bytes + sum(table.n_bytes for table in self.tables)

    @property
    def near(self) -> Experts:
        """The same on the CPU; the n-gram's tables are those that all have there."""
        return replace(self, ngram=self.ngram.near,
                       tables=[table.to("cpu") for table in self.tables])

    def distributions(
        self, text: Tensor, begin: int, rows: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Before each place from ``begin`` (at least PADDING) to the end of text (L,) uint8, end
        included: p (B, E, V) and evidence (B, E, 2), the sum of counts and how many bytes have
        one, in float64; in pieces of ``rows`` places (0: as suit the device).
        """
        width, device = self.ngram.order - 1, self.ngram.device
        text, rows = text.to(device), rows or _ROWS.get(device.type, 1024)
        found = find_matches(text, begin, len(text) + 1, self.matches)
        hashed = [hashes(text[begin - PADDING :], table.context) for table in self.tables]
        for low in range(begin, len(text) + 1, rows):
            high = min(low + rows, len(text) + 1)
            contexts = (text[low - width : high - 1].unfold(0, width, 1) if width
                        else text.new_empty((high - low, 0)))
            yield self._piece(contexts.long(), [h[low - begin : high - begin] for h in hashed],
                              _between(found, low - begin, high - begin))

    def _piece(
        self, contexts: Tensor, hashed: list[Tensor], found: Found
    ) -> tuple[Tensor, Tensor]:
        every: list[tuple[Tensor, Tensor, Tensor]] = []
        p = torch.empty(0, device="cpu")
        for m, (p, node) in enumerate(self.ngram.chain(contexts, self.ngram.find(contexts))):
            if m + 1 in self.orders:
                level, at = self.ngram.levels[m], node.clamp(min=0)
                every.append((p.clone(), torch.where(node >= 0, level.total[at], 0), torch.where(
                    node >= 0, level.start[at + 1] - level.start[at], 0)))
        for table, keys in zip(self.tables, hashed, strict=True):
            here = p.clone()
            every.append((here, *table.interpolate(keys, here)))
        for kind in range(len(self.matches.lengths)):
            chosen = (found.kind == kind).nonzero()[:, 0]
            owner, symbol, count = (t[chosen] for t in (found.row, found.symbol, found.count))
            total, distinct = (torch.zeros(len(p), dtype=torch.int64, device=p.device).index_add_(
                0, owner, values) for values in (count.long(), torch.ones_like(owner)))
            row = distinct.nonzero()[:, 0]
            rank = torch.cumsum(distinct > 0, 0) - 1
            blend(p, row, total[row], rank[owner], symbol, count, MATCH_DISCOUNT)
            every.append((p.clone(), total, distinct))
        return (torch.stack([q for q, _, _ in every], 1),
                torch.stack([torch.stack([t, d], -1) for _, t, d in every], 1).double())


def _between(found: Found, low: int, high: int) -> Found:
    begin, end = torch.searchsorted(found.row, torch.tensor([low, high], device=found.row.device)
                                    ).tolist()
    return Found(found.row[begin:end] - low, found.kind[begin:end], found.symbol[begin:end],
                 found.count[begin:end])


def features(p: Tensor, evidence: Tensor) -> Tensor:
    """What the gate reads (B, FEATURES * E) of p (B, E, V) and evidence (B, E, 2)."""
    total, distinct = evidence.unbind(-1)
    return torch.stack([p.amax(-1), p.square().sum(-1), torch.log2(1 + total) / 8,
                        distinct / (1 + total)], -1).flatten(1)


class Gate(nn.Module):
    """Weights of the experts from their features: a hidden layer of tanh, a softmax."""

    def __init__(self, n_experts: int, hidden: int = 32) -> None:
        super().__init__()
        self.inner = nn.Linear(FEATURES * n_experts, hidden)
        self.outer = nn.Linear(hidden, n_experts)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Log of the weights (B, E)."""
        return torch.log_softmax(self.outer(torch.tanh(self.inner(features))), -1)


def with_others(p: Tensor, evidence: Tensor, others: Tensor | None) -> tuple[Tensor, Tensor]:
    """Experts and the evidence for them, with more whose distributions are (B, n, V)."""
    if others is None:
        return p, evidence
    return (torch.cat([p, others.to(p)], 1),
            torch.cat([evidence, evidence.new_zeros((*others.shape[:2], 2))], 1))


def native_experts(experts: Experts, others: int, gate: Gate | None = None) -> NativeExperts | None:
    """The same in C, of tables on the CPU; None without a compiler, or where it has no room."""
    n_experts = len(experts.names) + others
    if library() is None or experts.ngram.tables is None or n_experts > MOST or (
            experts.ngram.order > PADDING) or (
            gate is not None and gate.inner.out_features > MOST_HIDDEN):
        return None
    weights = [] if gate is None else [
        gate.inner.weight, gate.inner.bias, gate.outer.weight, gate.outer.bias]
    return NativeExperts(experts.ngram, experts.orders, experts.tables, experts.matches, others,
                         weights)


def mixed(
    experts: Experts, gate: Gate, text: Tensor, begin: int, others: Tensor | None = None
) -> Tensor:
    """Log p (L, V) float32 of the mixture at the places of ``Experts.distributions``; others
    (L, n, V)."""
    gate, parts, done = copy.deepcopy(gate).double(), [], 0
    for p, evidence in experts.distributions(text, begin):
        here = slice(done, done + len(p))
        done += len(p)
        p, evidence = with_others(p, evidence, None if others is None else others[here])
        weights = gate(features(p, evidence)).exp()
        parts.append((weights[:, None] @ p)[:, 0].log().float())
    return torch.cat(parts)


def read(
    experts: Experts, text: Tensor, begin: int, others: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What each expert gives the bytes text[begin:], (L, E), and what the gate reads there."""
    target = text[begin:].to(experts.ngram.device).long()
    picked, seen, done = [], [], 0
    for p, evidence in experts.distributions(text[:-1], begin):
        here = slice(done, done + len(p))
        done += len(p)
        p, evidence = with_others(p, evidence, None if others is None else others[here])
        picked.append(p.gather(2, target[here, None, None].expand(-1, p.shape[1], 1))[..., 0])
        seen.append(features(p, evidence).float())
    return torch.cat(picked).float(), torch.cat(seen)


def fit_gate(
    experts: Experts, text: Tensor, begin: int, others: Tensor | None = None, *,
    hidden: int = 32, steps: int = 400, lr: float = 0.01, seed: int = 0,
) -> tuple[Gate, float]:
    """Fit a gate to text[begin:] (uint8), which the experts have not counted; returns it and its
    bits per byte there. The first PADDING bytes of the text are no history.

    ``others`` (len(text) - begin, n, V): the network's distributions before these bytes. Adam, its
    rate falling to 0, on batches drawn anew, one captured step on a card; deterministic.
    """
    device = experts.ngram.device
    native = None
    if device.type == "cpu":
        native = native_experts(experts, 0 if others is None else others.shape[1])
    if native is not None:
        picked, seen = native.read(text.numpy(), begin, others)
    else:
        picked, seen = read(experts, text.to(device), begin, others)
    return fitted(picked, seen, hidden=hidden, steps=steps, lr=lr, seed=seed)


def fitted(
    picked: Tensor, seen: Tensor, *, hidden: int = 32, steps: int = 400, lr: float = 0.01,
    seed: int = 0,
) -> tuple[Gate, float]:
    """``fit_gate`` from what each expert gives the bytes that came, (L, E), and what the gate reads
    there, (L, FEATURES * E), as ``read`` returns them.

    The fit reads what has mean 0 and variance 1, by which it ends in a third of the steps; mean and
    scale are part of the weights afterwards.
    """
    log_p, device = picked.log(), picked.device
    mean, scale = seen.mean(0), seen.std(0, correction=0).clamp(min=_LEAST_SCALE)
    seen = (seen - mean) / scale
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gate = in_float32(lambda: Gate(log_p.shape[1], hidden)).to(device)
    order = torch.randint(
        len(log_p), (steps, min(_BATCH, len(log_p))), generator=generator, device="cpu")
    rate = torch.tensor(lr, dtype=torch.float32, device=device)
    optimizer = MuonAdamW([{"params": [*gate.parameters()], "weight_decay": 0.0, "lr": rate,
                            "peak_lr": lr}], betas=(0.9, 0.999))
    step = CapturedStep(
        gate, lambda seen, log_p: -torch.logsumexp(gate(seen) + log_p, -1).mean(), optimizer,
        lambda rows: (seen[rows], log_p[rows]), order, _FIT)
    for number in range(steps):
        step(1 - number / steps)
    with torch.no_grad():
        nats = -torch.logsumexp(gate(seen) + log_p, -1).mean()
        gate.inner.weight.div_(scale)
        gate.inner.bias.sub_(gate.inner.weight @ mean)
    return gate.eval(), float(nats) / math.log(2)
