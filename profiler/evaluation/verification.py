"""The do-no-harm gate: a plan is measured beside uniform compression of the same bytes before anybody relies on it.

What lives here: which models are measured (the plan, its nearest neighbours, the uniform plans on either side), on
windows that neither the statistics nor the sweep saw, and what is concluded. Measuring is in `plan_evaluation.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from allocator.errors import AllocationError
from allocator.measured_outcome import Verification, verdict
from allocator.plan import MIB, Plan, with_choice
from allocator.problem import Integers, Menu
from allocator.strategies.neighbours import neighbours
from allocator.strategies.strategies import Uniform, choice_bytes, choose
from profiler.documents.profile import Profile
from profiler.evaluation.plan_evaluation import measure_trials, trial_of
from profiler.model.layers import LoadedModel
from profiler.statistics.calibration import Progress

SWAPS = 4
"""Neighbouring plans measured beside the solver's."""
UNIFORM_BITS = (2, 3, 4, 5, 6, 8)
RESAMPLES = 2000


def verified(
    loaded: LoadedModel,
    profile: Profile,
    plans: Sequence[Plan],
    folder: Path,
    progress: Progress,
    swaps: int = SWAPS,
) -> list[Plan]:
    """Each plan, or a neighbour that measured better by more than the error, with its `verification`.

    A plan that lost to uniform says so in its verdict. All are measured in one pass over the model's blocks. folder:
    an empty one to work in.
    """
    menu, tokens_NT = profile.menu, profile.probe_tokens()
    contests = [_Contest.of(menu, plan, swaps) for plan in plans]
    wanted = {choice.tobytes(): choice for contest in contests for choice in contest.choices}
    trials = [trial_of(menu, choice) for choice in wanted.values()]
    found_PN5 = measure_trials(loaded, profile.calibration(), tokens_NT, trials, folder, progress)
    measured = dict(zip(wanted, found_PN5, strict=True))
    return [
        contest.decided(profile, torch.stack([measured[choice.tobytes()] for choice in contest.choices]))
        for contest in contests
    ]


@dataclass(frozen=True, slots=True)
class _Contest:
    """One plan, what may replace it, and the uniform plans beside it."""

    plan: Plan
    candidates: list[Integers]
    uniform: list[tuple[int, Integers]]

    @classmethod
    def of(cls, menu: Menu, plan: Plan, swaps: int) -> _Contest:
        chosen, price = _choice(menu, plan), plan.shadow_price / MIB
        near = neighbours(menu, chosen, plan.budget.bytes, price, swaps)
        return cls(plan, [chosen, *near], _uniform_beside(menu, plan.total_bytes))

    @property
    def choices(self) -> list[Integers]:
        return [*self.candidates, *(choice for _, choice in self.uniform)]

    def decided(self, profile: Profile, found_PN5: Tensor) -> Plan:
        """The best candidate by what was measured of every choice on every window, with its verification."""
        menu, count, kl_PN = profile.menu, len(self.candidates), found_PN5[:, :, 0]
        record = profile.document.calibration
        best = _best(kl_PN[:count])
        points = [(size, kl_N) for (size, _), kl_N in zip(self.uniform, kl_PN[count:], strict=True)]
        found = against_uniform(kl_PN[best], points, choice_bytes(menu, self.candidates[best]))
        verification = Verification(
            text="held-back calibration windows",
            tokens=kl_PN.shape[1] * (record.window_tokens - max(1, len(record.text_start))),
            measured_kl=kl_PN[best].mean().item(),
            standard_error=standard_error(kl_PN[best]),
            perplexity=found_PN5[best, :, 1].mean().exp().item(),
            reference_perplexity=found_PN5[best, :, 2].mean().exp().item(),
            uniform_kl=found.uniform_kl,
            difference=found.difference,
            difference_error=found.error,
            swaps=count - 1,
            swapped=best != 0,
            verdict=verdict(found.difference, found.error),
        )
        made = with_choice(self.plan, menu, self.candidates[best], profile.interval_factors)
        return made.model_copy(update={"verification": verification})


def _choice(menu: Menu, plan: Plan) -> Integers:
    from numpy import array, int64

    return array([layer.options.index(plan.layers[layer.name].option) for layer in menu.layers], dtype=int64)


def _uniform_beside(menu: Menu, total_bytes: int) -> list[tuple[int, Integers]]:
    """The largest uniform plan of at most these bytes and the smallest of at least as many; none, where one lacks."""
    plans = []
    for bits in UNIFORM_BITS:
        try:
            choice = choose(Uniform(bits), menu, total_bytes)
        except AllocationError:
            continue
        plans.append((choice_bytes(menu, choice), choice))
    below = [found for found in plans if found[0] <= total_bytes]
    above = [found for found in plans if found[0] >= total_bytes]
    if not below or not above:
        return []
    return [below[-1]] if below[-1][0] == above[0][0] else [below[-1], above[0]]


def _best(kl_PN: Tensor) -> int:
    """The first plan, unless another measured less by more than the standard error of the difference."""
    best = 0
    for index in range(1, len(kl_PN)):
        gain_N = kl_PN[best] - kl_PN[index]
        if gain_N.mean() > standard_error(gain_N):
            best = index
    return best


def standard_error(value_N: Tensor) -> float:
    return value_N.std().item() / len(value_N) ** 0.5 if len(value_N) > 1 else float("inf")


@dataclass(frozen=True, slots=True)
class Comparison:
    """uniform's KL at a plan's bytes, the plan's less that, and the error of the difference; None without uniform."""

    uniform_kl: float | None
    difference: float | None
    error: float | None


def against_uniform(
    kl_N: Tensor, uniform_points: Sequence[tuple[int, Tensor]], total_bytes: int
) -> Comparison:
    """The plan's mean KL less that of uniform, log-interpolated in bytes, and the bootstrap error of that."""
    if not uniform_points:
        return Comparison(None, None, None)
    generator = torch.Generator().manual_seed(0)
    resampled_BN = torch.randint(len(kl_N), (RESAMPLES, len(kl_N)), generator=generator)
    everything_1N = torch.arange(len(kl_N))[None]

    def differences(window_BN: Tensor) -> Tensor:
        uniform_B = _interpolated(
            [(size, u_N[window_BN].mean(1)) for size, u_N in uniform_points], total_bytes
        )
        return kl_N[window_BN].mean(1) - uniform_B

    difference = differences(everything_1N).item()
    error = differences(resampled_BN).std().item()
    return Comparison(kl_N.mean().item() - difference, difference, error)


def _interpolated(points: Sequence[tuple[int, Tensor]], total_bytes: int) -> Tensor:
    (small, low_B), (large, high_B) = points[0], points[-1]
    share = (total_bytes - small) / (large - small) if large > small else 0.0
    return torch.exp(low_B.log() * (1 - share) + high_B.log() * share)
