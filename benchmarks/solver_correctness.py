"""Compares the exact solver with an independent reference on random and adversarial instances, at zero gap.

    python -m benchmarks.solver_correctness                       # 20,000 instances
    python -m benchmarks.solver_correctness --count 2000 --seed 7 --highs 10

The reference keeps every undominated (bytes, cost) sum, group after group, without a bound (Nemhauser &
Ullmann 1969): short, exact, sharing no code with the solver. All families but one have whole costs, whose
sums are exact, so optima must be equal, not close. `--highs N` sends every N-th instance to HiGHS as well.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from time import perf_counter

import numpy as np

from allocator.errors import InfeasibleError
from allocator.problem import Problem, Solution
from allocator.solver.knapsack import solve
from benchmarks.instances import random_instance

ROUNDING = 1e-12
"""Of the sums compared, relative to Σ |cost|; only where costs are not whole numbers."""


def reference_cost(problem: Problem) -> float | None:
    """The least cost within the budget, None where nothing fits."""
    size, cost = np.zeros(1, dtype=np.int64), np.zeros(1)
    for first, last in zip(problem.start[:-1], problem.start[1:], strict=True):
        size = np.add.outer(problem.size[first:last], size).ravel()
        cost = np.add.outer(problem.cost[first:last], cost).ravel()
        order = np.lexsort((cost, size))
        order = order[size[order] <= problem.budget_bytes]
        if not len(order):
            return None
        cost = cost[order]
        better = np.concatenate(([True], cost[1:] < np.minimum.accumulate(cost)[:-1]))
        size, cost = size[order][better], cost[better]
    return float(cost[-1])


def highs_cost(problem: Problem) -> float | None:
    """The same from HiGHS at zero gap; costs are centred and scaled, bytes stay whole."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    count = np.diff(problem.start)
    group = np.repeat(np.arange(len(count)), count)
    one = csr_array((np.ones(len(group)), (group, np.arange(len(group)))))
    constraints = [
        LinearConstraint(one, 1, 1),
        LinearConstraint(problem.size[None].astype(np.float64), -np.inf, problem.budget_bytes),
    ]
    scale = 1000 / max(1e-300, float(np.abs(problem.cost).max()))
    answer = milp(
        problem.cost * scale,
        integrality=np.ones(len(group)),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0},
    )
    if answer.x is None:
        return None
    bounds = zip(problem.start[:-1], problem.start[1:], strict=True)
    taken = np.array([first + answer.x[first:last].argmax() for first, last in bounds])
    return float(problem.cost[taken].sum()) if problem.size[taken].sum() <= problem.budget_bytes else None


def agree(one: float | None, other: float | None) -> bool:
    """Both infeasible, or equal to the last few bits."""
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=1e-12)


def solve_or_none(problem: Problem) -> Solution | None:
    """None where the solver says that nothing fits."""
    try:
        return solve(problem)
    except InfeasibleError:
        return None


def complaint(problem: Problem, solution: Solution | None, expected: float | None) -> str | None:
    """What is wrong with an answer, if anything. `expected` is the optimum, None where nothing fits."""
    if solution is None or expected is None:
        return (
            None if solution is None and expected is None else f"feasibility: {solution} against {expected}"
        )
    taken = problem.start[:-1] + solution.choice
    if (solution.choice < 0).any() or (taken >= problem.start[1:]).any():
        return "an option that its group does not have"
    total, rounding = float(problem.cost[taken].sum()), ROUNDING * float(np.abs(problem.cost).sum())
    spent = int(problem.size[taken].sum())
    if spent != solution.total_bytes or spent > problem.budget_bytes:
        return f"{solution.total_bytes} bytes stated, {spent} taken, {problem.budget_bytes} free"
    if total != solution.cost:
        return f"cost {solution.cost!r} reported, {total!r} taken"
    whole = bool((problem.cost == np.rint(problem.cost)).all())
    if solution.proven and abs(total - expected) > (0.0 if whole else rounding):
        return f"false proof: {total!r} against {expected!r}"
    if total < expected - rounding or solution.lower_bound > expected + rounding:
        return f"bound {solution.lower_bound!r}, cost {total!r}, against {expected!r}"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--highs", type=int, default=0, metavar="N", help="send every N-th instance to HiGHS too"
    )
    arguments = parser.parse_args()
    begin, families, unproven, wrong, disputed = perf_counter(), Counter[str](), Counter[str](), 0, 0
    for number in range(arguments.count):
        name, problem = random_instance(arguments.seed, number)
        solution, expected = solve_or_none(problem), reference_cost(problem)
        families[name] += 1
        unproven[name] += solution is not None and not solution.proven
        if fault := complaint(problem, solution, expected):
            wrong += 1
            print(f"MISMATCH {name} #{number}: {fault}")
        if arguments.highs and number % arguments.highs == 0:
            peer = highs_cost(problem)
            if not agree(peer, expected):
                disputed += 1
                print(f"HiGHS says {peer!r}, the reference {expected!r} ({name} #{number})")
    for name, count in families.items():
        print(f"{name:24} {count:6} instances, {unproven[name]} unproven")
    seconds = perf_counter() - begin
    print(f"{arguments.count} instances, {wrong} mismatches, {disputed} disputed, {seconds:.0f} s")


if __name__ == "__main__":
    main()
