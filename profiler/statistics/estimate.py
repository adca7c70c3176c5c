"""Means over windows with bootstrap intervals.

What lives here: resampling windows and nothing else. Tokens of one window depend on each other, windows hardly do, so
windows are what is drawn again. The interval is the percentile one (Efron and Tibshirani, 1993, chapter 13); with few
windows it is somewhat too narrow.

Letters: N windows, R resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

CONFIDENCE = 0.9
RESAMPLES = 2_000
SEED = 0


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and the ends of its 90 % interval."""

    mean: float
    low: float
    high: float


def drawn_windows(windows: int, resamples: int = RESAMPLES, seed: int = SEED) -> NDArray[np.int64]:
    """int64 (R, N): which windows each resample holds; the same for every quantity measured on them."""
    return np.random.default_rng(seed).integers(windows, size=(resamples, windows))


def resampled_means(value_N: Array) -> Array:
    """float64 (R,): the mean of every resample of the windows."""
    return np.asarray(value_N[drawn_windows(len(value_N))].mean(axis=1))


def estimate(value_N: Array) -> Estimate:
    """The mean over windows and its interval."""
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(resampled_means(value_N), [tail, 100 - tail])
    return Estimate(float(value_N.mean()), float(low), float(high))
