"""Questions around an optimum, answered exactly."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocator.analysis.postoptimality import more_buys, optimal_range, robust_plan, smallest_budget
from allocator.constraints.rules import Constraints
from allocator.errors import InvalidProblemError, UnreachableCostError
from allocator.problem import LayerMenu, Menu, Problem
from allocator.solver.knapsack import solve
from allocator.storage import Option

OPTIONS = tuple(Option(bits, 0, 64, 0) for bits in (2, 3, 4))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    count = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    numbers = st.lists(st.integers(0, 20), min_size=sum(count), max_size=sum(count))
    unit = draw(st.sampled_from([1, 6, 1024]))
    size = np.array(draw(numbers), dtype=np.int64) * unit
    cost = np.array(draw(numbers), dtype=np.float64)
    return Problem(cost, size, np.append(0, np.cumsum(count)).astype(np.int64), 0)


def points(problem: Problem) -> list[tuple[float, int]]:
    """(cost, bytes) of every choice there is."""
    return [
        (float(problem.cost[taken].sum()), int(problem.size[taken].sum()))
        for choice in itertools.product(*(range(n) for n in np.diff(problem.start)))
        for taken in (problem.start[:-1] + np.array(choice),)
    ]


@settings(max_examples=200, deadline=None)
@given(problems(), st.integers(0, 60))
def test_the_smallest_budget_for_a_cost_is_exact(problem, max_cost):
    sizes = [size for cost, size in points(problem) if cost <= max_cost]
    if not sizes:
        with pytest.raises(UnreachableCostError) as caught:
            smallest_budget(problem, max_cost)
        assert caught.value.least_cost == pytest.approx(min(cost for cost, _ in points(problem)))
        return
    found = smallest_budget(problem, max_cost)
    assert found.proven
    assert found.solution.total_bytes == found.lower_bound_bytes == min(sizes)
    assert found.solution.cost <= max_cost * (1 + 1e-12)


@settings(max_examples=150, deadline=None)
@given(problems(), st.integers(0, 80))
def test_a_plan_is_optimal_exactly_over_its_range(problem, budget):
    smallest = min(size for _, size in points(problem))
    from_here = Problem(problem.cost, problem.size, problem.start, max(budget, smallest))
    solution = solve(from_here)
    span = optimal_range(from_here, solution)
    cheaper = [size for cost, size in points(problem) if cost < solution.cost - 1e-9]
    assert span.proven
    assert span.low_bytes == solution.total_bytes
    assert span.high_bytes == min(cheaper, default=None)


@pytest.mark.parametrize("seed", range(5))
def test_inverse_and_solver_agree_on_two_hundred_groups(seed):
    rng = np.random.default_rng(seed)
    size = rng.integers(10**5, 10**7, (200, 12))
    cost = rng.lognormal(0, 1, (200, 1)) / size * rng.lognormal(0, 0.1, size.shape)
    budget = int(np.quantile(size, 0.3, axis=1).sum())
    problem = Problem(cost.ravel(), size.ravel(), np.arange(201) * 12, budget)
    solution = solve(problem)
    inverse = smallest_budget(problem, solution.cost)
    assert inverse.proven
    assert inverse.solution.total_bytes == solution.total_bytes


def menu(costs: list[list[float]]) -> Menu:
    size = np.array([20, 30, 40], dtype=np.int64)
    layers = (
        LayerMenu(f"layers.{g}", 8, 8, 128, OPTIONS, size, np.array(cost), np.array(cost))
        for g, cost in enumerate(costs)
    )
    return Menu(tuple(layers), {"embed": 7})


def test_more_bytes_buy_the_best_upgrade_and_say_where():
    small = menu([[9.0, 5.0, 4.0], [8.0, 6.0, 1.0]])
    solution = solve(small.problem(47))
    bought = more_buys(small, solution, 47, 10)
    assert bought.cost_saved == pytest.approx(4.0)
    assert [(c.layer, c.before.bits, c.after.bits, c.bytes_added) for c in bought.changes] == [
        ("layers.0", 2, 3, 10)
    ]
    bought = more_buys(small, solution, 47, 30)
    assert [(c.layer, c.cost_saved) for c in bought.changes] == [("layers.1", 7.0), ("layers.0", 4.0)]


def test_bytes_that_buy_nothing_change_nothing():
    small = menu([[9.0, 5.0, 4.0]])
    bought = more_buys(small, solve(small.problem(47)), 47, 1)
    assert bought.cost_saved == 0
    assert bought.changes == ()


def test_what_more_buys_respects_constraints():
    small = menu([[9.0, 5.0, 4.0], [8.0, 6.0, 1.0]])
    bought = more_buys(small, solve(small.problem(47)), 47, 39, Constraints(ties=(("*",),)))
    assert {change.after.bits for change in bought.changes} == {3}


def test_uncertainty_that_changes_the_choice_gives_a_second_plan():
    small = menu([[9.0, 5.0, 4.0], [8.0, 6.0, 1.0]])
    upper = [np.array([9.0, 8.9, 8.8]), np.array([8.5, 6.1, 1.1])]
    plan = robust_plan(small, upper, 57)
    assert plan.robust is not None
    assert plan.nominal.choice.tolist() == [1, 0]
    assert plan.robust.choice.tolist() == [0, 1]
    assert plan.nominal_upper_cost == pytest.approx(17.4)
    assert plan.robust_upper_cost == pytest.approx(15.1)
    assert plan.robust_predicted_cost == pytest.approx(15.0)


def test_uncertainty_that_leaves_the_choice_gives_none():
    small = menu([[9.0, 5.0, 4.0], [8.0, 6.0, 1.0]])
    plan = robust_plan(small, [layer.cost * 1.1 for layer in small.layers], 57)
    assert plan.robust is None
    assert plan.nominal_upper_cost == pytest.approx(1.1 * plan.nominal.cost)


@pytest.mark.parametrize("upper", [np.array([1.0, 1.0, 1.0]), np.array([9.0, 9.0])])
def test_upper_costs_below_the_prediction_are_refused(upper):
    with pytest.raises(InvalidProblemError, match=r"'layers\.0' has upper costs"):
        robust_plan(menu([[9.0, 5.0, 4.0]]), [upper], 57)
