"""Whether a quantity is U-shaped over the depth of a model: high at both ends, low between.

What lives here: the two-lines test (Simonsohn, "Two lines: a valid alternative to the invalid testing of U-shaped
relationships with quadratic regressions", AMPPS 1(4), 2018) with bootstrap p-values. A quadratic alone would call a
curve U-shaped that only falls and levels out; two lines need a fall *and* a rise, each significant.

The break is the vertex of a quadratic fit, held `LEAST_SIDE` blocks away from either end. The null distribution of the
slopes comes from a wild bootstrap of the residuals, each divided by one minus its leverage (Davidson and Flachaire,
2008), with the measurement noise of the windows added where it is given.

Letters: B blocks, R resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

TEST = "two-lines test (Simonsohn 2018), wild bootstrap"
LEAST_SIDE = 3
"""Blocks on either side of the break, the break itself on both."""
RESAMPLES = 2_000
LEVEL = 0.05


@dataclass(frozen=True, slots=True)
class Shape:
    """The verdict on one metric. `p_value` is the larger of the two slopes' one-sided ones; both are None, and the
    verdict `undecided`, for a model of fewer than five blocks."""

    metric: str
    verdict: str
    p_value: float | None
    break_block: int | None
    left_slope: float | None
    right_slope: float | None
    test: str = TEST


def u_shape(metric: str, value_B: Array, noise_RB: Array | None = None, seed: int = 0) -> Shape:
    """Test one value per block, in order of depth. noise_RB: deviations of resampled values from `value_B`."""
    blocks = len(value_B)
    if blocks < 2 * LEAST_SIDE - 1:
        return Shape(metric, "undecided", None, None, None, None)
    at = _break(value_B)
    left, right = slice(0, at + 1), slice(at, blocks)
    p_left, left_slope = _slope(value_B, left, -1, noise_RB, seed)
    p_right, right_slope = _slope(value_B, right, 1, noise_RB, seed + 1)
    p_value = float(max(p_left, p_right))
    verdict = "U-shaped" if p_value < LEVEL else "not U-shaped"
    return Shape(metric, verdict, p_value, at, left_slope, right_slope)


def _break(value_B: Array) -> int:
    """The block nearest to the vertex of a quadratic fit."""
    blocks = len(value_B)
    curvature, slope, _ = np.polyfit(np.arange(blocks), value_B, 2)
    vertex = -slope / (2 * curvature) if abs(curvature) > 1e-12 else (blocks - 1) / 2
    return int(np.clip(round(vertex), LEAST_SIDE - 1, blocks - LEAST_SIDE))


def _slope(value_B: Array, side: slice, sign: int, noise_RB: Array | None, seed: int) -> tuple[float, float]:
    """The one-sided bootstrap p-value that the slope of one side has this sign, and the slope."""
    x = np.arange(len(value_B), dtype=np.float64)[side]
    y = value_B[side]
    centred = x - x.mean()
    weight = centred / (centred @ centred)
    slope = float(weight @ y)
    residual = y - y.mean() - slope * centred
    leverage = 1 / len(x) + centred**2 / (centred @ centred)
    flips = np.random.default_rng(seed).choice((-1.0, 1.0), size=(RESAMPLES, len(x)))
    deviation_R = (flips * (residual / (1 - leverage))) @ weight
    if noise_RB is not None:
        deviation_R = deviation_R + noise_RB[:RESAMPLES, side] @ weight
    reached = np.count_nonzero(sign * deviation_R >= sign * slope)
    return (reached + 1) / (RESAMPLES + 1), slope
