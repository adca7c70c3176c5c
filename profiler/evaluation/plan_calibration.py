"""Calibrating a profile on whole plans: random ones near many budgets, compressed and measured.

What lives here: drawing the plans, having them measured, and writing the profile that knows their gains. Measuring is
in `plan_evaluation.py`, the fit in `class_calibration.py`.

Uniform probes say how the prediction falls short where every layer has the same bits; a plan never looks like that.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr
from torch import Tensor

from allocator.atomic import alone, write_atomically
from allocator.problem import Integers, Menu
from allocator.strategies.strategies import choice_bytes, disturbed
from profiler.documents.profile import Agreement, MeasuredPlan, Profile, ProfileError, load_profile
from profiler.documents.workspace import MEASURED, is_finished, prepare
from profiler.evaluation.plan_evaluation import measure_trials, trial_of
from profiler.model.layers import LoadedModel
from profiler.prediction.calibration_factor import CONFIDENCE, Gain
from profiler.prediction.class_calibration import Floats, fit_class_gains, one_gain, option_class
from profiler.statistics.calibration import Progress, tokens_sha256

FEWEST_PLANS = 10


@dataclass(frozen=True, slots=True)
class RecalibrationSettings:
    """Plans at budgets spread evenly from `low_bpw` to `high_bpw` bits per compressible weight."""

    plans: int = 40
    seed: int = 0
    low_bpw: float = 2.3
    high_bpw: float = 5.0


def recalibrate(
    loaded: LoadedModel,
    profile: Profile,
    tokens_NT: Tensor,
    output: Path,
    settings: RecalibrationSettings,
    progress: Progress,
) -> Profile:
    """The profile with gains by class, in a new directory; an interrupted run of the same request is resumed.

    tokens (N, T): the windows that the plans are measured on, none of which the statistics saw.

    Raises `ProfileError` for too few plans or an output that holds something else, `InUseError` while another process
    writes it.
    """
    if settings.plans < FEWEST_PLANS:
        raise ProfileError(
            f"{settings.plans} plans are too few to fit gains to; measure {FEWEST_PLANS} at least"
        )
    choices = random_choices(profile.menu, settings)
    different = len({choice.tobytes() for choice in choices})
    if different < FEWEST_PLANS:
        raise ProfileError(
            f"{profile.path} has {different} different plans between {settings.low_bpw} and {settings.high_bpw} bits"
            " per weight, too few to fit gains to; measure more plans, or profile the model with more options"
        )
    text = tokens_sha256(tokens_NT)
    request = json.dumps(
        {"profile": profile.sha256, "text": text, "settings": asdict(settings)}, sort_keys=True
    )
    if is_finished(output, request):
        return load_profile(output)
    with alone(output):
        work = prepare(output, request)
        trials = [trial_of(profile.menu, choice) for choice in choices]
        kl_PN = measure_trials(loaded, profile.calibration(), tokens_NT, trials, work, progress)[:, :, 0]
        _write(profile, choices, kl_PN, output)
        shutil.rmtree(work)
        return load_profile(output)


def random_choices(menu: Menu, settings: RecalibrationSettings) -> list[Integers]:
    """The optimum of many budgets under disturbed costs; budgets below the smallest plan are raised to it."""
    bits_P = np.linspace(settings.low_bpw, settings.high_bpw, settings.plans)
    budgets = [menu.kept_bytes + int(bits * menu.compressible_weights / 8) for bits in bits_P]
    within = [min(max(budget, menu.smallest_bytes), menu.original_bytes) for budget in budgets]
    return [disturbed(menu, budget, settings.seed * settings.plans + p) for p, budget in enumerate(within)]


def predictions_by_class(profile: Profile, choices: Sequence[Integers]) -> tuple[list[str], Floats]:
    """The classes, and what each adds to the uncalibrated prediction of every plan: x_PK in nats/token."""
    layers = profile.document.layers
    names = sorted(
        {option_class(record.projection, bits) for record in layers.values() for bits in (2, 3, 4)}
    )
    x_PK = np.zeros((len(choices), len(names)))
    for p, choice in enumerate(choices):
        for layer, index in zip(profile.menu.layers, choice.tolist(), strict=True):
            record = layers[layer.name]
            k = names.index(option_class(record.projection, layer.options[index].bits))
            x_PK[p, k] += layer.error[index] * record.sensitivity * record.correction
    return names, x_PK


def _write(profile: Profile, choices: Sequence[Integers], kl_PN: Tensor, output: Path) -> None:
    names, x_PK = predictions_by_class(profile, choices)
    x_P, y_P = x_PK.sum(axis=1), kl_PN.mean(dim=1).numpy()
    error_P = (kl_PN.std(dim=1) / kl_PN.shape[1] ** 0.5).numpy()
    fitted = fit_class_gains(x_PK, y_P)
    mean = one_gain(x_P, y_P)
    width = conformal_width(fitted.log_ratio_P)
    gain = Gain(
        mean,
        mean * float(np.exp(-width)),
        mean * float(np.exp(width)),
        {name: float(g) / mean for name, g in zip(names, fitted.gain_K, strict=True)},
    )
    sizes = [choice_bytes(profile.menu, choice) for choice in choices]
    document = profile.document.model_copy(
        update={
            "gain": gain,
            "plans": tuple(
                MeasuredPlan(total_bytes=size, predicted_kl=x, measured_kl=y, standard_error=error)
                for size, x, y, error in zip(sizes, x_P, y_P, error_P, strict=True)
            ),
            "agreement": agreement(
                y_P, fitted.log_ratio_P, np.log(x_P * profile.document.gain.mean / y_P), width
            ),
        }
    )
    for file in (profile.path / name for name in MEASURED):
        if file.exists():
            write_atomically(output / file.name, file.read_bytes())
    write_atomically(output / "profile.json", (document.model_dump_json(indent=1) + "\n").encode())


def conformal_width(log_ratio_P: Floats) -> float:
    """Half width, in log, of an interval that holds a further plan with `CONFIDENCE`, whatever their distribution.

    log_ratio (P,): every plan predicted from the others. The ⌈CONFIDENCE·(P + 1)⌉-th least of their sizes (Barber et
    al., "Predictive inference with the jackknife+", arXiv 1905.02928).
    """
    size_P = np.sort(np.abs(log_ratio_P))
    return float(size_P[min(len(size_P), math.ceil(CONFIDENCE * (len(size_P) + 1))) - 1])


def agreement(y_P: Floats, log_ratio_P: Floats, before_P: Floats, width: float) -> Agreement:
    """Figures of merit of predictions, given as log(predicted / measured), and of those `before`."""
    predicted_P = y_P * np.exp(log_ratio_P)
    pairs = list(combinations(range(len(y_P)), 2))
    wrong = sum((predicted_P[a] - predicted_P[b]) * (y_P[a] - y_P[b]) < 0 for a, b in pairs)
    return Agreement(
        spearman=float(spearmanr(predicted_P, y_P).statistic),
        misordered=float(wrong / len(pairs)),
        median_log_ratio=float(np.median(np.abs(log_ratio_P))),
        median_log_ratio_before=float(np.median(np.abs(before_P))),
        coverage=float((np.abs(log_ratio_P) <= width).mean()),
    )
