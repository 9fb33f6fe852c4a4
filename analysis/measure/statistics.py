"""Paired differences over seeds, and the error of a score over a text.

Seeds: the same seed, data order and budget, two systems. Fewer than ten differences get Student's
t interval: the bootstrap draws from the sample itself, and of five normal differences its BCa
interval covers the mean 81 to 85 times in a hundred, not 95 (a test simulates both). From ten on it
is BCa, which needs no normal distribution.

Text: a held-out text is a sample too, and neighbouring bytes are alike. ``text_error`` resamples
blocks of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
from scipy import stats

from mambabyte.errors import UserError

FEWEST_SEEDS = 3  # below this no interval is computed: the points are shown instead
FEWEST_BOOTSTRAP = 10  # below this the interval is Student's t
BLOCK_BYTES = 4096  # of a text: longer than what a model's losses remember


@dataclass(frozen=True)
class Paired:
    """Mean of ``a - b`` over pairs with a 95 % interval, nan where there is none."""

    mean: float
    low: float
    high: float
    pairs: int
    method: str  # "Student's t", "BCa", "percentile (...)" or "points only (...)"
    points: str  # every difference, in order, for the reader of a small table


def paired_difference(
    a: Sequence[float], b: Sequence[float], *, level: float = 0.95, resamples: int = 4999
) -> Paired:
    """Mean difference of two measurements taken on the same seeds, in the same order.

    The interval is Student's for fewer than ten pairs, else the bias-corrected and accelerated
    bootstrap over pairs (Efron 1987); where that is degenerate (all differences equal) it is the
    percentile interval, and says so. Fewer than three pairs give no interval. Raises UserError
    when the two do not pair up.
    """
    if len(a) != len(b) or not len(a):
        raise UserError(f"{len(a)} and {len(b)} measurements do not pair up: one per seed each")
    differences = np.asarray(a, float) - np.asarray(b, float)
    points = ", ".join(f"{d:+.4f}" for d in differences)
    mean, n = float(differences.mean()), len(differences)
    if not np.isfinite(differences).all():
        return Paired(float("nan"), float("nan"), float("nan"), n, "not measured", points)
    if n < FEWEST_SEEDS:
        seeds = "a single seed" if n == 1 else f"{n} seeds"
        why = f"points only ({seeds}, fewer than {FEWEST_SEEDS})"
        return Paired(mean, float("nan"), float("nan"), n, why, points)
    if n < FEWEST_BOOTSTRAP:
        return Paired(mean, *student_interval(differences, level), n, "Student's t", points)
    method = "BCa"
    low, high = bootstrap_interval(differences, level, resamples)
    if not (np.isfinite(low) and np.isfinite(high)):
        method = "percentile (BCa is degenerate here)"
        low, high = bootstrap_interval(differences, level, resamples, "percentile")
    return Paired(mean, low, high, n, method, points)


def student_interval(differences: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Student's t interval of the mean of independent, normal differences."""
    n = len(differences)
    half = stats.t.ppf((1 + level) / 2, n - 1) * differences.std(ddof=1) / np.sqrt(n)
    return float(differences.mean() - half), float(differences.mean() + half)


def bootstrap_interval(
    differences: np.ndarray, level: float = 0.95, resamples: int = 4999, method: str = "BCa"
) -> tuple[float, float]:
    """Bootstrap interval of the mean; nan at both ends where BCa is degenerate."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy warns where BCa is degenerate: the caller looks
        low, high = stats.bootstrap(
            (differences,), np.mean, confidence_level=level, method=method,
            n_resamples=resamples, rng=np.random.default_rng(0)).confidence_interval
    return float(low), float(high)


def text_error(losses: np.ndarray, block: int = BLOCK_BYTES) -> float:
    """Standard error of the mean of a text's per-byte losses (bytes,), by blocks.

    Blocks of ``block`` bytes are drawn with replacement (Kuensch 1989, without overlap), so that
    what neighbours share is not counted as evidence. The same bytes scored by two systems pair up:
    give their difference. nan where there are fewer than two whole blocks.
    """
    whole = len(losses) // block
    if whole < 2:
        return float("nan")
    means = np.asarray(losses[: whole * block], float).reshape(whole, block).mean(1)
    drawn = np.random.default_rng(0).integers(whole, size=(1999, whole))
    return float(means[drawn].mean(1).std(ddof=1))


def paired_table(
    frame: pd.DataFrame, value: str, system: str, reference: str, by: Sequence[str] = ()
) -> pd.DataFrame:
    """``paired_difference`` of every system to ``reference``, one row a system and group of ``by``.

    ``frame`` has a row for every (group, system, seed); a system that lacks a seed of the
    reference is compared on the seeds that both have.
    """
    rows = []
    groups = frame.groupby(list(by), sort=False) if by else [((), frame)]
    for key, group in groups:
        wide = group.pivot(index="seed", columns=system, values=value)
        if reference not in wide:
            raise UserError(f"the reference {reference!r} is not among {list(wide.columns)}")
        for name in group[system].unique():
            if name == reference:
                continue
            both = wide[[name, reference]].dropna()
            if both.empty:
                continue
            paired = paired_difference(both[name].tolist(), both[reference].tolist())
            rows.append({**dict(zip(by, key, strict=True)), system: name,
                         "reference": reference, **asdict(paired)})
    return pd.DataFrame(rows)
