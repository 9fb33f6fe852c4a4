"""Paired differences over seeds: the same seed, data order and budget, two systems."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
from scipy import stats

from mambabyte.errors import UserError

FEWEST_SEEDS = 5  # below this no interval is computed: the points are shown instead


@dataclass(frozen=True)
class Paired:
    """Mean of ``a - b`` over pairs with a 95 % bootstrap interval, nan where there is none."""

    mean: float
    low: float
    high: float
    pairs: int
    method: str  # "BCa", "percentile (...)" or "points only (...)"
    points: str  # every difference, in order, for the reader of a small table


def paired_difference(
    a: Sequence[float], b: Sequence[float], *, level: float = 0.95, resamples: int = 4999
) -> Paired:
    """Mean difference of two measurements taken on the same seeds, in the same order.

    The interval is the bias-corrected and accelerated bootstrap over pairs (Efron 1987). Where
    that is degenerate (all differences equal) it is the percentile interval, and says so. Fewer
    than five pairs give no interval. Raises UserError when the two do not pair up.
    """
    if len(a) != len(b) or not len(a):
        raise UserError(f"{len(a)} and {len(b)} measurements do not pair up: one per seed each")
    differences = np.asarray(a, float) - np.asarray(b, float)
    points = ", ".join(f"{d:+.4f}" for d in differences)
    mean, n = float(differences.mean()), len(differences)
    if not np.isfinite(differences).all():
        return Paired(float("nan"), float("nan"), float("nan"), n, "not measured", points)
    if n < FEWEST_SEEDS:
        why = f"points only ({n} seeds, fewer than {FEWEST_SEEDS})"
        return Paired(mean, float("nan"), float("nan"), n, why, points)
    method = "BCa"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy warns where BCa is degenerate; handled below
        result = stats.bootstrap((differences,), np.mean, confidence_level=level, method="BCa",
                                 n_resamples=resamples, rng=np.random.default_rng(0))
        low, high = result.confidence_interval
        if not (np.isfinite(low) and np.isfinite(high)):
            method = "percentile (BCa is degenerate here)"
            result = stats.bootstrap((differences,), np.mean, confidence_level=level,
                                     method="percentile", n_resamples=resamples,
                                     rng=np.random.default_rng(0))
            low, high = result.confidence_interval
    return Paired(mean, float(low), float(high), n, method, points)


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
