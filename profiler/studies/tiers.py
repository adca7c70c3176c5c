"""Which blocks stand out: tiers by interval, outliers by a robust z-score.

What lives here: two rules over one number per block, and nothing of how the numbers come about.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from profiler.statistics.estimate import Estimate

CRITICAL_RATIO = 2.0
OUTLIER_Z = 3.5
"""Iglewicz and Hoaglin, How to Detect and Handle Outliers (1993)."""
NORMAL_MAD = 0.6745
NORMAL_MEAN_DEVIATION = 0.7979


def tiers(losses: Sequence[Estimate]) -> list[str]:
    """`critical` where the whole interval is above twice the median loss, `high` where it is above the median, else
    `low`: noise alone lifts no block."""
    median = float(np.median([loss.mean for loss in losses]))
    return [
        "critical" if loss.low > CRITICAL_RATIO * median else "high" if loss.low > median else "low"
        for loss in losses
    ]


def robust_z(value_B: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distance from the median in standard deviations that the median absolute deviation stands for.

    Where more than half the values are equal the mean absolute deviation takes its place; where all are, z is 0.
    """
    deviation_B = value_B - np.median(value_B)
    spread = float(np.median(np.abs(deviation_B))) / NORMAL_MAD
    if spread == 0:
        spread = float(np.mean(np.abs(deviation_B))) / NORMAL_MEAN_DEVIATION
    return deviation_B / spread if spread > 0 else np.zeros_like(deviation_B)


def outliers(value_B: NDArray[np.float64]) -> list[int]:
    """Blocks whose robust z-score is beyond `OUTLIER_Z` either way."""
    return [int(block) for block in np.flatnonzero(np.abs(robust_z(value_B)) > OUTLIER_Z)]
