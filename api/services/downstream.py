"""KL and perplexity of plans set against their accuracy on tasks: a use-case like those of `usecases.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from allocator.errors import BitrankError, BudgetSyntaxError
from allocator.strategies.strategies import ByRecipe, Uniform, parse_strategy
from api.services.usecases import bits_per_weight, original_of, plan_budget

if TYPE_CHECKING:
    from allocator.plan import Plan
    from profiler.documents.profile import Profile
    from profiler.statistics.calibration import Progress
    from profiler.studies.task_correlation import TaskAgreement

PLANS = ("2.3bpw", "2.6bpw", "3bpw", "3.3bpw", "3.75bpw", "4.3bpw", "uniform:2", "uniform:3", "uniform:4")
FEWEST_PLANS = 3


@dataclass(frozen=True, slots=True)
class PlanScores:
    """A plan, or the original; `scores` is the mean of every task, `errors` its standard error. KL in nats/token."""

    plan: str
    bits_per_weight: float
    kl_nats: float
    perplexity: float
    scores: dict[str, float]
    errors: dict[str, float]


@dataclass(frozen=True, slots=True)
class Downstream:
    """Every plan, the original first, and how every task agrees with KL and perplexity; `text`: how the loss on the
    text that KL is measured on does, its windows being the documents."""

    plans: tuple[PlanScores, ...]
    text: TaskAgreement
    tasks: tuple[TaskAgreement, ...]


def measure_downstream(
    profile: Profile,
    plans: Sequence[str],
    tasks: Path | None,
    names: Sequence[str],
    text: Path | None,
    documents: int,
    progress: Progress,
    device: str = "cpu",
    batch: int = 8,
) -> Downstream:
    """Carry out every plan, a budget of the optimum or a strategy with a size, and run tasks on it.

    tasks: a folder of lm-evaluation-harness task files; without one, two are made of `text`. KL and perplexity are on
    the windows that the profile holds back. Raises `TaskError` and what `plan_budget` raises.
    """
    import numpy as np
    import torch

    from profiler.evaluation.plan_evaluation import measure_trials, trial_weight
    from profiler.model.checkpoint import DEMO, DEMO_PATH
    from profiler.model.layers import load_model
    from profiler.model.weight_patching import substituted
    from profiler.studies.downstream import TaskError, find_tasks, make_tasks, task_scores
    from profiler.studies.task_correlation import task_agreement

    if len(plans) < FEWEST_PLANS:
        raise BitrankError(f"{len(plans)} plans tell nothing of an order; give {FEWEST_PLANS} at least")
    made = [_planned(profile, plan) for plan in plans]
    if tasks is None and text is None and profile.document.model.id == DEMO:
        text = DEMO_PATH / "evaluation.txt"
    if tasks is None and text is None:
        raise TaskError("there is nothing to test on; give --tasks, or --text to make tasks of")
    opened = original_of(made[0], device, None)
    trials = [{name: layer.option for name, layer in plan.layers.items()} for plan in made]
    with TemporaryDirectory(prefix="bitrank-downstream-") as scratch:
        folder, whole = Path(scratch), load_model(opened.ref, device)
        if tasks is not None:
            chosen = find_tasks(tasks, names)
        else:
            assert text is not None
            chosen = make_tasks(whole, text, folder, documents)
        scores = [task_scores(whole, chosen, documents, batch)]
        found_PN5 = measure_trials(
            opened, profile.calibration(), profile.probe_tokens(), trials, folder, progress
        )
        for trial in trials:
            weights = {
                layer: trial_weight(opened, layer, trial[layer.name], folder) for layer in opened.layers
            }
            with torch.no_grad(), substituted(whole, weights):
                scores.append(task_scores(whole, chosen, documents, batch))
            progress("running tasks", len(scores) - 1, len(trials))
    kl_P = np.array([0.0, *found_PN5[:, :, 0].mean(1).tolist()])
    loss_PN = np.concatenate([found_PN5[:1, :, 2].numpy(), found_PN5[:, :, 1].numpy()])
    perplexity_P = np.exp(loss_PN.mean(axis=1))
    labels = ("original", *plans)
    sizes = [profile.menu.original_bytes, *(plan.total_bytes for plan in made)]
    rows = [
        PlanScores(
            label,
            bits_per_weight(profile.menu, size),
            float(kl),
            float(perplexity),
            {task: float(score_D.mean()) for task, score_D in found.items()},
            {task: float(score_D.std(ddof=1) / len(score_D) ** 0.5) for task, score_D in found.items()},
        )
        for label, size, kl, perplexity, found in zip(labels, sizes, kl_P, perplexity_P, scores, strict=True)
    ]
    agreements = [
        task_agreement(task, labels, kl_P, perplexity_P, np.stack([found[task] for found in scores]))
        for task in scores[0]
    ]
    text_agreement = task_agreement("perplexity", labels, kl_P, perplexity_P, -loss_PN)
    return Downstream(tuple(rows), text_agreement, tuple(agreements))


def _planned(profile: Profile, plan: str) -> Plan:
    """The optimum at a budget, or a strategy that has a size."""
    if plan[:1].isdigit() or plan[:1] == ".":
        return plan_budget(profile, plan)
    if not isinstance(parse_strategy(plan), Uniform | ByRecipe):
        raise BudgetSyntaxError(
            f"{plan} has no size of its own; give budgets, like 3.25bpw, or strategies that do"
        )
    return plan_budget(profile, None, plan)


def document_of(profile: Profile, found: Downstream) -> dict[str, Any]:
    return {"model": profile.document.model.model_dump(), **asdict(found)}
