"""A law of parameters and text: found again, predicted within its interval, crossed where it is."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.studies.arena import Parameters
from analysis.studies.arena.values import _laws
from analysis.theory import scaling
from analysis.theory.scaling import NAMES, Law, crossing, fit_law
from mambabyte.errors import UserError

N = np.repeat([3e5, 1e6, 1e7, 3e7], 3)
D = np.tile([4e6, 16e6, 64e6], 4)


def bits(n, d, a=0.35, alpha=0.25):
    return 1.0 + a * (n / 1e6) ** -alpha + 1.5 * (d / 1e6) ** -0.3


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(scaling, "DRAWS", 12)


def test_a_law_is_found_again_and_predicts_what_was_left_out():
    noise = 1 + 0.002 * np.random.default_rng(0).standard_normal(12)
    found = fit_law(N[:10], D[:10], (bits(N, D) * noise)[:10])
    assert dict(zip(NAMES, found.theta, strict=True))["alpha"] == pytest.approx(0.25, abs=0.08)
    left = np.log((bits(N, D) * noise)[:10] / found.bits(N[:10], D[:10]))  # by five of ten numbers
    assert found.residuals == pytest.approx((left - left.mean()) * np.sqrt(10 / 5))
    for n, d in zip(N[10:], D[10:], strict=True):
        low, high = found.predict(n, d)
        assert low < bits(n, d) < high
        assert high - low < 0.1


def test_few_residuals_stretch_an_interval():
    """As Student's quantile of what the five numbers leave is above the normal one."""
    draws = 0.2 + 0.01 * np.random.default_rng(0).standard_normal((1000, 5))
    theta = np.full(5, 0.2)
    width = {n: np.diff(Law(theta, draws, np.zeros(n)).interval("alpha"))[0] for n in (8, 10**6)}
    assert width[8] / width[10**6] == pytest.approx(stats.t.ppf(0.975, 3) / stats.norm.ppf(0.975),
                                                    rel=1e-4)


def test_laws_cross_where_they_do_and_nowhere_else():
    first = fit_law(N, D, bits(N, D))
    steeper = fit_law(N, D, bits(N, D, alpha=0.4))  # both pass one million with the same bits
    found = crossing(first, steeper, N.min(), N.max(), 16e6)
    assert found.at == pytest.approx(1e6, rel=0.2)
    assert found.below == 1
    worse = fit_law(N, D, bits(N, D) + 0.1)
    never = crossing(first, worse, N.min(), N.max(), 16e6)
    assert (never.at, never.below, never.share) == (None, 0, 1.0)


def test_a_single_law_is_told_though_it_crosses_none():
    points = pd.DataFrame({
        "system": "A", "size": "1M", "trained_bytes": [4e6, 16e6], "valid_bits": [2.0, 1.9],
        "by_the_law": [2.0, 1.8], "held_back": [False, True], "inside": True})
    law = pd.DataFrame({"system": "A", "number": NAMES, "value": 1.0, "low": 0.5, "high": 2.0})
    told = _laws(SimpleNamespace(points=points, law=law, crossings=pd.DataFrame()), Parameters())
    assert told["law_crossed"].value == "none"
    assert told["law_crossings"].value == told["law_pairs"].value == 0
    assert told["law_worst_error"].value == pytest.approx(0.1)


def test_too_few_points_are_refused():
    with pytest.raises(UserError, match="at least 6"):
        fit_law(N[:5], D[:5], bits(N[:5], D[:5]))
