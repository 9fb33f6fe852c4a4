"""How a cost grows with length: exponents with intervals, and where two costs cross."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from analysis.runs.frames import not_measured
from mambabyte.errors import UserError


@dataclass(frozen=True)
class Exponent:
    """Slope of log(cost) over log(length) with a 95 % interval (Student's t), None without one."""

    exponent: float | None
    low: float | None
    high: float | None
    points: int
    first_length: int | None
    last_length: int | None

    @property
    def reading(self) -> str:
        """What the interval says of a cost's growth; "undecided" where it is wider than 1."""
        if self.low is None or self.high is None or self.high - self.low > 1:
            return "undecided"
        if self.low > 1:
            return "faster than linear"
        return "slower than linear" if self.high < 1 else "linear"


def fit_exponent(lengths: Sequence[float], costs: Sequence[float]) -> Exponent:
    """Least squares of log cost on log length; the 95 % interval needs three points or more.

    The residuals are taken as independent with one spread, which timings are only roughly; the
    interval also holds the curvature of an overhead that has not died out.
    """
    x, y = np.asarray(lengths, float), np.asarray(costs, float)
    if len(x) != len(y):
        raise UserError(f"{len(x)} lengths and {len(y)} costs do not pair up")
    if len(x) < 2:
        return Exponent(None, None, None, len(x), None, None)
    if (x <= 0).any() or (y <= 0).any():
        raise UserError("an exponent is fitted to positive lengths and costs")
    x_log, y_log = np.log(x), np.log(y)
    fit = stats.linregress(x_log, y_log)
    low = high = None
    if len(x) > 2:
        half = float(stats.t.ppf(0.975, len(x) - 2) * fit.stderr)
        low, high = float(fit.slope) - half, float(fit.slope) + half
    return Exponent(float(fit.slope), low, high, len(x), int(x.min()), int(x.max()))


def exponent_table(
    frame: pd.DataFrame, by: Sequence[str], cost: str = "ms"
) -> pd.DataFrame:
    """An exponent a group, fitted to its four longest lengths: shorter ones are mostly overhead."""
    rows = []
    for key, group in frame[frame[cost].notna()].groupby(list(by), sort=False):
        tail = group.sort_values("length").tail(4)
        fit = fit_exponent(tail["length"].tolist(), tail[cost].astype(float).tolist())
        rows.append({**dict(zip(by, key, strict=True)), **vars(fit), "reading": fit.reading})
    return not_measured(pd.DataFrame(rows))


def crossover(
    lengths: Sequence[float], first: Sequence[float], second: Sequence[float]
) -> float | None:
    """The length from which ``first`` stays the cheaper, linear in logs between measured points.

    None when ``first`` is not the cheaper at the longest length; the shortest length when it is
    the cheaper throughout.
    """
    ratio = np.log(np.asarray(first, float) / np.asarray(second, float))
    x = np.log(np.asarray(lengths, float))
    if not len(x) or ratio[-1] > 0:
        return None
    dearer = np.flatnonzero(ratio > 0)
    if not len(dearer):
        return float(np.exp(x[0]))
    i = dearer[-1]
    share = ratio[i] / (ratio[i] - ratio[i + 1])
    return float(np.exp(x[i] + share * (x[i + 1] - x[i])))
