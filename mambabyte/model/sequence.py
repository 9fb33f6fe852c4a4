"""Context parallelism: one sequence over several processes, each with a stretch of its length.

Every process has the whole model and is given whole sequences; it embeds, mixes and scores its own
stretch of them. Norms, projections and MLPs see a byte at a time and need nothing from elsewhere. A
mixer needs what came before its stretch, which is a state, and asks for it here:

- a convolution its last inputs, attention its keys and values: :meth:`Piece.before` fetches those
  positions, and no others, from the processes that have them;
- a linear recurrence ``h = decay h + ...`` the state that it would have come to: each process
  works out what its own stretch does to a state (the product of its decays, and its end from a
  zero state), all processes tell each other, and :meth:`Piece.arriving` puts those of the earlier
  stretches together. That is the parallel scan of Martin & Cundy 2018 (arXiv:1709.04057, section
  2.2) with a process for a chunk.

All of it is differentiable, and the backward pass makes the transposed exchange. Mixers that ask
outside of :func:`split` get what they gave.

What processes return are shares of one result: the mean of their losses is the loss of the whole
sequence, and the mean of their gradients is its gradient, which is what
:meth:`mambabyte.model.distributed.World.average` makes of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mambabyte.errors import UserError
from mambabyte.ops.arguments import document_ages, without_autocast

UNIT = 64  # long stretches are multiples of it, but for the last: kernels walk in chunks


@dataclass(frozen=True)
class SequenceGroup:
    """The processes that share each sequence, in the order of their stretches."""

    size: int
    rank: int  # of this process
    group: Any = None  # of torch.distributed; None: all processes there are

    def pieces(self, length: int, ages: Tensor | None = None) -> Piece:
        """Which positions of ``length`` each process has; UserError for fewer than processes.
        ``ages`` (B, length) as of :func:`mambabyte.ops.arguments.document_ages`."""
        if length < self.size:
            raise UserError(f"a sequence of {length} bytes cannot be split among {self.size} "
                            f"processes: give at least {self.size}, or fewer processes")
        unit = UNIT if length >= UNIT * UNIT * self.size else 1
        blocks = -(-length // unit)
        starts = [unit * (blocks * r // self.size) for r in range(self.size)]
        return Piece(self, (*starts, length), ages)


@dataclass(frozen=True)
class Piece:
    """The stretch of a sequence that this process has, beside those of the others."""

    shared: SequenceGroup
    bounds: tuple[int, ...]  # process r has the positions from bounds[r] up to bounds[r + 1]
    ages: Tensor | None = None  # of all positions, where there are documents

    @property
    def start(self) -> int:
        return self.bounds[self.shared.rank]

    @property
    def own(self) -> slice:
        return slice(self.start, self.bounds[self.shared.rank + 1])

    @property
    def weight(self) -> float:
        """What a mean over the own positions counts in the mean of all processes' means."""
        own = self.own.stop - self.own.start
        return own * self.shared.size / self.bounds[-1]

    def last_start(self, rows: int) -> Tensor:
        """At which of the ``rows`` positions before the own ones, or as many as there are, the last
        document begins, from 0: (B,), -1 where none does."""
        assert self.ages is not None
        found = self.ages[:, max(self.start - rows, 0) : self.start] == 0
        place = torch.arange(found.shape[1], device=found.device)
        return torch.cat([place.new_full((len(found), 1), -1), torch.where(found, place, -1)],
                         1).amax(1)

    def before(self, x: Tensor, rows: int, dim: int) -> Tensor:
        """The last ``rows`` positions before the own ones, or as many as there are, along ``dim``
        of the whole sequence whose own positions are ``x`` (any shape; its size along ``dim`` is
        that of ``own``). Gradients flow back to the processes that gave them."""
        sent, received = self._reached(rows)
        return self._exchanged(x, dim, sent, received)

    def given_back(self, gradient: Tensor, rows: int, dim: int) -> Tensor:
        """Of the gradient of :meth:`before`, in its shape, what belongs to the last own positions:
        as many as the furthest process was given."""
        sent, received = self._reached(rows)
        back = _taken_back(gradient.movedim(dim, 0), sent, received, self.shared.group)
        return back.movedim(0, dim)

    def _reached(self, rows: int) -> tuple[list[int], list[int]]:
        """How many positions each process is sent, and sends, of the ``rows`` before a stretch."""
        me, sizes = self.shared.rank, [b - a for a, b in pairwise(self.bounds)]

        def reach(giver: int, taker: int) -> int:
            """How many of the giver's last positions are among ``rows`` before the taker's."""
            gap = self.bounds[taker] - self.bounds[giver + 1]
            return min(max(rows - gap, 0), sizes[giver]) if giver < taker else 0

        others = range(self.shared.size)
        return [reach(me, r) for r in others], [reach(r, me) for r in others]

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """The whole sequence along ``dim``, of which every process gives its own positions ``x``;
        gradients flow back to them."""
        sizes = [b - a for a, b in pairwise(self.bounds)]
        return self._exchanged(x, dim, [x.shape[dim]] * self.shared.size, sizes)

    def _exchanged(self, x: Tensor, dim: int, sent: list[int], received: list[int]) -> Tensor:
        """The last ``sent[r]`` positions of x go to process r; what comes, first to last."""
        size = x.shape[dim]
        most = max(sent)
        end = x.narrow(dim, size - most, most)  # no gradient of x's whole size is sent
        found: Tensor = _Exchange.apply(end.movedim(dim, 0), sent, received, self.shared.group)
        return found.movedim(0, dim)

    def enter(self, decay: Tensor, end: Tensor) -> tuple[Tensor, list[Tensor]]:
        """:meth:`arriving` from zero and without gradients, shapes as there; and the decays of all
        processes, for :meth:`leave`."""
        decays, ends = (_all_gather(t, self.shared) for t in (decay, end))
        return _state_before(self.shared.rank, decays, ends, None, False), decays

    def leave(self, gradient: Tensor, decays: list[Tensor]) -> Tensor:
        """The gradient of the state behind the own stretch, from what each process has for that of
        the state before its own, of its own outputs alone."""
        arrived = _all_gather(gradient, self.shared)
        return _gradient_behind(self.shared.rank, decays, arrived, False)

    def arriving(
        self, decay: Tensor, end: Tensor, initial: Tensor | None, matrices: bool = False
    ) -> Tensor:
        """The state that enters the own stretch.

        ``end`` (B, ...) is the state that the own stretch comes to from a zero one; ``decay`` what
        it makes of a state that enters it: numbers that multiply (of a shape that broadcasts to
        end's), or with ``matrices`` (..., K, K) before (..., K, V). ``initial`` is the state before
        the whole sequence, the same in all processes.
        """
        found: Tensor = _Arriving.apply(self, matrices, decay, end, initial)
        return found

    def last(self, states: list[Any]) -> list[Any]:
        """The states of the process with the last stretch, which are those behind the sequence:
        named tuples of tensors and numbers, without gradients."""
        root = self.shared.size - 1
        source = root if self.shared.group is None else dist.get_global_rank(
            self.shared.group, root)
        shapes = [[(tuple(x.shape), x.dtype) if isinstance(x, Tensor) else x for x in state]
                  for state in states]
        given = [shapes]
        dist.broadcast_object_list(given, src=source, group=self.shared.group)
        found = []
        for state, kinds in zip(states, given[0], strict=True):
            device = next(x.device for x in state if isinstance(x, Tensor))
            parts = []
            for mine, kind in zip(state, kinds, strict=True):
                if not isinstance(mine, Tensor):
                    parts.append(kind)
                    continue
                part = (mine.detach().contiguous() if self.shared.rank == root
                        else torch.empty(kind[0], dtype=kind[1], device=device))
                dist.broadcast(part, src=source, group=self.shared.group)
                parts.append(part)
            found.append(type(state)(*parts))
        return found


