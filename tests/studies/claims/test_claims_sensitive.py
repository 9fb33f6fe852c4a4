"""A verdict on a number depends on the number: three times it, or a third, is judged otherwise."""

from __future__ import annotations

from dataclasses import replace

import pytest

from analysis.studies.claims import compute as claims
from analysis.studies.claims.evidence import Evidence, gather
from analysis.studies.claims.lab import Lab, Settings
from analysis.studies.claims.ledger import FAILS, INCONSISTENT, Claim
from tests.helpers.claims_lab import BY_ID, LEDGER, TYPICAL

NUMERIC = [claim for claim in LEDGER.claims if claim.numbers and claim.counted]
# Rejected rows whose number is wrong by more than three times: with these numbers they would not
# be rejected, or not so. They are what was measured, or agree with the document's other statements.
RIGHT = {
    "footprint-64": (85,), "cut-16": (8,), "energy-10-25": (200, 400), "energy-10-20": (200, 400),
    "energy-ranges": (10, 20, 10, 20), "overhead-2-4": (20, 200), "slower-2-4": (20, 200),
    "third-of-time": (7.5, 294.9, 80, 220), "wall-clock": (500, 3000), "trained-64m": (8.8e6,),
    "five-times": (1.0,), "five-times-kernel": (0.3,), "our-config-64": (0.4,),
    "sixteen-gb-batch": (96,), "clock-of-180": (10_000, 37),
    "six-three": (7, 2), "three-times": (50, 50), "five-effective": (200, 200, 37),
}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    return gather(tmp_path_factory.mktemp("no-runs"))


def judged(claim: Claim, records: Evidence) -> str:
    return claims.judge(claim, Lab(Settings(), records, LEDGER.facts, TYPICAL)).verdict


def scaled(claim: Claim, factor: float) -> list[Claim]:
    """All of the row's numbers times the factor, and the claimed one alone."""
    first, *rest = claim.numbers
    return [replace(claim, numbers=tuple(factor * n for n in claim.numbers)),
            replace(claim, numbers=(factor * first, *rest))]


@pytest.mark.parametrize("claim", NUMERIC, ids=lambda claim: claim.id)
def test_the_claimed_number_decides(claim: Claim, records: Evidence) -> None:
    before = judged(claim, records)
    after = {judged(other, records) for factor in (3, 1 / 3) for other in scaled(claim, factor)}
    changes = after != {before}
    if claim.id in RIGHT:
        assert not changes, "it is sensitive: take it out of RIGHT"
        assert before in (FAILS, INCONSISTENT)
        right = replace(claim, numbers=tuple(map(float, RIGHT[claim.id])))
        assert judged(right, records) != before
    else:
        assert changes == (not claim.insensitive)


def test_few_rows_are_insensitive() -> None:
    assert sum(bool(claim.insensitive) for claim in LEDGER.claims) <= 10
    assert RIGHT.keys() <= BY_ID.keys()


def test_rows_that_cannot_fail_are_shown_and_not_counted() -> None:
    apart = [claim for claim in LEDGER.claims if not claim.counted]
    assert {"one-step-per-byte", "tied-halves", "crashes", "same-architecture", "leader-energy",
            "block-diagram", "norms-tied-head", "smoke-settings", "lr-schedule"} <= {
                claim.id for claim in apart}
    frame = claims.ledger_frame(LEDGER.claims, Lab(Settings(), Evidence(), LEDGER.facts, TYPICAL))
    assert len(frame) == len(LEDGER.claims)
    assert claims.count(frame)["all"].sum() == len(LEDGER.claims) - len(apart)
