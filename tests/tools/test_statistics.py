"""Intervals over seeds cover as often as they say; a text's error counts what neighbours share."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from analysis.measure.statistics import (
    bootstrap_interval,
    paired_difference,
    student_interval,
    text_error,
)


@pytest.mark.parametrize("seeds", [
    pytest.param(3, marks=pytest.mark.long), 5, pytest.param(9, marks=pytest.mark.long)])
def test_students_interval_covers_as_often_as_it_says(seeds: int) -> None:
    samples = np.random.default_rng(0).normal(1.0, 0.3, (4000, seeds))
    ends = [student_interval(sample) for sample in samples]
    covered = np.mean([low <= 1.0 <= high for low, high in ends])
    assert covered == pytest.approx(0.95, abs=0.012)  # three standard errors of 4,000


def test_the_bootstrap_covers_too_rarely_at_five_seeds() -> None:
    """The reason for Student's t there: 81 to 85 % where 95 % is said."""
    samples = np.random.default_rng(1).normal(1.0, 0.3, (1000, 5))
    low, high = stats.bootstrap(
        (samples,), np.mean, axis=-1, method="BCa", n_resamples=999, vectorized=True,
        rng=np.random.default_rng(0)).confidence_interval
    covered = np.mean((low <= 1.0) & (high >= 1.0))
    assert 0.78 < covered < 0.88
    single = bootstrap_interval(samples[0], resamples=999)
    assert single == pytest.approx((low[0], high[0]), abs=0.1)


def test_the_interval_follows_the_number_of_pairs() -> None:
    rng = np.random.default_rng(2)
    methods = {n: paired_difference(rng.normal(0, 1, n).tolist(), [0.0] * n).method
               for n in (1, 2, 3, 9, 10)}
    assert methods[1].startswith("points only (a single seed")
    assert methods[2].startswith("points only (2 seeds")
    assert (methods[3], methods[9], methods[10]) == ("Student's t", "Student's t", "BCa")


def test_students_interval_by_hand() -> None:
    paired = paired_difference([3.0, 5.0, 4.0], [1.0, 2.0, 3.0])
    half = 4.302653 * 1.0 / math.sqrt(3)  # t of two degrees; differences 2, 3, 1 spread by 1
    assert (paired.low, paired.high) == pytest.approx((2 - half, 2 + half))


def test_a_texts_error_counts_blocks_not_bytes() -> None:
    rng = np.random.default_rng(3)
    independent = rng.normal(2.0, 1.0, 64 * 256)
    assert text_error(independent, 256) == pytest.approx(1 / math.sqrt(64 * 256), rel=0.3)
    passages = np.repeat(rng.normal(2.0, 1.0, 64), 256)  # a passage is as hard throughout
    assert text_error(passages, 256) == pytest.approx(1 / math.sqrt(64), rel=0.3)
    assert math.isnan(text_error(independent[:300], 256))
