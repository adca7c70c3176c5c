"""The two-lines test: a U is told from what only falls, only rises, or is noise."""

from __future__ import annotations

import numpy as np
import pytest

from profiler.statistics.ushape import LEVEL, u_shape

DEPTH = np.arange(12) / 11
CURVES = {
    "U": 4 * (DEPTH - 0.5) ** 2,
    "U with its bottom early": np.where(DEPTH < 0.4, 0.4 - DEPTH, (DEPTH - 0.4) / 2),
    "falling": -2 * DEPTH,
    "rising": 2 * DEPTH,
    "falling and levelling out": np.exp(-4 * DEPTH),
    "hill": -4 * (DEPTH - 0.5) ** 2,
    "flat": np.zeros(12),
}


def noisy(name: str, seed: int = 0, noise: float = 0.05) -> np.ndarray:
    return CURVES[name] + noise * np.random.default_rng(seed).normal(size=12)


@pytest.mark.parametrize("name", ["U", "U with its bottom early"])
def test_a_u_is_recognised(name: str) -> None:
    shape = u_shape("probe_kl", noisy(name))
    assert shape.verdict == "U-shaped"
    assert shape.p_value is not None and shape.p_value < LEVEL
    assert shape.left_slope is not None and shape.left_slope < 0
    assert shape.right_slope is not None and shape.right_slope > 0


@pytest.mark.parametrize("name", ["falling", "rising", "hill"])
def test_what_only_falls_or_rises_is_no_u(name: str) -> None:
    assert u_shape("probe_kl", noisy(name)).verdict == "not U-shaped"


@pytest.mark.parametrize("name", ["flat", "falling and levelling out"])
def test_false_alarms_are_about_as_rare_as_the_level_says(name: str) -> None:
    alarms = [u_shape("x", noisy(name, seed, noise=0.3)).verdict == "U-shaped" for seed in range(100)]
    assert sum(alarms) <= 12


def test_a_u_that_the_windows_disagree_on_is_none() -> None:
    value_B = noisy("U")
    noise_RB = 2 * np.random.default_rng(1).normal(size=(2000, 12))
    assert u_shape("x", value_B).verdict == "U-shaped"
    assert u_shape("x", value_B, noise_RB).verdict == "not U-shaped"


def test_four_blocks_are_too_few_to_tell() -> None:
    shape = u_shape("x", np.array([1.0, 0.0, 0.0, 1.0]))
    assert (shape.verdict, shape.p_value) == ("undecided", None)


def test_the_same_values_give_the_same_verdict() -> None:
    assert u_shape("x", noisy("U")) == u_shape("x", noisy("U"))
