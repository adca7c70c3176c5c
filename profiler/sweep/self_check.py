"""The profile's check of itself, on windows that no statistic saw.

What lives here: parts of the model measured at a probe's option, the corrections of prices that follow, real plans
measured beside uniform, and the gain that these plans give. Probes of the whole model are in `reference_configs.py`.

1. Every class of matrix (all k_proj, …) and every block alone at 3 bits: what it costs against what its layers' prices
   sum to. A layer's price is corrected by a factor of its class times a factor of its block, fitted so that classes
   and blocks sum to what was measured (iterative proportional fitting, Deming and Stephan, 1940).
2. The optimum under the corrected prices, at about 2.75 bits a weight and at the sizes of uniform 3 and 4 bits, is
   compressed and measured, beside uniform, which the probes measured, at the same bytes.
3. The gain is that of these plans; its interval is what they scatter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from scipy.special import stdtrit
from torch import Tensor

from allocator.problem import Integers
from allocator.storage import Option
from allocator.strategies.strategies import choice_bytes
from profiler.documents.profile import CheckedPlan, PartProbe, Profile
from profiler.documents.sidecar import FidelityDocument
from profiler.evaluation.divergence import compare, stored_logits
from profiler.evaluation.plan_evaluation import measure_trials, trial_of
from profiler.evaluation.reference_configs import read_probe
from profiler.evaluation.verification import against_uniform, standard_error
from profiler.model.layers import Layer, LoadedModel
from profiler.prediction.calibration_factor import CONFIDENCE, Gain
from profiler.statistics.calibration import Progress
from profiler.sweep.sweep import LayerSweep

PART_OPTION = Option(3, 0, 64, 0)
PART_WINDOWS = 4
"""Windows that every class is measured on, at most."""
FITTING_ROUNDS = 20
LARGEST_CORRECTION = 8.0
WIDEST = 3.0
"""Most that the interval's ends may differ by: a wider one says nothing."""
SIZES = ((2, 0.45), (3, 0.0), (4, 0.0))
"""Sizes of the plans: a uniform width, and the share of the way to the next."""


def class_of(layer: Layer) -> str:
    """The class of a layer: its place in a block, whichever expert it belongs to."""
    return re.sub(r"\d+", "*", layer.projection)


@torch.no_grad()
def measure_classes(
    loaded: LoadedModel, tokens_NT: Tensor, raw: Mapping[str, float], folder: Path, progress: Progress
) -> list[PartProbe]:
    """KL of the model with one class of matrices at `PART_OPTION`, for every class; raw: predicted KL of each layer.

    folder: the probes that the sweep kept.
    """
    tokens_NT = tokens_NT[:PART_WINDOWS]
    reference = stored_logits(loaded, tokens_NT, folder / "reference_of_classes.f32")
    classes = sorted({class_of(layer) for layer in loaded.layers})
    found = []
    for name in classes:

        def weight(layer: Layer, name: str = name) -> Tensor | None:
            if class_of(layer) != name:
                return None
            return read_probe(folder, layer, PART_OPTION, loaded.device)

        with loaded.replacing(weight):
            kl_N = compare(loaded.model, reference, tokens_NT, batch=loaded.windows_per_batch)[:, 0]
        predicted = sum(raw[layer.name] for layer in loaded.layers if class_of(layer) == name)
        found.append(
            PartProbe(
                kind="class",
                name=name,
                predicted_kl=predicted,
                measured_kl=kl_N.mean().item(),
                standard_error=standard_error(kl_N),
            )
        )
        progress("measuring classes", len(found), len(classes))
    return found


def block_parts(loaded: LoadedModel, fidelity: FidelityDocument, raw: Mapping[str, float]) -> list[PartProbe]:
    """What the fidelity study measured of every block alone at `PART_OPTION`, beside its layers' predicted KL."""
    return [
        PartProbe(
            kind="block",
            name=str(block.block),
            predicted_kl=sum(raw[layer.name] for layer in loaded.layers_of(block.block)),
            measured_kl=block.probe_kl.mean,
            standard_error=(block.probe_kl.high - block.probe_kl.low) / 3.29,
        )
        for block in fidelity.blocks
    ]


def corrections(
    layers: Sequence[Layer], raw: Mapping[str, float], parts: Sequence[PartProbe]
) -> dict[str, float]:
    """What each layer's price is multiplied by, so that parts sum to what was measured; 1 on average.

    Parts that measured nothing, or are priced at nothing, correct nothing. Blocks are scaled to sum to what classes do.
    """
    measured = {
        (part.kind, part.name): part.measured_kl
        for part in parts
        if part.measured_kl > 2 * part.standard_error and part.predicted_kl > 0
    }
    totals = {
        kind: sum(
            part.predicted_kl for part in parts if (part.kind, part.name) in measured and part.kind == kind
        )
        for kind in ("class", "block")
    }
    sums = {kind: sum(m for (k, _), m in measured.items() if k == kind) for kind in totals}
    # Relative to the whole: how the model as a whole differs from its price is the gain's to say.
    target: dict[tuple[str, str], float] = {
        (kind, name): m * totals[kind] / sums[kind] for (kind, name), m in measured.items()
    }
    factor = dict.fromkeys(raw, 1.0)
    keys = {layer.name: (("class", class_of(layer)), ("block", str(layer.block))) for layer in layers}
    for _ in range(FITTING_ROUNDS):
        for axis in (0, 1):
            sums_now: dict[tuple[str, str], float] = {}
            for name, key in keys.items():
                sums_now[key[axis]] = sums_now.get(key[axis], 0.0) + raw[name] * factor[name]
            for name, key in keys.items():
                if key[axis] in target and sums_now[key[axis]] > 0:
                    factor[name] *= target[key[axis]] / sums_now[key[axis]]
    return {
        name: min(max(value, 1 / LARGEST_CORRECTION), LARGEST_CORRECTION) for name, value in factor.items()
    }


