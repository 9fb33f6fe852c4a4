"""The tasks: a program that knows the rule answers all, a guesser by its values its share."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

from analysis.studies.arena import TASKS
from analysis.studies.arena.trainings.tasks import SYMBOLS, largest_count, parse_task
from mambabyte.errors import UserError

CPU = torch.device("cpu")
SMALL = {"recall": "recall 8", "noisy recall": "noisy recall 8", "parity": "parity 8",
         "selective copy": "selective copy 8", "induction": "induction 16",
         "permutations": "permutations 8", "memorisation": "memorisation 64"}


def answers(task, size, count=32):
    """Of each sample: its inputs, and its answers by position."""
    torch.manual_seed(0)
    inputs, wanted = task.draw(size, count, CPU)
    assert max(int(inputs.max()), int(wanted.max())) < task.vocab_size
    places = torch.arange(inputs.shape[1])[task.asked(size)].tolist()
    for row, some in zip(inputs.tolist(), wanted.tolist(), strict=True):
        yield row, dict(zip(places, some, strict=True))


def solve(name, row, at, facts):
    """What a program that knows the rule answers at a position."""
    if name.endswith("recall"):
        return row[row.index(row[at]) + 1]
    if name == "induction":
        return row[row.index(row[at]) + 1]
    if name == "parity":
        return sum(bit - 1 for bit in row[: at + 1]) % 2 + 1
    if name == "permutations":
        perms = list(itertools.permutations(range(3)))
        product = (0, 1, 2)
        for drawn in row[: at + 1]:
            product = tuple(perms[drawn - 1][i] for i in product)
        return perms.index(product) + 1
    if name == "selective copy":
        symbols = [x for x in row if 0 < x <= SYMBOLS]
        return symbols[at - row.index(SYMBOLS + 1)]
    return facts.setdefault((row[at - 1], row[at]), None)


@pytest.mark.parametrize("name", [n for n in TASKS if n != "memorisation"])
def test_the_rule_answers_every_question(name):
    task = parse_task(SMALL[name])
    for size in (*task.sizes, *task.beyond):
        for row, asked in answers(task, size, 8):
            assert asked
            assert all(solve(name, row, at, {}) == y for at, y in asked.items())


def test_facts_are_the_same_in_all_samples():
    task = parse_task("memorisation 64")
    seen: dict[tuple[int, int], set[int]] = {}
    for row, asked in answers(task, 64, 64):
        for at, y in asked.items():
            seen.setdefault((row[at - 1], row[at]), set()).add(y)
    assert len(seen) == 64
    assert {len(values) for values in seen.values()} == {1}


@pytest.mark.parametrize("name", ["recall", "noisy recall", "selective copy"])
def test_a_guesser_that_knows_the_values_is_right_by_chance(name):
    """It answers with the most frequent of the values that are asked for in the sample, whichever
    comes first; no guess without recall is better, as answers are not fed back."""
    task = parse_task(SMALL[name])
    for size in task.sizes:
        right = asked = 0
        for _, wanted in answers(task, size, 2000):
            guess = Counter(wanted.values()).most_common(1)[0][0]
            right += sum(y == guess for y in wanted.values())
            asked += len(wanted)
        assert right / asked == pytest.approx(task.chance(size), abs=0.01)


def test_answers_are_never_among_the_inputs_after_the_question():
    for row, asked in answers(parse_task("recall 8"), 8):
        assert not set(row[min(asked):]) & set(asked.values())


@pytest.mark.parametrize(("draws", "symbols"), [(1, 4), (2, 4), (5, 3)])
def test_the_largest_count_is_that_of_all_draws(draws, symbols):
    counts = [max(Counter(d).values()) for d in itertools.product(range(symbols), repeat=draws)]
    assert largest_count(draws, symbols) == pytest.approx(sum(counts) / len(counts))


@pytest.mark.parametrize("name", [n for n in TASKS if n != "memorisation"])
def test_a_small_size_is_short(name):
    """Of any task of that kind: what is beside it is only longer."""
    lengths = [parse_task(f"{name} 32").length(size) for size in (4, 8, 16, 32)]
    assert lengths == sorted(set(lengths))
    assert lengths[0] == parse_task(f"{name} 4").length(4)


def test_a_size_of_one_is_a_sample():
    for name in TASKS:
        task = parse_task(f"{name} 1")
        inputs, wanted = task.draw(task.sizes[0], 2, CPU)
        assert wanted.shape[1] == len(range(inputs.shape[1])[task.asked(task.sizes[0])]) > 0


@pytest.mark.parametrize("text", ["recall", "recal 4", "recall 0", "recall 99999", "recall -1"])
def test_an_unknown_task_is_refused(text):
    with pytest.raises(UserError, match="write one of recall"):
        parse_task(text)
