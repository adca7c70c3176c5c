"""Several resources: a feasible choice and a bound that no feasible choice beats."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from allocator.errors import InfeasibleError, InvalidProblemError
from allocator.problem import Problem
from allocator.resources.lagrangian import solve_resources
from allocator.resources.milp import solve_resources_milp
from allocator.resources.problem import ResourceProblem


@st.composite
def problems(draw: st.DrawFn, resources: int | None = None) -> ResourceProblem:
    count = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    options = sum(count)
    rows = resources or draw(st.integers(1, 3))
    small = st.lists(st.integers(0, 9), min_size=options, max_size=options)
    use = np.array([draw(small) for _ in range(rows)], dtype=np.int64)
    limit = np.array([draw(st.integers(0, 6 * len(count))) for _ in range(rows)], dtype=np.int64)
    cost = np.array(draw(small), dtype=np.float64)
    start = np.append(0, np.cumsum(count)).astype(np.int64)
    return ResourceProblem(cost, use, start, limit, tuple(f"r{r}" for r in range(rows)))


def with_levels(problem: ResourceProblem, chain: bool) -> ResourceProblem:
    level = np.arange(len(problem.cost)) % 3
    groups = (np.arange(problem.group_count),)
    return ResourceProblem(
        problem.cost,
        problem.use,
        problem.start,
        problem.limit,
        problem.names,
        chains=groups if chain else (),
        ties=() if chain else groups,
        level=level,
    )


def optimum(problem: ResourceProblem) -> float | None:
    best = None
    for choice in itertools.product(*(range(n) for n in np.diff(problem.start))):
        taken = np.array(choice)
        fits = (problem.used_by(taken) <= problem.limit).all() and problem.keeps_levels(taken)
        if fits and (best is None or problem.cost_of(taken) < best):
            best = problem.cost_of(taken)
    return best


def check_lagrangian(problem: ResourceProblem) -> None:
    best = optimum(problem)
    if best is None:
        with pytest.raises(InfeasibleError):
            solve_resources(problem)
        return
    try:
        found = solve_resources(problem)
    except InfeasibleError as error:
        assert "was found" in str(error)
        return
    assert (problem.used_by(found.choice) <= problem.limit).all()
    assert problem.keeps_levels(found.choice)
    assert found.cost == pytest.approx(problem.cost_of(found.choice))
    assert found.lower_bound <= best + 1e-9
    assert found.cost >= best - 1e-9
    assert found.gap == pytest.approx(found.cost - found.lower_bound)
    assert not found.proven or found.cost == pytest.approx(best)
    assert (found.prices >= 0).all()


def check_milp(problem: ResourceProblem) -> None:
    best = optimum(problem)
    if best is None:
        with pytest.raises(InfeasibleError):
            solve_resources_milp(problem)
        return
    found = solve_resources_milp(problem)
    assert found.proven
    assert found.cost == pytest.approx(best)
    assert (problem.used_by(found.choice) <= problem.limit).all()
    assert problem.keeps_levels(found.choice)


@settings(max_examples=150, deadline=None)
@given(problems())
def test_the_bound_is_below_and_the_choice_within_every_limit(problem):
    check_lagrangian(problem)


@settings(max_examples=100, deadline=None)
@given(problems(), st.booleans())
def test_chains_and_ties_of_levels_hold_and_are_part_of_the_bound(problem, chain):
    check_lagrangian(with_levels(problem, chain))


@settings(max_examples=80, deadline=None)
@given(problems())
def test_the_integer_programme_is_exact(problem):
    check_milp(problem)


@settings(max_examples=80, deadline=None)
@given(problems(), st.booleans())
def test_the_integer_programme_keeps_chains_and_ties(problem, chain):
    check_milp(with_levels(problem, chain))


@settings(max_examples=60, deadline=None)
@given(problems(resources=1))
def test_at_the_dual_optimum_prices_reproduce_the_bound(problem):
    assume(optimum(problem) is not None)
    found = solve_resources(problem)
    priced = problem.cost + found.prices @ problem.use
    dual = np.minimum.reduceat(priced, problem.start[:-1]).sum() - found.prices @ problem.limit
    assert found.lower_bound == pytest.approx(min(dual, found.cost), abs=1e-9)


def model_sized(seed: int, groups: int = 560, options: int = 35) -> ResourceProblem:
    """Costs that fall with bytes, noisy; a latency that mostly grows with bytes but not in step."""
    rng = np.random.default_rng(seed)
    bits, rank = np.repeat(np.arange(2, 9), 5), np.tile([0, 16, 32, 64, 128], 7)
    weights = rng.choice([2**20, 2**23, 2**25], groups)
    size = (weights[:, None] * bits // 8 + 1024 * rank).astype(np.int64)
    cost = rng.lognormal(0, 1.2, (groups, 1)) * 2.0 ** (-1.9 * bits) / (1 + rank / 100) ** 0.3
    cost = cost * rng.lognormal(0, 0.05, cost.shape)
    speed = np.array([0.30, 0.42, 0.45, 0.70, 0.75, 0.95, 0.90])
    latency = (weights[:, None] * (speed[bits - 2] + 0.004 * rank) / 1000).astype(np.int64)
    start = np.arange(groups + 1) * options
    middle = np.array([size[:, 15].sum(), int(latency[:, 15].sum() * 0.98)])
    return ResourceProblem(
        cost.ravel(), np.array([size.ravel(), latency.ravel()]), start, middle, ("bytes", "latency")
    )


@pytest.mark.parametrize("seed", range(5))
def test_two_resources_of_a_560_layer_model_are_known_to_two_parts_in_ten_thousand(seed):
    found = solve_resources(model_sized(seed))
    assert found.gap <= 2e-4 * found.cost
    assert (found.prices > 0).all()


def test_lagrangian_and_integer_programme_agree_on_a_middling_problem():
    problem = model_sized(1, groups=30)
    quick, exact = solve_resources(problem), solve_resources_milp(problem)
    assert exact.proven
    assert quick.lower_bound <= exact.cost <= quick.cost


def test_an_unreachable_limit_names_the_resource_and_the_distance():
    problem = ResourceProblem.of(
        Problem(np.array([1.0, 2.0]), np.array([5, 4]), np.array([0, 2]), 9)
    ).with_resource("latency", np.array([7, 6]), 5)
    for solver in (solve_resources, solve_resources_milp):
        with pytest.raises(InfeasibleError, match="latency needs at least 6, 1 more than its limit"):
            solver(problem)


def test_limits_that_exclude_each_other_are_infeasible_for_the_integer_programme():
    problem = ResourceProblem.of(
        Problem(np.array([1.0, 2.0]), np.array([5, 4]), np.array([0, 2]), 4)
    ).with_resource("latency", np.array([5, 6]), 5)
    with pytest.raises(InfeasibleError, match="no choice within all of bytes, latency"):
        solve_resources_milp(problem)


@pytest.mark.parametrize(
    "change",
    [
        {"use": np.zeros((2, 2), dtype=np.int64)},
        {"limit": np.zeros(2, dtype=np.int64)},
        {"use": np.array([[-1, 0]])},
        {"use": np.array([[0.5, 1.0]])},
        {"cost": np.array([np.nan, 1.0])},
        {"chains": (np.array([0]),)},
        {"chains": (np.array([0]),), "ties": (np.array([0]),), "level": np.zeros(2, dtype=np.int64)},
    ],
)
def test_a_malformed_problem_is_refused(change):
    good = {
        "cost": np.array([1.0, 2.0]),
        "use": np.array([[2, 1]]),
        "start": np.array([0, 2]),
        "limit": np.array([2]),
        "names": ("bytes",),
    }
    with pytest.raises(InvalidProblemError):
        ResourceProblem(**{**good, **change})
