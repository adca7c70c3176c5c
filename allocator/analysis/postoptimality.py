"""Questions around an optimum: the inverse problem, what the budget is worth, and what uncertainty changes.

What lives here: the smallest bytes for a cost, the budgets over which a plan stays optimal, what more bytes
buy and where, and the plan for costs at the upper end of their prediction intervals. The shadow price itself
is part of every `Solution`. The solvers are `knapsack.py` and `allocation.py`; the whole frontier is
`frontier.py`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from allocator.allocation import allocate
from allocator.constraints.rules import Constraints
from allocator.errors import InvalidProblemError, UnreachableCostError
from allocator.problem import Floats, Menu, Problem, Solution
from allocator.solver.knapsack import solve
from allocator.storage import Option

MIB = 2**20
COST_ROUNDING = 1e-12
"""Costs that differ by less than this share are the same cost."""
PRICE_HALVINGS = 80


@dataclass(frozen=True, slots=True)
class SmallestBudget:
    """The answer to the inverse problem. solution: the choice, its `total_bytes` the smallest found, its
    bound on cost at that budget; lower_bound_bytes: no choice of so little cost takes fewer bytes; proven:
    both are equal."""

    solution: Solution
    lower_bound_bytes: int
    proven: bool


def smallest_budget(problem: Problem, max_cost: float, *, time_limit_seconds: float = 10.0) -> SmallestBudget:
    """The fewest bytes whose optimum costs at most `max_cost` (to a share of 1e-12); the problem's own budget
    is unread.

    The Lagrangian relaxation brackets the answer to within about one option's bytes, bisection with exact
    solves finds it. Raises `UnreachableCostError`.
    """
    limit = max_cost + COST_ROUNDING * abs(max_cost)
    least_cost = float(np.minimum.reduceat(problem.cost, problem.start[:-1]).sum())
    if not least_cost <= limit:
        raise UnreachableCostError(
            f"cost {max_cost:.6g} is out of reach: the best options everywhere cost {least_cost:.6g}; "
            "accept that or offer better options",
            least_cost,
        )
    deadline = time.monotonic() + time_limit_seconds
    step = max(1, int(np.gcd.reduce(np.append(problem.size, 0))))
    low, high = (-(-bound // step) for bound in _bytes_bracket(problem, limit))
    found = solve(replace(problem, budget_bytes=high * step))
    low_proven, undecided = low, False
    while low < high and time.monotonic() < deadline:
        middle = (low + high) // 2
        trial = solve(replace(problem, budget_bytes=middle * step))
        if trial.cost <= limit:
            found, high = trial, trial.total_bytes // step
            continue
        undecided |= trial.lower_bound <= limit
        low = middle + 1
        low_proven = low_proven if undecided else low
    if found.total_bytes > high * step:
        found = solve(replace(problem, budget_bytes=high * step))
    return SmallestBudget(found, low_proven * step, low_proven * step == found.total_bytes)


def _bytes_bracket(problem: Problem, max_cost: float) -> tuple[int, int]:
    """A lower bound on the bytes of any choice that costs at most `max_cost`, and the bytes of one such
    choice."""
    groups = problem.start[:-1]
    least = int(np.minimum.reduceat(problem.size, groups).sum())
    cheapest = _lexicographic(problem, problem.cost)
    lower, upper = least, int(problem.size[cheapest].sum())
    smallest = _lexicographic(problem, problem.size.astype(np.float64))
    if float(problem.cost[smallest].sum()) <= max_cost:
        return least, least
    spread = float(np.ptp(problem.cost)) or 1.0
    low, high = math.log(spread * 1e-30), math.log(spread * 1e6)
    for _ in range(PRICE_HALVINGS):
        middle = (low + high) / 2
        price = math.exp(middle)
        value = problem.cost + price * problem.size
        bound = (float(np.minimum.reduceat(value, groups).sum()) - max_cost) / price
        lower = max(lower, math.ceil(bound - 1e-9 * abs(bound)))
        taken = _lexicographic(problem, value)
        if float(problem.cost[taken].sum()) <= max_cost:
            low, upper = middle, min(upper, int(problem.size[taken].sum()))
        else:
            high = middle
    return min(lower, upper), upper


def _lexicographic(problem: Problem, value: Floats) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The option of least `value` in every group, the cheapest among equals: indices (G,) into the
    options."""
    owner = np.repeat(np.arange(problem.group_count), np.diff(problem.start))
    least = np.minimum.reduceat(value, problem.start[:-1])
    tied = np.flatnonzero(value == least[owner])
    order = tied[np.lexsort((problem.size[tied], problem.cost[tied], owner[tied]))]
    first = np.append(True, np.diff(owner[order]) != 0)
    return np.asarray(order[first], dtype=np.int64)


