"""`verify` trusts nothing: every claim of a solution is recomputed."""

from dataclasses import replace

import numpy as np
import pytest

from allocator.problem import Problem, Solution
from allocator.solver.certificate import lagrangian_bound, verify
from allocator.solver.knapsack import solve
from benchmarks.instances import model_instance


@pytest.fixture(scope="module")
def problem() -> Problem:
    return model_instance("Qwen2-1.5B", 35, seed=3)


@pytest.fixture(scope="module")
def solution(problem: Problem) -> Solution:
    return solve(problem)


def test_an_honest_answer_holds(problem: Problem, solution: Solution) -> None:
    certificate = verify(problem, solution)
    assert certificate.holds, certificate.faults
    assert certificate.feasible
    assert certificate.total_bytes == solution.total_bytes <= problem.budget_bytes
    assert certificate.lower_bound <= certificate.cost
    assert certificate.gap / certificate.cost < 1e-3


def test_the_bound_at_the_shadow_price_is_the_best_of_all_multipliers(
    problem: Problem, solution: Solution
) -> None:
    best = lagrangian_bound(problem, solution.shadow_price)
    others = [
        lagrangian_bound(problem, solution.shadow_price * factor) for factor in (0.0, 0.5, 0.99, 1.01, 2.0)
    ]
    assert all(other < best <= solution.cost for other in others)


def test_a_negative_multiplier_bounds_nothing(problem: Problem) -> None:
    assert lagrangian_bound(problem, -1.0) == -np.inf
    assert lagrangian_bound(problem, np.nan) == -np.inf


def test_what_duality_cannot_confirm_is_reported(problem: Problem, solution: Solution) -> None:
    certificate = verify(problem, solution)
    assert certificate.unexplained_gap == pytest.approx(solution.lower_bound - certificate.lower_bound)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"total_bytes": 1}, "bytes, not the 1 stated"),
        ({"cost": 0.0}, "not the 0.0 stated"),
        ({"gap": -1.0}, "is not the stated cost less the stated bound"),
        ({"lower_bound": 1e9}, "exceeds the cost"),
        ({"lower_bound": 0.0}, "is not the stated cost less the stated bound"),
    ],
)
def test_a_false_claim_is_named(
    problem: Problem, solution: Solution, change: dict[str, float], complaint: str
) -> None:
    certificate = verify(problem, replace(solution, **change))
    assert not certificate.holds
    assert complaint in " ".join(certificate.faults)


def test_optimality_with_a_gap_is_a_contradiction(problem: Problem, solution: Solution) -> None:
    claimed = replace(solution, gap=0.5, lower_bound=solution.cost - 0.5)
    assert "called optimal with a gap" in " ".join(verify(problem, claimed).faults)


def test_a_choice_over_the_budget_is_infeasible(problem: Problem, solution: Solution) -> None:
    tight = Problem(problem.cost, problem.size, problem.start, solution.total_bytes - 1)
    certificate = verify(tight, solution)
    assert not certificate.feasible
    assert "over the budget" in certificate.faults[0]


def test_a_worse_choice_called_optimal_is_refuted_by_a_better_one() -> None:
    problem = Problem(np.array([5.0, 1.0]), np.array([1, 2]), np.array([0, 2]), 2)
    claimed = Solution(np.array([0]), 5.0, 1, 5.0, 0.0, True, 0.0)
    assert "beaten by moving group 0 to option 1" in verify(problem, claimed).faults[0]


@pytest.mark.parametrize("choice", [np.array([0, 0]), np.array([2]), np.array([-1]), np.array([0.0])])
def test_a_choice_of_options_that_do_not_exist_is_refused(choice: np.ndarray) -> None:
    problem = Problem(np.array([5.0, 1.0]), np.array([1, 2]), np.array([0, 2]), 2)
    certificate = verify(problem, Solution(choice, 5.0, 1, 5.0, 0.0, True, 0.0))
    assert not certificate.feasible
    assert not certificate.holds
