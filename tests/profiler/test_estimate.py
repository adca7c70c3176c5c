"""Estimates, tiers and outliers: numbers over windows and over blocks."""

from __future__ import annotations

import numpy as np
import pytest

from profiler.statistics.estimate import Estimate, estimate
from profiler.studies.tiers import outliers, robust_z, tiers


def test_the_interval_holds_the_mean_and_narrows_with_windows() -> None:
    value_N = np.random.default_rng(0).normal(3, 1, size=400)
    few, many = estimate(value_N[:20]), estimate(value_N)
    for found in (few, many):
        assert found.low < found.mean < found.high
    assert many.high - many.low < (few.high - few.low) / 3


def test_the_interval_is_that_of_the_normal_distribution_where_windows_are_many() -> None:
    value_N = np.random.default_rng(1).normal(0, 1, size=1000)
    found, error = estimate(value_N), value_N.std() / 1000**0.5
    assert found.high - found.low == pytest.approx(2 * 1.645 * error, rel=0.05)


def test_equal_windows_leave_no_interval() -> None:
    assert estimate(np.full(8, 0.25)) == Estimate(0.25, 0.25, 0.25)


def test_tiers_follow_the_lower_end_of_the_interval() -> None:
    losses = [Estimate(1.0, 0.9, 1.1)] * 5 + [
        Estimate(1.5, 1.2, 1.8),
        Estimate(1.5, 0.8, 2.2),
        Estimate(4.0, 2.5, 5.0),
        Estimate(4.0, 1.5, 9.0),
    ]
    assert tiers(losses) == ["low"] * 5 + ["high", "low", "critical", "high"]


def test_outliers_stand_apart_by_the_robust_z_score() -> None:
    value_B = np.array([1.0, 1.1, 0.9, 1.05, 0.95, 1.0, 5.0, 1.02])
    assert outliers(value_B) == [6]
    assert robust_z(np.array([0.0, 1.0, 2.0, 3.0, 4.0]))[4] == pytest.approx(2 * 0.6745)


def test_among_equal_values_any_other_is_an_outlier() -> None:
    assert outliers(np.array([1.0] * 9 + [2.0])) == [9]
    assert outliers(np.ones(6)) == []
