"""Gains by class of option: what a prediction is multiplied by for each kind of matrix and tier of bits.

What lives here: the classes, and their least-squares fit to whole plans that were measured. The one gain of the
uniform probes is in `calibration_factor.py`; making and measuring the plans is in `plan_calibration.py`.

Letters: P plans, K classes. x_PK is what each class adds to a plan's prediction, y_P the measured KL, both in
nats/token. Minimised is Σ_P ((x γ − y) / y)² + λ Σ_K (γ_K / γ₀ − 1)², γ ≥ 0, with γ₀ the one gain that fits best: a
class that the plans say little of keeps γ₀. λ is the one with the least squared log error when every plan is predicted
by a fit to the others.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
PENALTIES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


def option_class(projection: str, bits: float) -> str:
    """The class of an option of a layer: its kind of matrix, whichever expert it belongs to, and its tier of bits."""
    projection = re.sub(r"\d+", "*", projection)
    tier = "low" if bits < 2.5 else "middle" if bits < 3.5 else "high"
    return f"{projection} {tier}"


@dataclass(frozen=True, slots=True)
class ClassGains:
    """Gain of every class (K,), and log(predicted / measured) of every plan (P,) predicted from the others."""

    gain_K: Floats
    log_ratio_P: Floats
    penalty: float


def fit_class_gains(x_PK: Floats, y_P: Floats) -> ClassGains:
    """Fit the gains to measured plans; x ≥ 0, y > 0."""
    held_out = {penalty: _held_out_ratios(x_PK, y_P, penalty) for penalty in PENALTIES}
    penalty = min(PENALTIES, key=lambda candidate: float(np.square(held_out[candidate]).sum()))
    return ClassGains(_fit(x_PK, y_P, penalty), held_out[penalty], penalty)


def one_gain(x_P: Floats, y_P: Floats) -> float:
    """The geometric mean of measured over predicted."""
    return math.exp(float(np.log(y_P / x_P).mean()))


def _held_out_ratios(x_PK: Floats, y_P: Floats, penalty: float) -> Floats:
    others = [np.arange(len(y_P)) != p for p in range(len(y_P))]
    predicted_P = [x_PK[p] @ _fit(x_PK[keep], y_P[keep], penalty) for p, keep in enumerate(others)]
    return np.log(np.array(predicted_P) / y_P)


def _fit(x_PK: Floats, y_P: Floats, penalty: float) -> Floats:
    from scipy.optimize import nnls

    start = one_gain(x_PK.sum(axis=1), y_P)
    ridge_KK = math.sqrt(penalty) * np.eye(x_PK.shape[1])
    design = np.concatenate([start * x_PK / y_P[:, None], ridge_KK])
    target = np.concatenate([np.ones(len(y_P)), ridge_KK.diagonal()])
    return start * nnls(design, target)[0]
