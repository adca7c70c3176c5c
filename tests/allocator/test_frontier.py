"""The frontier lists every breakpoint of the linear relaxation, and each is an optimum of its own budget."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocator.errors import InfeasibleError
from allocator.problem import Problem
from allocator.solver.frontier import Frontier, frontier
from allocator.solver.knapsack import solve
from benchmarks.instances import FAMILIES, model_instance, random_instance

instances = st.builds(lambda number: random_instance(11, number)[1], st.integers(0, 10_000))


def at_budget(problem: Problem, budget_bytes: int) -> Problem:
    return Problem(problem.cost, problem.size, problem.start, budget_bytes)


def hull_vertices(size: np.ndarray, cost: np.ndarray) -> int:
    """Andrew's monotone chain, for the descending part of one group's lower hull."""
    chain: list[tuple[int, float]] = []
    for point in sorted(zip(size.tolist(), cost.tolist(), strict=True)):
        if chain and point[1] >= chain[-1][1]:
            continue
        while len(chain) > 1:
            (x0, y0), (x1, y1) = chain[-2:]
            if (y1 - y0) * (point[0] - x1) < (point[1] - y1) * (x1 - x0):
                break
            chain.pop()
        chain.append(point)
    return len(chain)


@given(instances)
@settings(deadline=None, max_examples=200)
def test_bytes_ascend_cost_descends_and_the_price_falls(problem: Problem) -> None:
    line = frontier(problem)
    assert (np.diff(line.total_bytes) > 0).all()
    assert (np.diff(line.cost) < 0).all()
    price = line.shadow_price()
    assert (price[1:] <= price[:-1] * (1 + 1e-9) + 1e-9).all()


@given(instances, st.floats(0, 1))
@settings(deadline=None, max_examples=200)
def test_the_choice_at_a_breakpoint_has_its_bytes_and_cost(problem: Problem, where: float) -> None:
    line = frontier(problem)
    breakpoint = int(where * (len(line) - 1))
    taken = problem.start[:-1] + line.choice(breakpoint)
    assert (taken < problem.start[1:]).all()
    assert problem.size[taken].sum() == line.total_bytes[breakpoint]
    assert problem.cost[taken].sum() == pytest.approx(line.cost[breakpoint], rel=1e-9)


@given(instances, st.floats(0, 1))
@settings(deadline=None, max_examples=200)
def test_a_breakpoint_is_the_proven_optimum_of_its_budget(problem: Problem, where: float) -> None:
    line = frontier(problem)
    breakpoint = int(where * (len(line) - 1))
    solution = solve(at_budget(problem, int(line.total_bytes[breakpoint])))
    assert solution.proven
    assert solution.cost == pytest.approx(line.cost[breakpoint], rel=1e-9)


@given(instances)
@settings(deadline=None, max_examples=200)
def test_every_vertex_of_every_hull_appears(problem: Problem) -> None:
    bounds = zip(problem.start[:-1], problem.start[1:], strict=True)
    vertices = [hull_vertices(problem.size[first:last], problem.cost[first:last]) for first, last in bounds]
    assert len(frontier(problem)) == 1 + sum(vertices) - len(vertices)


def test_the_ends_are_the_smallest_and_the_cheapest_choice() -> None:
    problem = model_instance("Qwen2-1.5B", 119, seed=0)
    line = frontier(problem)
    assert line.total_bytes[0] == np.minimum.reduceat(problem.size, problem.start[:-1]).sum()
    assert line.cost[-1] == pytest.approx(np.minimum.reduceat(problem.cost, problem.start[:-1]).sum())


def test_between_breakpoints_the_exact_optimum_lies_between_their_costs() -> None:
    problem = model_instance("Qwen2-1.5B", 35, seed=1)
    line = frontier(problem)
    k = line.within(problem.budget_bytes)
    assert line.total_bytes[k] <= problem.budget_bytes < line.total_bytes[k + 1]
    assert line.cost[k + 1] <= solve(problem).cost <= line.cost[k]


def test_a_budget_below_the_first_breakpoint_is_infeasible() -> None:
    line = frontier(model_instance("Qwen2-1.5B", 35, seed=1))
    least = int(line.total_bytes[0])
    assert line.within(least) == 0
    with pytest.raises(InfeasibleError) as failure:
        line.within(least - 1)
    assert failure.value.smallest_bytes == least


def test_a_breakpoint_outside_the_frontier_is_an_index_error() -> None:
    line = frontier(FAMILIES["one option"](np.random.default_rng(0)))
    with pytest.raises(IndexError, match="outside"):
        line.choice(len(line))


def test_groups_of_one_option_leave_a_single_breakpoint() -> None:
    line: Frontier = frontier(Problem(np.array([2.0, 3.0]), np.array([4, 5]), np.array([0, 1, 2]), 0))
    assert (len(line), line.total_bytes.tolist(), line.cost.tolist()) == (1, [9], [5.0])
