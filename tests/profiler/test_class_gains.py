"""Gains by class of option: what the fit gives back, what it leaves alone, and that a plan has no part in its own
prediction.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from profiler.prediction.class_calibration import PENALTIES, Floats, fit_class_gains, one_gain, option_class

TRUE_K = np.array([0.5, 0.8, 1.3, 2.0])
LOOSEST = min(PENALTIES)


def plans(count: int = 40, classes: int = 4, seed: int = 0) -> Floats:
    """x_PK in which every class has its part and no two plans are alike."""
    return np.random.default_rng(seed).lognormal(-2, 1, (count, classes))


def noisy(x_PK: Floats, noise: float = 0.2, seed: int = 1) -> Floats:
    """y_P under the true gains."""
    measured: Floats = x_PK @ TRUE_K * np.exp(noise * np.random.default_rng(seed).standard_normal(len(x_PK)))
    return measured


def by_normal_equations(x_PK: Floats, y_P: Floats, penalty: float) -> Floats:
    """The gains without their bound: the gradient of Σ ((x γ − y) / y)² + λ Σ (γ / γ₀ − 1)² is zero."""
    start = math.exp(np.mean([math.log(y / x) for x, y in zip(x_PK.sum(axis=1), y_P, strict=True)]))
    scaled_PK = x_PK / y_P[:, None]
    left_KK = scaled_PK.T @ scaled_PK + penalty / start**2 * np.eye(x_PK.shape[1])
    solved: Floats = np.linalg.solve(left_KK, scaled_PK.sum(axis=0) + penalty / start)
    return solved


def left_out(x_PK: Floats, y_P: Floats, penalty: float) -> Floats:
    """log(predicted / measured) of every plan, from the normal equations of the others."""
    ratios = []
    for p in range(len(y_P)):
        gain_K = by_normal_equations(np.delete(x_PK, p, axis=0), np.delete(y_P, p), penalty)
        ratios.append(math.log(float(x_PK[p] @ gain_K) / float(y_P[p])))
    return np.array(ratios)


@pytest.mark.parametrize(
    ("bits", "tier"),
    [
        (1, "low"),
        (2, "low"),
        (2.4999, "low"),
        (2.5, "middle"),
        (3, "middle"),
        (3.4999, "middle"),
        (3.5, "high"),
        (4, "high"),
        (16, "high"),
    ],
)
def test_a_class_is_a_kind_of_matrix_and_one_of_three_tiers_of_bits(bits: float, tier: str) -> None:
    assert option_class("q_proj", bits) == f"q_proj {tier}"
    assert option_class("down_proj", bits) == f"down_proj {tier}"


def test_one_gain_is_the_geometric_mean_of_measured_over_predicted() -> None:
    assert one_gain(np.array([1.0, 2.0, 5.0]), np.array([2.0, 1.0, 40.0])) == pytest.approx(2.0)


def test_known_gains_come_back_where_nothing_is_noise() -> None:
    x_PK = plans()
    fitted = fit_class_gains(x_PK, x_PK @ TRUE_K)
    assert fitted.penalty == LOOSEST
    assert fitted.gain_K == pytest.approx(TRUE_K, rel=0.01)
    assert np.abs(fitted.log_ratio_P).max() < 0.01


def test_plans_that_one_gain_explains_get_that_gain_in_every_class() -> None:
    x_PK = plans()
    fitted = fit_class_gains(x_PK, 0.7 * x_PK.sum(axis=1))
    assert fitted.gain_K == pytest.approx([0.7] * 4)
    assert fitted.log_ratio_P == pytest.approx(np.zeros(len(x_PK)), abs=1e-9)


def test_a_class_that_no_plan_uses_keeps_the_one_gain() -> None:
    x_PK = np.insert(plans(), 2, 0.0, axis=1)
    y_P = noisy(np.delete(x_PK, 2, axis=1))
    fitted = fit_class_gains(x_PK, y_P)
    kept = one_gain(x_PK.sum(axis=1), y_P)
    assert fitted.gain_K[2] == pytest.approx(kept)
    assert np.abs(np.delete(fitted.gain_K, 2) / kept - 1).min() > 0.05


def test_a_class_of_little_weight_stays_nearer_to_the_one_gain_than_one_of_much() -> None:
    """Both classes are truly off by a factor of two; the plans tell it of one only."""
    x_PK = plans(classes=3) * np.array([1.0, 1.0, 0.0001])
    y_P = x_PK @ np.array([1.0, 2.0, 2.0])
    gain_K = fit_class_gains(x_PK, y_P).gain_K
    kept = one_gain(x_PK.sum(axis=1), y_P)
    assert gain_K[1] == pytest.approx(2, rel=0.01)
    assert gain_K[2] == pytest.approx(kept, rel=0.01)


def test_no_gain_is_negative_where_least_squares_alone_would_make_one_so() -> None:
    x_PK = plans()
    y_P = x_PK @ np.array([1.0, 1.0, 1.0, -0.05])
    y_P = np.maximum(y_P, 0.05 * x_PK.sum(axis=1))
    assert by_normal_equations(x_PK, y_P, LOOSEST).min() < 0
    fitted = fit_class_gains(x_PK, y_P)
    assert fitted.gain_K.min() == 0
    assert np.isfinite(fitted.log_ratio_P).all()


@pytest.mark.parametrize("seed", range(10))
def test_no_gain_is_negative_and_every_ratio_finite_whatever_was_measured(seed: int) -> None:
    x_PK = plans(10, 6, seed)
    y_P = np.random.default_rng(seed + 100).lognormal(-2, 2, 10)
    fitted = fit_class_gains(x_PK, y_P)
    assert (fitted.gain_K >= 0).all() and fitted.gain_K.max() > 0
    assert np.isfinite(fitted.log_ratio_P).all()


def test_a_plan_is_predicted_from_the_others_alone() -> None:
    x_PK = plans(20)
    y_P = noisy(x_PK)
    fitted = fit_class_gains(x_PK, y_P)
    assert fitted.gain_K == pytest.approx(by_normal_equations(x_PK, y_P, fitted.penalty))
    assert fitted.log_ratio_P == pytest.approx(left_out(x_PK, y_P, fitted.penalty))
    in_sample_P = np.log(x_PK @ fitted.gain_K / y_P)
    assert np.square(fitted.log_ratio_P).sum() > np.square(in_sample_P).sum()


@pytest.mark.parametrize("noise", [0.01, 0.2, 0.4])
def test_the_penalty_is_the_one_under_which_plans_are_best_predicted_from_the_others(noise: float) -> None:
    x_PK = plans(12)
    y_P = noisy(x_PK, noise)
    best = min(PENALTIES, key=lambda penalty: float(np.square(left_out(x_PK, y_P, penalty)).sum()))
    assert fit_class_gains(x_PK, y_P).penalty == best


def test_noise_calls_for_a_larger_penalty() -> None:
    x_PK = plans(12)
    penalties = [fit_class_gains(x_PK, noisy(x_PK, noise)).penalty for noise in (0.0, 0.8)]
    assert penalties[0] < penalties[1]


@pytest.mark.parametrize("factor", [1e-6, 3.0, 1e4])
def test_measuring_in_other_units_scales_the_gains_and_nothing_else(factor: float) -> None:
    x_PK = plans(15)
    y_P = noisy(x_PK)
    fitted, scaled = fit_class_gains(x_PK, y_P), fit_class_gains(x_PK, factor * y_P)
    assert scaled.penalty == fitted.penalty
    assert scaled.gain_K == pytest.approx(factor * fitted.gain_K)
    assert scaled.log_ratio_P == pytest.approx(fitted.log_ratio_P, abs=1e-9)


def test_the_order_of_plans_and_classes_does_not_matter() -> None:
    x_PK = plans(15)
    y_P = noisy(x_PK)
    fitted = fit_class_gains(x_PK, y_P)
    turned = fit_class_gains(x_PK[::-1, ::-1], y_P[::-1])
    assert turned.gain_K == pytest.approx(fitted.gain_K[::-1])
    assert turned.log_ratio_P == pytest.approx(fitted.log_ratio_P[::-1], abs=1e-9)
