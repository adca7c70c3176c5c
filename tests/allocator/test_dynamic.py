"""The textbook dynamic programme: exact where buckets divide sizes, bounded elsewhere."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocator.errors import InfeasibleError, InvalidProblemError, ProblemTooLargeError
from allocator.problem import Problem
from allocator.solver.dynamic import solve_by_buckets
from allocator.solver.knapsack import solve


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    count = draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    numbers = st.lists(st.integers(0, 20), min_size=sum(count), max_size=sum(count))
    size = np.array(draw(numbers), dtype=np.int64)
    cost = np.array(draw(numbers), dtype=np.float64)
    return Problem(cost, size, np.append(0, np.cumsum(count)).astype(np.int64), draw(st.integers(0, 80)))


def optimum(problem: Problem) -> float | None:
    costs = [
        float(problem.cost[taken].sum())
        for choice in itertools.product(*(range(n) for n in np.diff(problem.start)))
        for taken in (problem.start[:-1] + np.array(choice),)
        if problem.size[taken].sum() <= problem.budget_bytes
    ]
    return min(costs, default=None)


@settings(max_examples=150, deadline=None)
@given(problems())
def test_buckets_of_one_byte_find_the_optimum(problem):
    best = optimum(problem)
    if best is None:
        with pytest.raises(InfeasibleError):
            solve_by_buckets(problem, 1)
        return
    found = solve_by_buckets(problem, 1)
    assert found.proven
    assert found.cost == pytest.approx(best)
    assert found.total_bytes <= problem.budget_bytes


@settings(max_examples=150, deadline=None)
@given(problems(), st.integers(2, 7))
def test_coarse_buckets_bracket_the_optimum(problem, bucket_bytes):
    best = optimum(problem)
    try:
        found = solve_by_buckets(problem, bucket_bytes)
    except InfeasibleError:
        return
    assert best is not None
    assert found.lower_bound - 1e-9 <= best <= found.cost + 1e-9
    assert found.total_bytes <= problem.budget_bytes
    assert not found.proven or found.cost == pytest.approx(best)


@pytest.mark.parametrize("seed", range(10))
def test_the_exact_solver_agrees_on_forty_groups(seed):
    rng = np.random.default_rng(seed)
    size = rng.integers(1, 60, (40, 12))
    cost = rng.lognormal(size=(40, 12)) / size
    start = np.arange(41) * 12
    problem = Problem(cost.ravel(), size.ravel() * 8, start, int(size.min(axis=1).sum() * 8 * 3))
    found = solve_by_buckets(problem, 8)
    exact = solve(problem)
    assert found.proven and exact.proven
    assert exact.cost == pytest.approx(found.cost, rel=1e-12)


def test_a_bucket_larger_than_the_budget_says_how_far():
    problem = Problem(np.array([1.0]), np.array([3]), np.array([0, 1]), 5)
    with pytest.raises(InfeasibleError, match="1 buckets of 8 bytes, 1 more"):
        solve_by_buckets(problem, 8)


def test_tables_beyond_the_cap_and_empty_buckets_are_refused():
    problem = Problem(np.array([1.0]), np.array([3]), np.array([0, 1]), 10**12)
    with pytest.raises(ProblemTooLargeError, match="1000000000001 buckets exceed the cap of 200000000"):
        solve_by_buckets(problem, 1)
    with pytest.raises(InvalidProblemError, match="0 bytes"):
        solve_by_buckets(problem, 0)
