"""An independent check of a solver's answer.

What lives here: `verify`, which recomputes everything it says from the problem and the choice alone and
shares no code with the solvers.

For any λ ≥ 0, Σ over groups of min(cost + λ·bytes) − λ·budget is a lower bound on the cost of every feasible
choice (weak duality): one pass over the options checks it, whoever proposed λ. The bound of an integer
optimum is mostly a little lower than its cost. That remainder, `unexplained_gap`, is what a proof by
enumeration claims beyond duality; it can be refuted here, by a better choice one move away, but not
confirmed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from allocator.problem import Integers, Problem, Solution

ROUNDING = 8 * float(np.finfo(np.float64).eps)
"""Of sums of float64, relative to the sum of magnitudes."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """What was found.

    total_bytes, cost: of the choice, recomputed. feasible: every group has one of its own options and the
    bytes fit. lower_bound: the Lagrangian bound at the shadow price, rounded down. gap = cost − lower_bound.
    unexplained_gap: the part of the claimed lower bound above that, which rests on the solver's search alone.
    faults: one sentence for each claim that does not hold.
    """

    total_bytes: int
    cost: float
    feasible: bool
    lower_bound: float
    gap: float
    unexplained_gap: float
    faults: tuple[str, ...]

    @property
    def holds(self) -> bool:
        return not self.faults


def verify(problem: Problem, solution: Solution) -> Certificate:
    """Recomputes bytes, feasibility, cost and the Lagrangian bound; lists the claims of `solution` they
    contradict."""
    if fault := _malformed_choice(problem, solution.choice):
        return Certificate(0, math.nan, False, -math.inf, math.inf, math.inf, (fault,))
    taken = problem.start[:-1] + solution.choice
    total_bytes = int(problem.size[taken].sum())
    cost = math.fsum(problem.cost[taken])
    rounding = ROUNDING * math.fsum(np.abs(problem.cost[taken]))
    feasible = total_bytes <= problem.budget_bytes
    bound = lagrangian_bound(problem, solution.shadow_price)
    faults = []
    if not feasible:
        faults.append(f"the choice takes {total_bytes:,} bytes, over the budget of {problem.budget_bytes:,}")
    if total_bytes != solution.total_bytes:
        faults.append(f"the choice takes {total_bytes:,} bytes, not the {solution.total_bytes:,} stated")
    if not abs(cost - solution.cost) <= rounding:
        faults.append(f"the choice costs {cost!r}, not the {solution.cost!r} stated")
    if not solution.gap >= 0 or not abs(solution.cost - solution.lower_bound - solution.gap) <= rounding:
        faults.append(f"the stated gap {solution.gap!r} is not the stated cost less the stated bound")
    if solution.proven and solution.gap > rounding:
        faults.append(f"the choice is called optimal with a gap of {solution.gap!r}")
    if solution.lower_bound > cost + rounding:
        faults.append(f"the stated bound {solution.lower_bound!r} exceeds the cost {cost!r} of a choice")
    if feasible and (better := _better_neighbour(problem, taken, solution.lower_bound - cost - 2 * rounding)):
        faults.append(f"the stated bound {solution.lower_bound!r} is beaten by moving {better}")
    return Certificate(
        total_bytes=total_bytes,
        cost=cost,
        feasible=feasible,
        lower_bound=bound,
        gap=cost - bound,
        unexplained_gap=max(0.0, solution.lower_bound - bound),
        faults=tuple(faults),
    )


def lagrangian_bound(problem: Problem, multiplier: float) -> float:
    """No feasible choice costs less, by weak duality; −inf for a negative or non-finite multiplier."""
    if not (math.isfinite(multiplier) and multiplier >= 0):
        return -math.inf
    least = np.minimum.reduceat(problem.cost + multiplier * problem.size, problem.start[:-1])
    spent = multiplier * problem.budget_bytes
    rounding = ROUNDING * (math.fsum(np.abs(least)) + abs(spent))
    return math.fsum(least) - spent - rounding


def _malformed_choice(problem: Problem, choice: Integers) -> str | None:
    count = np.diff(problem.start)
    if choice.shape != count.shape or not np.issubdtype(choice.dtype, np.integer):
        return f"the choice has shape {choice.shape} and type {choice.dtype}, not {len(count)} integers"
    wrong = np.flatnonzero((choice < 0) | (choice >= count))
    if len(wrong):
        return f"group {wrong[0]} takes option {choice[wrong[0]]} of {count[wrong[0]]}"
    return None


def _better_neighbour(problem: Problem, taken: Integers, allowed: float) -> str | None:
    """A single move that fits and changes the cost by less than `allowed`."""
    count = np.diff(problem.start)
    cost_more = problem.cost - np.repeat(problem.cost[taken], count)
    bytes_more = problem.size - np.repeat(problem.size[taken], count)
    fits = bytes_more <= problem.budget_bytes - problem.size[taken].sum()
    cost_more = np.where(fits, cost_more, np.inf)
    best = int(cost_more.argmin())
    if cost_more[best] >= allowed:
        return None
    group = int(np.searchsorted(problem.start, best, side="right")) - 1
    return f"group {group} to option {best - int(problem.start[group])}"
