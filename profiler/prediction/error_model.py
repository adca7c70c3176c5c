"""The fitted error of a layer, E(b, r) = κ_g · c · 2^(−βb) · (1 + r/r₀)^(−δ) · (1 − r/n)^η.

What lives here: the form, its fit in log space, its figures of merit. Error is the relative *squared* output error.

b bits, r rank, n the smaller side of the matrix, g the group size (κ is 1 at the group size the ranks were measured
at). The form is multiplicative because the error must vanish as b grows at any rank; an additive form cannot. The
fit is by robust least squares on log E (soft L1), all parameters kept non-negative, so that E never rises with b or r.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from profiler.prediction.measurement import Measurement

FLOOR = 1e-12
"""Errors below this are float32 noise and are not fitted."""


@dataclass(frozen=True, slots=True)
class ErrorModel:
    """Parameters of one layer, R² of log error, and the largest ratio between a measured and a fitted error."""

    c: float
    beta: float
    r0: float
    delta: float
    eta: float
    n: int
    group_factors: dict[int, float]
    r_squared: float
    worst_ratio: float

    def error(self, bits: float, rank: float, group_size: int) -> float:
        """Predicted relative squared error; group sizes never measured count as the nearest one."""
        nearest = min(self.group_factors, key=lambda size: abs(math.log(size / group_size)))
        decay = (1 + rank / self.r0) ** -self.delta * max(0.0, 1 - rank / self.n) ** self.eta
        return float(self.group_factors[nearest] * self.c * 2 ** (-self.beta * bits) * decay)


def fit_error_model(measurements: Sequence[Measurement], n: int) -> ErrorModel:
    """Fit one layer's measurements; options without a grid (bits 0 or 16) and rotated ones are left out.

    A layer that every option reproduces (a matrix of zeros, in some checkpoints) has c = 0.
    """
    from scipy.optimize import least_squares

    usable = [m for m in measurements if 0 < m.option.bits < 16 and not m.option.rotated and m.error > FLOOR]
    if not usable:
        return ErrorModel(0.0, 0.0, 1.0, 0.0, 0.0, n, {64: 1.0}, 1.0, 1.0)
    sizes = sorted({m.option.group_size for m in usable})
    base = _base_group(usable, sizes)
    others = [size for size in sizes if size != base]
    bits = np.array([m.option.bits for m in usable], dtype=float)
    ranks = np.array([m.option.rank for m in usable], dtype=float)
    group = np.array([[m.option.group_size == size for size in others] for m in usable], dtype=float)
    target = np.log([m.error for m in usable])

    missing = np.log1p(-np.minimum(ranks / n, 1 - 1e-6))

    def log_error(parameters: NDArray[np.float64]) -> NDArray[np.float64]:
        log_c, beta, log_r0, delta, eta = parameters[:5]
        smooth = log_c - beta * math.log(2) * bits - delta * np.log1p(ranks / math.exp(log_r0))
        found: NDArray[np.float64] = smooth + eta * missing + group @ parameters[5:]
        return found

    def deviation(parameters: NDArray[np.float64]) -> NDArray[np.float64]:
        return log_error(parameters) - target

    def jacobian(parameters: NDArray[np.float64]) -> NDArray[np.float64]:
        r0, delta = math.exp(parameters[2]), parameters[3]
        by_log_r0 = delta * ranks / (r0 + ranks)
        columns = [np.ones_like(bits), -math.log(2) * bits, by_log_r0, -np.log1p(ranks / r0), missing]
        return np.column_stack([*columns, group])

    start = np.array([0.0, 2.0, math.log(max(2.0, n / 4)), 0.5, 1.0] + [0.0] * len(others))
    lower = np.array([-np.inf, 0.0, 0.0, 0.0, 0.0] + [-np.inf] * len(others))
    upper = np.array([np.inf, np.inf, math.log(1e4), 20.0, 20.0] + [np.inf] * len(others))
    fit = least_squares(
        deviation,
        start,
        jac=jacobian,
        bounds=(lower, upper),
        loss="soft_l1",
        f_scale=0.05,
    )
    residual = log_error(fit.x) - target
    spread = float(((target - target.mean()) ** 2).sum())
    factors = {base: 1.0} | {size: float(math.exp(k)) for size, k in zip(others, fit.x[5:], strict=True)}
    return ErrorModel(
        c=float(math.exp(fit.x[0])),
        beta=float(fit.x[1]),
        r0=float(math.exp(fit.x[2])),
        delta=float(fit.x[3]),
        eta=float(fit.x[4]),
        n=n,
        group_factors=dict(sorted(factors.items())),
        r_squared=1 - float((residual**2).sum()) / spread if spread > 0 else 1.0,
        worst_ratio=float(np.exp(np.abs(residual).max())),
    )


def _base_group(usable: Sequence[Measurement], sizes: list[int]) -> int:
    """The group size with ranks measured, or the only one there is."""
    ranked = sorted({m.option.group_size for m in usable if m.option.rank})
    candidates = ranked or sizes
    return 64 if 64 in candidates else candidates[0]
