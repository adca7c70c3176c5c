"""The gain: what a prediction is multiplied by, from whole models measured at uniform settings.

What lives here: the constant and its interval. Measuring the probes is in `reference_configs.py`. The prediction
½ Σ tr(G ΔW H ΔWᵀ) is a second-order one and falls short of the measured KL by a nearly constant factor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from scipy.special import stdtrit

from allocator.storage import Option

CONFIDENCE = 0.9


@dataclass(frozen=True, slots=True)
class Probe:
    """One uniform setting: predicted (uncalibrated) and measured KL in nats/token, and the measurement's error."""

    option: Option
    predicted_kl: float
    measured_kl: float
    standard_error: float


@dataclass(frozen=True, slots=True)
class Gain:
    """Measured over predicted KL: the geometric mean over what was measured, and its prediction interval's end points.

    classes: the gains of `class_gains.option_class`, over `mean`; a class that is missing has 1.
    """

    mean: float
    low: float
    high: float
    classes: dict[str, float] = field(default_factory=dict)


def calibrate(probes: Sequence[Probe]) -> Gain:
    """Gain and its 90 % prediction interval: Student's t on the log ratios, with their measurement error added."""
    ratios = [
        math.log(p.measured_kl / p.predicted_kl) for p in probes if p.measured_kl > 0 and p.predicted_kl > 0
    ]
    if not ratios:
        return Gain(1.0, 0.5, 2.0)
    mean = sum(ratios) / len(ratios)
    spread = sum((ratio - mean) ** 2 for ratio in ratios) / max(1, len(ratios) - 1)
    noise = [
        (p.standard_error / p.measured_kl) ** 2 for p in probes if p.measured_kl > 0 and p.standard_error > 0
    ]
    error = math.sqrt(spread * (1 + 1 / len(ratios)) + (sum(noise) / len(noise) if noise else 0.0))
    width = float(stdtrit(max(1, len(ratios) - 1), (1 + CONFIDENCE) / 2)) * error
    return Gain(math.exp(mean), math.exp(mean - width), math.exp(mean + width))