@dataclass(frozen=True, slots=True)
class BudgetRange:
    """A plan is optimal for every budget from `low_bytes` up to, not including, `high_bytes`; None is no
    end."""

    low_bytes: int
    high_bytes: int | None
    proven: bool


def optimal_range(problem: Problem, solution: Solution, *, time_limit_seconds: float = 10.0) -> BudgetRange:
    """The budgets over which an optimal `solution` of `problem` stays optimal.

    It starts at the solution's own bytes and ends where the first cheaper choice fits.
    """
    magnitude = float(np.abs(problem.cost[problem.start[:-1] + solution.choice]).sum())
    cheaper = min(math.nextafter(solution.cost, -math.inf), solution.cost - 4 * COST_ROUNDING * magnitude)
    try:
        following = smallest_budget(problem, cheaper, time_limit_seconds=time_limit_seconds)
    except UnreachableCostError:
        return BudgetRange(solution.total_bytes, None, solution.proven)
    proven = solution.proven and following.proven
    return BudgetRange(solution.total_bytes, following.solution.total_bytes, proven)


@dataclass(frozen=True, slots=True)
class Change:
    """One layer whose option differs between two plans; cost_saved in nats per token, bytes_added may be
    negative."""

    layer: str
    before: Option
    after: Option
    bytes_added: int
    cost_saved: float


@dataclass(frozen=True, slots=True)
class Purchase:
    """What more bytes buy: the new optimum, the cost saved (nats per token), and the layers that change,
    those that save most first."""

    solution: Solution
    cost_saved: float
    changes: tuple[Change, ...]


def more_buys(
    menu: Menu,
    solution: Solution,
    total_bytes: int,
    extra_bytes: int = MIB,
    constraints: Constraints | None = None,
) -> Purchase:
    """What `extra_bytes` beyond `total_bytes` of checkpoint would change in an optimal `solution` of the
    menu."""
    richer = allocate(menu, total_bytes + extra_bytes, constraints)
    return Purchase(richer, solution.cost - richer.cost, changes(menu, solution, richer))


def changes(menu: Menu, before: Solution, after: Solution) -> tuple[Change, ...]:
    """The layers whose options differ between two solutions over the menu's layers, largest saving first."""
    found = []
    for layer, old, new in zip(menu.layers, before.choice.tolist(), after.choice.tolist(), strict=True):
        if old != new:
            added = int(layer.total_bytes[new] - layer.total_bytes[old])
            saved = float(layer.cost[old] - layer.cost[new])
            found.append(Change(layer.name, layer.options[old], layer.options[new], added, saved))
    return tuple(sorted(found, key=lambda change: -change.cost_saved))


@dataclass(frozen=True, slots=True)
class RobustPlan:
    """nominal: the optimum at predicted costs, and what it costs at the upper end (nats per token). robust:
    the optimum at the upper end, None where it is the same choice, and what it costs at both."""

    nominal: Solution
    nominal_upper_cost: float
    robust: Solution | None
    robust_predicted_cost: float
    robust_upper_cost: float


def robust_plan(
    menu: Menu, upper_cost: Sequence[Floats], total_bytes: int, constraints: Constraints | None = None
) -> RobustPlan:
    """The plans for predicted costs and for `upper_cost`, the upper ends of their prediction intervals.

    upper_cost[g] float64 of the length of layer g's options. Raises `InvalidProblemError` where an upper end
    lies below its prediction.
    """
    for layer, upper in zip(menu.layers, upper_cost, strict=True):
        if upper.shape != layer.cost.shape or not (upper >= layer.cost).all():
            raise InvalidProblemError(
                f"{layer.name!r} has upper costs below its predictions or of another length; "
                "pass the upper end of each option's prediction interval"
            )
    layers = (replace(layer, cost=upper) for layer, upper in zip(menu.layers, upper_cost, strict=True))
    upper_menu = Menu(tuple(layers), menu.kept)
    nominal = allocate(menu, total_bytes, constraints)
    robust = allocate(upper_menu, total_bytes, constraints)
    nominal_upper, robust_upper = _cost(upper_menu, nominal), _cost(upper_menu, robust)
    if (nominal.choice == robust.choice).all() or nominal_upper <= robust_upper:
        return RobustPlan(nominal, nominal_upper, None, nominal.cost, nominal_upper)
    return RobustPlan(nominal, nominal_upper, robust, _cost(menu, robust), robust_upper)


def _cost(menu: Menu, solution: Solution) -> float:
    return float(sum(layer.cost[k] for layer, k in zip(menu.layers, solution.choice, strict=True)))