def check_plans(
    loaded: LoadedModel,
    profile: Profile,
    kl_of_probes: Mapping[Option, Tensor],
    folder: Path,
    progress: Progress,
) -> list[CheckedPlan]:
    """The optimum at the sizes of `SIZES`, measured beside uniform; none where no probe has a neighbour.

    profile: with corrected prices, its gain not yet known. kl_of_probes: (N,) of every probe on the held-back windows.
    folder: for packed layers and activations; an interrupted check of the same plans goes on there.
    """
    menu = profile.menu
    sizes = {option.bits: _uniform_bytes(profile, option) for option in kl_of_probes}
    budgets = [
        round(sizes[bits] + share * (sizes.get(bits + 1, 0) - sizes[bits]))
        for bits, share in SIZES
        if bits in sizes and (not share or bits + 1 in sizes)
    ]
    choices = [profile.planner.optimum(budget).choice for budget in budgets]
    if not choices:
        return []
    tokens_NT = profile.probe_tokens()
    trials = [trial_of(menu, choice) for choice in choices]
    found_PN5 = measure_trials(loaded, profile.calibration(), tokens_NT, trials, folder, progress)
    points = sorted((sizes[option.bits], kl_N) for option, kl_N in kl_of_probes.items())
    return [
        _checked(profile, choice, kl_N, points)
        for choice, kl_N in zip(choices, found_PN5[:, :, 0], strict=True)
    ]


def _uniform_bytes(profile: Profile, option: Option) -> int:
    menu = profile.menu
    return menu.kept_bytes + sum(int(layer.total_bytes[layer.options.index(option)]) for layer in menu.layers)


def _checked(
    profile: Profile, choice: Integers, kl_N: Tensor, points: Sequence[tuple[int, Tensor]]
) -> CheckedPlan:
    menu = profile.menu
    size = choice_bytes(menu, choice)
    below = [point for point in points if point[0] <= size] or [points[0]]
    above = [point for point in points if point[0] >= size] or [points[-1]]
    beside = [below[-1]] if below[-1][0] == above[0][0] else [below[-1], above[0]]
    found = against_uniform(kl_N, beside, size)
    raw = sum(float(layer.cost[index]) for layer, index in zip(menu.layers, choice.tolist(), strict=True))
    return CheckedPlan(
        total_bytes=size,
        bits_per_weight=8 * (size - menu.kept_bytes) / menu.compressible_weights,
        predicted_kl=raw / profile.document.gain.mean,
        measured_kl=kl_N.mean().item(),
        standard_error=standard_error(kl_N),
        uniform_kl=found.uniform_kl,
        difference=found.difference,
        difference_error=found.error,
    )


def checked_gain(plans: Sequence[CheckedPlan]) -> tuple[Gain, bool]:
    """The gain of measured plans with its 90 % prediction interval, and whether the plans agree on one.

    At least one plan has a measured and a predicted KL above 0.

    Student's t over the log ratios, with their measurement error added. Where its ends would differ by more than
    `WIDEST`, they are brought to that, and the plans do not agree.
    """
    usable = [plan for plan in plans if plan.measured_kl > 0 and plan.predicted_kl > 0]
    log_ratio_P = [math.log(plan.measured_kl / plan.predicted_kl) for plan in usable]
    mean = sum(log_ratio_P) / len(log_ratio_P)
    spread = sum((ratio - mean) ** 2 for ratio in log_ratio_P) / max(1, len(log_ratio_P) - 1)
    noise = sum((plan.standard_error / plan.measured_kl) ** 2 for plan in usable) / len(usable)
    error = math.sqrt(spread * (1 + 1 / len(usable)) + noise)
    width = float(stdtrit(max(1, len(usable) - 1), (1 + CONFIDENCE) / 2)) * error
    agree = width <= math.log(WIDEST) / 2
    width = min(width, math.log(WIDEST) / 2)
    return Gain(math.exp(mean), math.exp(mean - width), math.exp(mean + width)), agree


def raw_costs(sweeps: Sequence[LayerSweep], option: Option) -> dict[str, float] | None:
    """Predicted KL of every layer at an option, before any gain; None where some layer was not measured at it."""
    found = {}
    for sweep in sweeps:
        errors = [m.error for m in sweep.measurements if m.option == option and not m.half_width]
        if not errors:
            return None
        found[sweep.layer.name] = errors[0] * sweep.sensitivity
    return found
