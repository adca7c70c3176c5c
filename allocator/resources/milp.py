"""The allocation problem as an integer programme that HiGHS solves.

What lives here: the programme for one budget and for several resources. It is the peer that the own solvers
are compared with, and the answer where several resources are scarce at once.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from allocator.errors import InfeasibleError
from allocator.problem import Floats, Integers, Problem, Solution
from allocator.resources.problem import ResourceProblem, ResourceSolution, check_each_resource
from allocator.solver.highs import quiet_stdout

if TYPE_CHECKING:
    from scipy.sparse import csr_array

SCALED_SPREAD = 1e6
"""Costs are scaled to this total spread, which makes HiGHS's absolute gap of 1e-6 a relative one of 1e-12."""
RECHECKS = 8
"""Times the limits are tightened by what a rounded HiGHS solution exceeds them, before it is given up."""


def solve_milp(problem: Problem, *, time_limit_seconds: float = 60.0) -> Solution:
    """The same problem as `knapsack.solve`, by HiGHS. Raises `InfeasibleError`."""
    resources = ResourceProblem.of(problem)
    return solve_resources_milp(resources, time_limit_seconds=time_limit_seconds).of_first_resource()


def solve_resources_milp(problem: ResourceProblem, *, time_limit_seconds: float = 60.0) -> ResourceSolution:
    """The optimum over several resources and monotone chains, by HiGHS at a relative gap of zero.

    Uses are raw integers, counted from the least of their group, which every choice takes, and divided by their
    greatest common divisor, so that they are as small as they can be. HiGHS accepts solutions that
    exceed a row by its tolerance, so the integer uses are recomputed; where they exceed a limit, the
    programme is solved again with the limit lowered by the excess, and the bound stays that of the first.
    proven: solved to HiGHS's absolute gap of 1e-6 of costs scaled to a total spread of 1e6, limits respected
    in integers. prices (R,) are zero: an integer programme has none. Raises `InfeasibleError`.
    """
    check_each_resource(problem)
    programme = _Programme.of(problem)
    deadline = time.monotonic() + time_limit_seconds
    limit = problem.limit.copy()
    bound: float | None = None
    for _ in range(RECHECKS):
        choice, dual = programme.run(limit, max(0.1, deadline - time.monotonic()))
        bound = dual if bound is None else bound
        if choice is None:
            break
        excess = np.maximum(problem.used_by(choice) - problem.limit, 0)
        if not excess.any() and problem.keeps_levels(choice):
            return programme.solution(choice, bound)
        limit = limit - excess
    raise InfeasibleError(
        f"HiGHS found no choice within all of {', '.join(problem.names)}"
        + (" with the monotone or tied bits asked for" if problem.coupled else "")
        + "; raise a limit, drop a constraint or allow more time",
        int(np.minimum.reduceat(problem.use[0], problem.start[:-1]).sum()),
    )


@dataclass(frozen=True, slots=True)
class _Programme:
    """The scaled integer programme: cost (N,) and use (R, N) from zero in every group, least_use (R,) taken away,
    uses divided by divisor (R,)."""

    problem: ResourceProblem
    cost: Floats
    unit: float
    base: float
    use: Integers
    least_use: Integers
    divisor: Integers

    @classmethod
    def of(cls, problem: ResourceProblem) -> _Programme:
        least = np.minimum.reduceat(problem.cost, problem.start[:-1])
        most = np.maximum.reduceat(problem.cost, problem.start[:-1])
        unit = (float((most - least).sum()) or 1.0) / SCALED_SPREAD
        above = problem.cost - np.repeat(least, np.diff(problem.start))
        least_use = np.minimum.reduceat(problem.use, problem.start[:-1], axis=1)
        use = problem.use - np.repeat(least_use, np.diff(problem.start), axis=1)
        divisor = np.maximum(np.gcd.reduce(use, axis=1), 1)
        scaled = use // divisor[:, None]
        return cls(problem, above / unit, unit, float(least.sum()), scaled, least_use.sum(axis=1), divisor)

    def run(self, limit: Integers, seconds: float) -> tuple[Integers | None, float]:
        """The best choice (G,), if any, and the dual bound in the unit of the problem's costs."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        problem = self.problem
        rows = [LinearConstraint(self._one_each(), 1, 1)]
        rows.append(LinearConstraint(self.use, -np.inf, (limit - self.least_use) // self.divisor))
        for chains, most in ((problem.chains, np.inf), (problem.ties, 0.0)):
            if chains:
                rows.append(LinearConstraint(self._steps(chains), 0, most))
        with quiet_stdout():
            result = milp(
                self.cost,
                integrality=np.ones(len(self.cost), dtype=np.int64),
                bounds=Bounds(0, 1),
                constraints=rows,
                options={"mip_rel_gap": 0.0, "time_limit": seconds},
            )
        dual = result.mip_dual_bound
        bound = self.base + self.unit * (float(dual) if dual is not None and np.isfinite(dual) else 0.0)
        if result.x is None:
            return None, bound
        start = problem.start
        taken = [int(np.argmax(result.x[a:b])) for a, b in pairwise(start)]
        return np.array(taken, dtype=np.int64), bound

    def solution(self, choice: Integers, bound: float) -> ResourceSolution:
        cost = self.problem.cost_of(choice)
        bound = min(bound, cost)
        prices = np.zeros(len(self.problem.names))
        proven = cost - bound <= 2e-6 * self.unit + 1e-12 * abs(self.base)
        return ResourceSolution(
            choice, cost, self.problem.used_by(choice), bound, cost - bound, bool(proven), prices
        )

    def _one_each(self) -> csr_array[np.float64]:
        from scipy.sparse import csr_array

        options = len(self.cost)
        return csr_array((np.ones(options), np.arange(options), self.problem.start), dtype=np.float64)

    def _steps(self, chains: tuple[Integers, ...]) -> csr_array[np.float64]:
        """Rows (level of a group) − (level of the next along its chain)."""
        from scipy.sparse import csr_array

        assert self.problem.level is not None
        start, level = self.problem.start, self.problem.level
        row, column, value = [], [], []
        steps = [pair for chain in chains for pair in pairwise(chain)]
        for index, (before, after) in enumerate(steps):
            for group, sign in ((before, 1.0), (after, -1.0)):
                options = np.arange(start[group], start[group + 1])
                column.append(options)
                row.append(np.full(len(options), index))
                value.append(sign * level[options])
        if not steps:
            return csr_array((1, len(self.cost)), dtype=np.float64)
        shape = (len(steps), len(self.cost))
        return csr_array((np.concatenate(value), (np.concatenate(row), np.concatenate(column))), shape=shape)
