"""Tasks that ask one thing of a sequence mixer: recall, copying, induction, state, memory.

Tokens are small integers, not text; 0 is blank. Answers are never fed back, so that a model that
recalls nothing cannot strike out what has been asked. Every sample is drawn anew, so accuracy is
that on unseen ones. A task has sizes, and a sample of a small one is short: it is the same as of a
task that ends there, but for the vocabulary's length. ``chance`` of a task is the accuracy of a
guesser that knows which values a sample holds, and nothing of where each belongs.
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

SYMBOLS = 16  # of all tasks but recall, whose keys must be many
NOISE = 16  # symbols that mean nothing, in noisy recall


@dataclass(frozen=True)
class Task:
    """A generator of samples, and what they ask.

    ``draw(size, count, device)`` gives inputs (count, length) and answers (count, asked), int64,
    from torch's own generator of the device; the answers are expected at the positions
    ``asked(size)``. ``sizes`` are trained on, smallest first; ``beyond`` are longer ones that are
    only tested.
    """

    name: str
    unit: str  # of a size
    vocab_size: int
    sizes: tuple[int, ...]
    asked: Callable[[int], slice]
    draw: Callable[[int, int, torch.device], tuple[Tensor, Tensor]]
    chance: Callable[[int], float]
    beyond: tuple[int, ...] = ()

    def length(self, size: int) -> int:
        """Tokens of a sample."""
        return self.draw(size, 1, torch.device("cpu"))[0].shape[1]


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
    """Multi-query associative recall in the field's form (Arora et al. 2023, arXiv:2312.04927):
    key-value pairs, then every key once.

    ``k v k v ...  k . k . k .``: keys and values distinct, the queries in another random order,
    the answer expected at the key and not fed back. Keys and values are each of twice as many
    symbols as there are pairs. ``noisy`` has as many pairs again, at random places, of symbols that
    mean nothing. A guesser that knows the values shown is right once in ``pairs``.
    """
    first_value = max(2 * largest, SYMBOLS) + 1
    first_noise = 2 * first_value - 1

    def draw(size: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        symbols = max(2 * size, SYMBOLS)
        keys = _distinct(count, symbols, size, device) + 1
        values = _distinct(count, symbols, size, device) + first_value
        shown = torch.stack([keys, values], -1)
        if noisy:
            noise = torch.randint(first_noise, first_noise + NOISE, shown.shape, device=device)
            order = _distinct(count, 2 * size, 2 * size, device)
            shown = torch.cat([shown, noise], 1).gather(1, order[..., None].expand(-1, -1, 2))
        order = _distinct(count, size, size, device)
        asked = keys.gather(1, order)
        queries = torch.stack([asked, torch.zeros_like(asked)], -1)
        return torch.cat([shown.flatten(1), queries.flatten(1)], 1), values.gather(1, order)

    def asked(size: int) -> slice:
        first = 2 * size * (2 if noisy else 1)
        return slice(first, first + 2 * size, 2)

    return Task("noisy recall" if noisy else "recall", "pairs",
                first_noise + (NOISE if noisy else 0), _powers(largest), asked, draw,
                lambda size: 1 / size)


def selective_copy(largest: int) -> Task:
    """Symbols scattered among blanks, to be given back in order (Gu & Dao 2023, arXiv:2312.00752,
    section 4.1.1): 4 x size tokens, then as many marks as symbols, where the answers are expected.
    """
    mark = SYMBOLS + 1

    def draw(size: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        data = torch.randint(1, SYMBOLS + 1, (count, size), device=device)
        places = _distinct(count, 4 * size, size, device).sort(1).values
        text = torch.zeros(count, 4 * size, dtype=torch.int64, device=device)
        marks = torch.full((count, size), mark, device=device)
        return torch.cat([text.scatter(1, places, data), marks], 1), data

    return Task("selective copy", "symbols", SYMBOLS + 2, _powers(largest),
                lambda size: slice(4 * size, 5 * size), draw,
                lambda size: largest_count(size, SYMBOLS) / size)


def induction(largest: int) -> Task:
    """Random symbols; one mark somewhere, and once more at the end: what followed the first?

    A size is the number of symbols between the two at most, half of it at least.
    """
    mark = SYMBOLS + 1

    def draw(size: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        text = torch.randint(1, SYMBOLS + 1, (count, size + 2), device=device)
        between = torch.randint(-(-size // 2), size + 1, (count, 1), device=device)
        first = size - between
        text = text.scatter(1, first, mark)
        answer = text.gather(1, first + 1)
        text[:, -1] = mark
        return text, answer

    return Task("induction", "symbols", SYMBOLS + 2, _powers(largest),
                lambda size: slice(size + 1, size + 2), draw, lambda size: 1 / SYMBOLS)


def parity(largest: int) -> Task:
    """The parity of the bits so far, at every position of the second half of a sample."""

    def draw(size: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        bits = torch.randint(0, 2, (count, size), device=device)
        return bits + 1, (bits.cumsum(1) % 2 + 1)[:, size // 2 :]

    return Task("parity", "bits", 3, _powers(largest), lambda size: slice(size // 2, size), draw,
                lambda size: 0.5, beyond=(4 * largest,))


def permutations(largest: int) -> Task:
    """The product of the permutations of three things so far, as ``parity`` asks it."""
    perms = tuple(itertools.permutations(range(3)))

    def draw(size: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        drawn = torch.randint(0, 6, (count, size), device=device)
        product = _constant(perms, device)[drawn]  # (B, L, 3)
        step = 1
        while step < size:  # products of 1, 2, 4, ... neighbours up to each position
            later = product[:, step:].gather(2, product[:, :-step])
            product = torch.cat([product[:, :step], later], 1)
            step *= 2
        # Images of 0 and 1 say which of the six it is, in the order of ``perms``.
        first, second = product[:, size // 2 :, 0], product[:, size // 2 :, 1]
        return drawn + 1, 2 * first + (second > 3 - first - second) + 1

    return Task("permutations", "permutations", 7, _powers(largest),
                lambda size: slice(size // 2, size), draw, lambda size: 1 / 6,
                beyond=(4 * largest,))


def memorise(largest: int) -> Task:
    """Facts that are the same in all samples, each a value for two symbols: what weights hold.

    ``a b a b ...`` of random facts, the value expected at every b. A size is the number of facts.
    """
    side = max(2, round(largest**0.5))
    facts = side * side
    values = np.random.default_rng(0).integers(1, SYMBOLS + 1, facts)
    table = tuple(values.tolist())
    shown = 32  # facts a sample

    def draw(size: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        fact = torch.randint(0, size, (count, shown), device=device)
        pair = torch.stack([fact // side + 1, fact % side + side + 1], -1)
        return pair.flatten(1), _constant(table, device)[fact]

    most = float(np.bincount(values).max()) / facts
    return Task("memorisation", "facts", max(2 * side, SYMBOLS) + 1, (facts,),
                lambda size: slice(1, 2 * shown, 2), draw, lambda size: most)


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
