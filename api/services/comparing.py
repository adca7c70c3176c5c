"""Strategies measured, each beside the optimum of at most as many bytes, and the page that shows it.

The page is one HTML file with its chart; the drawing is in `web/studies.js`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allocator.atomic import write_atomically
from allocator.errors import BudgetSyntaxError
from allocator.strategies.strategies import ByRecipe, Uniform, parse_strategy
from api.report.report import SCRIPTS, render_page
from api.services.usecases import bits_per_weight, original_of, plan_budget

if TYPE_CHECKING:
    from allocator.plan import Plan
    from allocator.problem import Menu
    from allocator.strategies.policy import Policy
    from profiler.documents.profile import Profile
    from profiler.statistics.calibration import Progress


@dataclass(frozen=True, slots=True)
class PlanFigures:
    """What a plan takes and loses; means are over layers, kept ones at 16 bits; KL in nats/token.

    uniform_kl is log-interpolated at the plan's bytes, None where no uniform plan is on one side.
    """

    total_bytes: int
    bits_per_weight: float
    mean_bits: float
    mean_rank: float
    predicted_kl: float
    measured_kl: float
    standard_error: float
    uniform_kl: float | None
    perplexity: float
    reference_perplexity: float

    @classmethod
    def of(cls, plan: Plan, menu: Menu) -> PlanFigures:
        """From a plan with its verification, and the menu it was chosen from."""
        layers, found = plan.layers.values(), plan.verification
        assert found is not None and found.perplexity is not None and found.reference_perplexity is not None
        return cls(
            plan.total_bytes,
            bits_per_weight(menu, plan.total_bytes),
            sum(layer.bits for layer in layers) / len(layers),
            sum(layer.rank for layer in layers) / len(layers),
            plan.predicted_kl,
            found.measured_kl,
            found.standard_error,
            found.uniform_kl,
            found.perplexity,
            found.reference_perplexity,
        )


@dataclass(frozen=True, slots=True)
class Comparison:
    """A strategy and the optimum of at most as many bytes, measured on the same windows."""

    strategy: str
    plan: PlanFigures
    optimum: PlanFigures

    @property
    def saved(self) -> float:
        """The share of the strategy's KL that the optimum does not lose."""
        return 1 - self.optimum.measured_kl / self.plan.measured_kl if self.plan.measured_kl else 0.0


def compare_strategies(
    profile: Profile,
    strategies: Sequence[str],
    budget: str | None,
    progress: Progress,
    device: str = "cpu",
    policy: Policy | None = None,
    share: float = 1.0,
) -> list[Comparison]:
    """Each strategy beside the optimum at a share of its bytes; those without a size of their own take `budget`.

    Raises what `plan_budget` raises, and `PlanError` when the model's weights are no longer the profile's.
    """
    from tempfile import TemporaryDirectory

    from profiler.evaluation.verification import verified

    sized = [s == "policy" or isinstance(parse_strategy(s), Uniform | ByRecipe) for s in strategies]
    if budget is None and not all(sized):
        raise BudgetSyntaxError(
            f"strategy {strategies[sized.index(False)]} has no size of its own; give --budget, like 3.25bpw"
        )
    budgets = [None if has_size else budget for has_size in sized]
    plans = [
        plan_budget(profile, size, s, policy=policy if s == "policy" else None)
        for s, size in zip(strategies, budgets, strict=True)
    ]
    optima = [plan_budget(profile, f"{int(share * plan.total_bytes)}B") for plan in plans]
    loaded = original_of(plans[0], device, None)
    with TemporaryDirectory(prefix="bitrank-compare-") as folder:
        done = verified(loaded, profile, [*plans, *optima], Path(folder), progress, swaps=0)
    measured = [PlanFigures.of(plan, profile.menu) for plan in done]
    return [
        Comparison(name, measured[index], measured[index + len(plans)])
        for index, name in enumerate(strategies)
    ]


def write_comparison(path: Path, document: dict[str, Any]) -> None:
    """Write what `bitrank compare --json` prints, and the page beside it, each whole or not at all."""
    title = f"bitrank compare: {document['model']['id']}"
    page = render_page("study.html", title, (*SCRIPTS, "studies.js"), {"kind": "compare", "study": document})
    write_atomically(path, (json.dumps(document, indent=1) + "\n").encode())
    write_atomically(path.with_suffix(".html"), page.encode())