_piece: Piece | None = None


def current() -> Piece | None:
    """The stretch that this process is at work on; None where it has whole sequences."""
    return _piece


@contextmanager
def split(
    shared: SequenceGroup | None, length: int, ages: Tensor | None = None
) -> Iterator[Piece | None]:
    """Let the mixers know that what they are given are stretches of sequences of ``length``; with
    ``shared`` None they are whole. ``ages`` as in :meth:`SequenceGroup.pieces`. Raises UserError
    for fewer positions than processes."""
    global _piece
    before, _piece = _piece, None if shared is None else shared.pieces(length, ages)
    try:
        yield _piece
    finally:
        _piece = before


def own(x: Tensor) -> Tensor:
    """Of x (B, L, ...) the own positions, where a sequence is split."""
    return x if _piece is None else x[:, _piece.own]


def own_ages(ages: Tensor | None) -> Tensor | None:
    """Of ages (B, L) those of a mixer's own positions: a document from an earlier stretch has begun
    before."""
    if _piece is None or ages is None:
        return ages
    here = own(ages)
    return document_ages(here == 0, here)


def unbroken(decay: Tensor, ages: Tensor | None) -> Tensor:
    """What a stretch makes of a state that enters it, ``decay`` (B, ...), if documents begin where
    ``ages`` (B, L) are 0: nothing is left of it where one does."""
    if ages is None:
        return decay
    kept = (ages != 0).all(1)
    return decay * kept.view(-1, *[1] * (decay.ndim - 1)).to(decay.dtype)


