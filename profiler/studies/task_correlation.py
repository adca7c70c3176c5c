"""Whether what is optimised is what is wanted: KL and perplexity of plans, set against their accuracy on tasks.

What lives here: numbers only. Tasks are run in `downstream.py`.

A plan of less KL *parts* from a task where the task has it clearly worse: the mean difference over the task's
documents, paired, is more than `CLEAR` of its standard errors. Of equal pairs one in a hundred is clear by chance.

Letters: P plans, D documents of a task (or windows of a text).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

Floats = NDArray[np.float64]
CLEAR = 2.576


@dataclass(frozen=True, slots=True)
class Parting:
    """Two plans, the one of less KL first, that a task has the other way round: how much more it gives the second."""

    less_kl: str
    preferred: str
    difference: float
    standard_error: float


@dataclass(frozen=True, slots=True)
class TaskAgreement:
    """One task over all plans. Rank correlations are of −KL and −perplexity with the score, None where either is
    constant; `clear_pairs` of `pairs` are told apart by the task."""

    task: str
    documents: int
    kl_correlation: float | None
    perplexity_correlation: float | None
    pairs: int
    clear_pairs: int
    partings: tuple[Parting, ...]


def task_agreement(
    task: str, plans: Sequence[str], kl_P: Floats, perplexity_P: Floats, score_PD: Floats
) -> TaskAgreement:
    """How a task ranks plans beside KL and perplexity; a score of each document, higher is better."""
    mean_P = score_PD.mean(axis=1)
    clear, partings = 0, []
    for pair in combinations(range(len(plans)), 2):
        less, more = sorted(pair, key=lambda p: kl_P[p])
        gained_D = score_PD[more] - score_PD[less]
        difference, error = float(gained_D.mean()), float(gained_D.std(ddof=1) / len(gained_D) ** 0.5)
        if abs(difference) <= CLEAR * error:
            continue
        clear += 1
        if difference > 0:
            partings.append(Parting(plans[less], plans[more], difference, error))
    return TaskAgreement(
        task,
        score_PD.shape[1],
        _correlation(-kl_P, mean_P),
        _correlation(-perplexity_P, mean_P),
        len(plans) * (len(plans) - 1) // 2,
        clear,
        tuple(sorted(partings, key=lambda parting: -parting.difference)),
    )


def _correlation(x_P: Floats, y_P: Floats) -> float | None:
    if np.ptp(x_P) == 0 or np.ptp(y_P) == 0:
        return None
    return float(spearmanr(x_P, y_P).statistic)
