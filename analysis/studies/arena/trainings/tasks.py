"""Tasks that ask one thing of a sequence mixer: recall, copying, induction, state, memory.

Tokens are small integers, not text; 0 is blank. Answers are never fed back, so that a model that
recalls nothing cannot strike out what has been asked. Every sample is drawn anew, so accuracy is
that on unseen ones. A batch mixes sizes, one a sample, and each sample weighs the same in the loss:
the small ones teach what the large ones need (Arora et al. 2023, arXiv:2312.04927, train their
models of multi-query associative recall on a mixture, too). ``chance`` of a task is the accuracy of
a guesser that knows which values a sample holds, and nothing of where each belongs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from scipy.stats import poisson
from torch import Tensor

from analysis.studies.arena import task_size

IGNORE = -100  # an answer that is not asked for
SYMBOLS = 16  # of all tasks but recall, whose keys must be many
NOISE = 16  # symbols that mean nothing, in noisy recall


@dataclass(frozen=True)
class Task:
    """A generator of batches, and what they ask.

    ``draw(sizes)``, sizes (B,) int64 on any device, gives inputs (B, length) and targets
    (B, answers), int64; the answers are read at the positions ``asked``, IGNORE where there is
    none. ``sizes`` are trained on, ``beyond`` are longer ones that are only tested.
    """

    name: str
    about: str
    unit: str  # of a size
    vocab_size: int
    sizes: tuple[int, ...]
    asked: slice
    draw: Callable[[Tensor], tuple[Tensor, Tensor]]
    chance: Callable[[int], float]
    beyond: tuple[int, ...] = ()

    def batch(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Samples of mixed sizes, drawn from torch's own generator of the device."""
        sizes = _constant(self.sizes, device)
        return self.draw(sizes[torch.randint(len(self.sizes), (count,), device=device)])

    def test(self, size: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        return self.draw(torch.full((count,), size, device=device))


@cache
def _constant(values: Any, device: torch.device) -> Tensor:
    """Whole numbers on a device, copied there once: a captured step must not copy from the host."""
    return torch.tensor(values, device=device)


def largest_count(draws: int, symbols: int) -> float:
    """Expected count of the most frequent of ``symbols`` among ``draws`` with replacement.

    E[M] is the sum of P(M > m) over m >= 0. Counts of uniform draws are independent Poisson counts,
    given that they add up to ``draws``; so P(M <= m) is a coefficient of a power of the Poisson
    polynomial that ends at m, over that of the whole.
    """
    whole, expected = poisson.pmf(draws, draws), 0.0
    for m in range(draws):
        power, square, left = np.ones(1), poisson.pmf(np.arange(m + 1), draws / symbols), symbols
        while left:
            if left % 2:
                power = np.convolve(power, square)[: draws + 1]
            square, left = np.convolve(square, square)[: draws + 1], left // 2
        expected += 1 - (power[draws] / whole if len(power) > draws else 0.0)
    return float(expected)


def _distinct(rows: int, values: int, count: int, device: torch.device) -> Tensor:
    """``count`` of ``range(values)`` without replacement in random order, (rows, count)."""
    return torch.rand(rows, values, device=device).argsort(1)[:, :count]


def _powers(largest: int, first: int = 4) -> tuple[int, ...]:
    """first, 2 first, ... up to ``largest``, which is the last."""
    sizes = [first * 2**i for i in range(32) if first * 2**i < largest]
    return (*sizes, largest)


def recall(largest: int, noisy: bool = False) -> Task:
    """Multi-query associative recall in the field's form: key-value pairs, then every key once.

    ``k v k v ...  k . k . k .``: keys and values distinct, the queries in another random order,
    the answer expected at the key and not fed back. A smaller sample has its pairs at random places
    among blanks, and blanks between its queries. ``noisy`` adds as many pairs again of symbols that
    mean nothing, and puts them in place of the blanks. A guesser that knows the values shown is
    right once in ``pairs``.
    """
    symbols, slots = max(2 * largest - 1, 16), largest * (2 if noisy else 1)
    noise = 2 * symbols + 1

    def draw(sizes: Tensor) -> tuple[Tensor, Tensor]:
        count, device = len(sizes), sizes.device
        keys = _distinct(count, symbols, largest, device) + 1
        values = _distinct(count, symbols, largest, device) + symbols + 1
        real = torch.arange(largest, device=device) < sizes[:, None]
        shown = torch.zeros(count, slots, 2, dtype=torch.int64, device=device)
        if noisy:
            shown = torch.randint(noise, noise + NOISE, shown.shape, device=device)
        at = _distinct(count, slots, largest, device)[..., None].expand(-1, -1, 2)
        pairs = torch.stack([keys, values], -1)
        shown = shown.scatter(1, at, torch.where(real[..., None], pairs, shown.gather(1, at)))
        order = _distinct(count, largest, largest, device)
        asked = torch.where(real, keys, 0).gather(1, order)
        answers = torch.where(real, values, IGNORE).gather(1, order)
        queries = torch.stack([asked, torch.zeros_like(asked)], -1)
        return torch.cat([shown.flatten(1), queries.flatten(1)], 1), answers

    return Task("noisy recall" if noisy else "recall", "each of so many pairs is asked for once",
                "pairs", noise + (NOISE if noisy else 0), _powers(largest),
                slice(2 * slots, 2 * (slots + largest), 2), draw, lambda size: 1 / size)


def selective_copy(largest: int) -> Task:
    """Symbols scattered among blanks, to be given back in order (Gu & Dao 2023, section 4.1.1).

    The answers are expected at as many marks behind 4 x largest tokens.
    """
    length, mark = 4 * largest, SYMBOLS + 1

    def draw(sizes: Tensor) -> tuple[Tensor, Tensor]:
        count, device = len(sizes), sizes.device
        data = torch.randint(1, SYMBOLS + 1, (count, largest), device=device)
        real = torch.arange(largest, device=device) < sizes[:, None]
        # Of all places in order, as many as there are symbols; the others go behind the end.
        places = _distinct(count, length, largest, device)
        places = torch.where(real, places, length).sort(1).values
        text = torch.zeros(count, length + 1, dtype=torch.int64, device=device)
        text = text.scatter(1, places, data)[:, :length]
        marks = torch.full((count, largest), mark, device=device)
        return torch.cat([text, marks], 1), torch.where(real, data, IGNORE)

    return Task("selective copy", "so many symbols among blanks, in order", "symbols",
                SYMBOLS + 2, _powers(largest), slice(length, length + largest), draw,
                lambda size: largest_count(size, SYMBOLS) / size)


def induction(largest: int) -> Task:
    """Random symbols; one mark somewhere, and once more at the end: what followed the first?

    A size is the number of symbols between the two at most, half of it at least.
    """
    mark = SYMBOLS + 1

    def draw(sizes: Tensor) -> tuple[Tensor, Tensor]:
        count, device = len(sizes), sizes.device
        text = torch.randint(1, SYMBOLS + 1, (count, largest + 2), device=device)
        back = (sizes * (1 + torch.rand(count, device=device)) / 2).long().clamp(min=1)
        first = (largest + 1 - 1 - back)[:, None]
        text = text.scatter(1, first, mark)
        answer = text.gather(1, first + 1)
        text[:, -1] = mark
        return text, answer

    return Task("induction", "what followed the mark so many symbols ago", "symbols",
                SYMBOLS + 2, _powers(largest), slice(largest + 1, largest + 2), draw,
                lambda size: 1 / SYMBOLS)


def parity(largest: int) -> Task:
    """The parity of the bits so far, at every position of the second half of a sample."""

    def draw(sizes: Tensor) -> tuple[Tensor, Tensor]:
        bits = torch.randint(0, 2, (len(sizes), 4 * largest), device=sizes.device)
        return bits + 1, _second_half(bits.cumsum(1) % 2 + 1, sizes)

    return Task("parity", "parity of so many bits", "bits", 3, _powers(largest),
                slice(0, 4 * largest), draw, lambda size: 0.5, beyond=(4 * largest,))


def permutations(largest: int) -> Task:
    """The product of the permutations of three things so far, as ``parity`` asks it."""
    perms = tuple(itertools.permutations(range(3)))

    def draw(sizes: Tensor) -> tuple[Tensor, Tensor]:
        device = sizes.device
        drawn = torch.randint(0, 6, (len(sizes), 4 * largest), device=device)
        product = _constant(perms, device)[drawn]  # (B, L, 3)
        step = 1
        while step < product.shape[1]:  # products of 1, 2, 4, ... neighbours up to each position
            later = product[:, step:].gather(2, product[:, :-step])
            product = torch.cat([product[:, :step], later], 1)
            step *= 2
        # Images of 0 and 1 say which of the six it is, in the order of ``perms``.
        first, second = product[..., 0], product[..., 1]
        return drawn + 1, _second_half(2 * first + (second > 3 - first - second) + 1, sizes)

    return Task("permutations", "product of so many permutations of three", "permutations", 7,
                _powers(largest), slice(0, 4 * largest), draw, lambda size: 1 / 6,
                beyond=(4 * largest,))


def _second_half(answers: Tensor, sizes: Tensor) -> Tensor:
    """The answers from half of a sample's size on to its size."""
    at = torch.arange(answers.shape[1], device=sizes.device)
    inside = (at >= sizes[:, None] // 2) & (at < sizes[:, None])
    return torch.where(inside, answers, IGNORE)


def memorise(largest: int) -> Task:
    """Facts that are the same in all samples, each a value for two symbols: what weights hold.

    ``a b a b ...`` of random facts, the value expected at every b. A size is the number of facts.
    """
    side = max(2, round(largest**0.5))
    facts = side * side
    values = np.random.default_rng(0).integers(1, SYMBOLS + 1, facts)
    table = tuple(values.tolist())
    shown = 32  # facts a sample

    def draw(sizes: Tensor) -> tuple[Tensor, Tensor]:
        fact = torch.randint(0, facts, (len(sizes), shown), device=sizes.device)
        pair = torch.stack([fact // side + 1, fact % side + side + 1], -1)
        return pair.flatten(1), _constant(table, sizes.device)[fact]

    most = float(np.bincount(values).max()) / facts
    return Task("memorisation", "so many facts, the same in all samples", "facts",
                max(2 * side, SYMBOLS) + 1, (facts,), slice(1, 2 * shown, 2), draw,
                lambda size: most)


_MAKE: dict[str, Callable[[int], Task]] = {
    "recall": recall, "noisy recall": lambda size: recall(size, noisy=True),
    "selective copy": selective_copy, "induction": induction, "parity": parity,
    "permutations": permutations, "memorisation": memorise,
}


@cache
def parse_task(text: str) -> Task:
    """The task written as its name and largest size, such as ``recall 256``."""
    name, size = task_size(text)
    return _MAKE[name](size)
