"""From one menu to the plans of any number of budgets: what does not depend on the budget is worked out once.

What lives here: `Planner`. The schema of a plan is `plan.py`, the solver `knapsack.py`, other strategies
`strategies.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from allocator.plan import MIB, SCHEMA_VERSION, Plan, PlanBudget, PlanLayer, PlanModel, plan_layer
from allocator.problem import Integers, Menu, Solution
from allocator.solver.knapsack import Knapsack


@dataclass(frozen=True)
class Planner:
    """Plans of one profile. interval_factors: the prediction interval's ends as multiples of the prediction."""

    menu: Menu
    model: PlanModel
    profile_sha256: str
    interval_factors: tuple[float, float]

    def optimum(self, total_bytes: int) -> Solution:
        """The choice of least predicted KL when the whole checkpoint may take `total_bytes`, with its certificate.

        Raises `InfeasibleError`.
        """
        return self._knapsack.solve(total_bytes - self.menu.kept_bytes)

    def plan(
        self,
        choice: Integers,
        *,
        budget: PlanBudget,
        bound: Solution,
        strategy: str,
        target: str | None = None,
    ) -> Plan:
        """The plan of any strategy's choice (G,); `bound` certifies the optimum at the same bytes.

        The layers' costs, added up in another order than the solver's, may come to a unit in the last place less.
        """
        layers = {
            layer.name: self._planned(group, option)
            for group, (layer, option) in enumerate(zip(self.menu.layers, choice.tolist(), strict=True))
        }
        predicted_kl = sum(layer.cost for layer in layers.values())
        low, high = self.interval_factors
        return Plan(
            schema_version=SCHEMA_VERSION,
            model=self.model,
            profile_sha256=self.profile_sha256,
            budget=budget,
            total_bytes=self.menu.kept_bytes + sum(layer.bytes for layer in layers.values()),
            predicted_kl=predicted_kl,
            predicted_kl_interval=(predicted_kl * low, predicted_kl * high),
            lower_bound=min(bound.lower_bound, predicted_kl),
            gap=max(0.0, predicted_kl - bound.lower_bound),
            shadow_price=bound.shadow_price * MIB,
            strategy=strategy,
            target=target,
            layers=layers,
            kept=self.menu.kept,
            tables=self.menu.tables,
        )

    def _planned(self, group: int, option: int) -> PlanLayer:
        found = self._layers.get((group, option))
        if found is None:
            found = self._layers[group, option] = plan_layer(self.menu.layers[group], option)
        return found

    @cached_property
    def _layers(self) -> dict[tuple[int, int], PlanLayer]:
        """Those that a plan had already, by group and option: neighbouring budgets share most of them."""
        return {}

    @cached_property
    def _knapsack(self) -> Knapsack:
        return Knapsack.of(self.menu.problem(self.menu.original_bytes))