def tail_before(x: Tensor, taps: int, tail: Tensor | None) -> Tensor | None:
    """What a causal convolution of ``taps`` taps reads before x (B, L, D): its ``tail`` (B, taps -
    1, D), or of a stretch the inputs that the earlier ones end with, behind it."""
    if _piece is None or taps == 1:
        return tail
    found = _piece.before(x, taps - 1, 1)
    missing = taps - 1 - found.shape[1]
    if missing:
        found = F.pad(found, (0, 0, missing, 0)) if tail is None else torch.cat(
            [tail[:, -missing:].to(x.dtype), found], 1)
    if _piece.ages is None:
        return found
    distance = torch.arange(taps - 1, 0, -1, device=x.device)
    same = distance <= _piece.ages[:, _piece.start, None]  # of the document that goes on
    return torch.where(same[..., None], found, 0)


class _Exchange(torch.autograd.Function):
    """Ends of x (n, ...) to other processes: the last ``sent[r]`` rows to process r."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sent: list[int], received: list[int], group: Any
    ) -> Tensor:
        ctx.how = sent, received, group
        parts = [x[len(x) - n :] for n in sent]
        return _all_to_all(torch.cat(parts), sent, received, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _taken_back(gradient, *ctx.how), None, None, None


def _taken_back(gradient: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    """The gradient of the longest end that was sent, from what came of it."""
    back = _all_to_all(gradient, received, sent, group)
    total = back.new_zeros(max(sent), *back.shape[1:])
    for part in back.split(sent):
        total[len(total) - len(part) :] += part
    return total


def _all_to_all(x: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    found = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(found, x.contiguous(), received, sent, group=group)
    return found


def _all_gather(x: Tensor, shared: SequenceGroup) -> list[Tensor]:
    x = x.contiguous()
    found = [torch.empty_like(x) for _ in range(shared.size)]
    dist.all_gather(found, x, group=shared.group)
    return found


def _through(decay: Tensor, state: Tensor, matrices: bool) -> Tensor:
    return decay @ state if matrices else decay * state


def _state_before(
    rank: int, decays: list[Tensor], ends: list[Tensor], initial: Tensor | None, matrices: bool
) -> Tensor:
    """``h_rank`` of ``h_0 = initial`` and ``h_{r+1} = d_r h_r + e_r``."""
    state = torch.zeros_like(ends[0]) if initial is None else initial.to(ends[0].dtype, copy=True)
    for r in range(rank):
        state = _through(decays[r], state, matrices) + ends[r]
    return state.contiguous()


def _gradient_behind(
    rank: int, decays: list[Tensor], arrived: list[Tensor], matrices: bool
) -> Tensor:
    """``g_rank`` of ``g_last = 0`` and ``g_{r-1} = dh_r + d_r^T g_r``, the gradient of
    ``h_{r+1}``; ``arrived`` holds dh_r, that of h_r in stretch r alone."""
    g = torch.zeros_like(arrived[0])
    for r in range(len(arrived) - 1, rank, -1):
        g = arrived[r] + _through(decays[r].mT if matrices else decays[r], g, matrices)
    return g


class _Arriving(torch.autograd.Function):
    """The state that enters a stretch, from what all stretches do to a state.

    With d_r and e_r of process r: ``_state_before``. The gradient of e_r is that of h_{r+1}, g_r of
    ``_gradient_behind``, and that of d_r is ``g_r h_r^T``.
    """

    @staticmethod
    def forward(
        ctx: Any, piece: Piece, matrices: bool, decay: Tensor, end: Tensor, initial: Tensor | None
    ) -> Tensor:
        ctx.piece, ctx.matrices = piece, matrices
        ctx.begins = None if initial is None else initial.dtype
        decays, ends = (_all_gather(t, piece.shared) for t in (decay, end))
        with without_autocast(end.device):
            state = _state_before(piece.shared.rank, decays, ends, initial, matrices)
        ctx.save_for_backward(state, *decays)
        return state

    @staticmethod
    def backward(ctx: Any, dstate: Tensor) -> tuple[Tensor | None, ...]:
        state, *decays = ctx.saved_tensors
        rank = ctx.piece.shared.rank
        arrived = _all_gather(dstate, ctx.piece.shared)
        with without_autocast(dstate.device):
            g = _gradient_behind(rank, decays, arrived, ctx.matrices)
            ddecay = (g @ state.mT if ctx.matrices
                      else (g * state).sum_to_size(decays[rank].shape))
            dinitial = None
            if ctx.begins is not None:  # all were given the same: the first has all its gradient
                first = _gradient_behind(-1, decays, arrived, ctx.matrices)
                dinitial = (first if rank == 0 else torch.zeros_like(first)).to(ctx.begins)
        return None, None, ddecay, g, dinitial
