"""Paired differences against scipy's own paired t-test."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from detdistill.evaluation.paired import paired

ALONE = {0: 8.9, 1: 8.7, 2: 8.1, 3: 9.4}


def test_interval_is_that_of_the_paired_t_test() -> None:
    arm = {0: 9.3, 1: 9.9, 2: 8.8, 3: 9.2}
    result = paired(arm, ALONE)
    assert result is not None
    oracle = stats.ttest_rel(list(arm.values()), list(ALONE.values())).confidence_interval(0.95)
    assert result.interval == pytest.approx((oracle.low, oracle.high))
    assert result.mean == pytest.approx(sum(arm.values()) / 4 - sum(ALONE.values()) / 4)


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ((1.0, 1.1, 0.9, 1.0), "better"),
        ((-1.0, -1.1, -0.9, -1.0), "worse"),
        ((1.0, -1.0, 2.0, -1.5), "no measurable gain"),
        ((3.0,), "one seed: no verdict"),
    ],
)
def test_verdict(gains: tuple[float, ...], verdict: str) -> None:
    arm = {seed: ALONE[seed] + gain for seed, gain in enumerate(gains)}
    result = paired(arm, ALONE)
    assert result is not None
    assert result.verdict == verdict


def test_two_seeds_claim_little() -> None:
    """Gains of 1 and 3 are no proof, nor is their sum of none: the interval is 12.7 standard errors a side."""
    result = paired({0: 1.0, 1: 3.0}, {0: 0.0, 1: 0.0})
    assert result is not None
    assert result.verdict == "two seeds cannot tell"


def test_only_seeds_of_both_count_and_nan_is_absent() -> None:
    result = paired({0: 1.0, 1: 2.0, 7: 3.0}, {0: 0.5, 1: math.nan, 5: 1.0})
    assert result is not None
    assert result.differences == {0: 0.5}
    assert paired({1: 1.0}, {2: 1.0}) is None


def test_equal_in_every_seed_is_no_gain() -> None:
    result = paired(ALONE, ALONE)
    assert result is not None
    assert result.interval == (0.0, 0.0)
    assert result.verdict == "no measurable gain"
