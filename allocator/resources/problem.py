"""Several resources at once: bytes on disk, bytes read per token, memory per device, latency from a table.

What lives here: `ResourceProblem` and `ResourceSolution`. The Lagrangian bound is `dual.py`, the search for a
feasible choice `lagrangian.py`, the exact integer programme `convex.py`.

Shapes: G groups, N options over all groups, R resources.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from allocator.errors import InfeasibleError, InvalidProblemError
from allocator.problem import Floats, Integers, Problem, Solution


@dataclass(frozen=True, slots=True)
class ResourceProblem:
    """Choose one option per group, minimise Σ cost, Σ use[r] ≤ limit[r] for every resource r.

    cost (N,) float64; use (R, N) int64 in whole units (bytes, nanoseconds); start (G+1,) int64; limit (R,)
    int64; names of the resources, the first is the checkpoint's bytes. chains: group indices along which
    `level` (N,) int64 (bits) never rises; ties: group indices of equal level. No group is in two of them.
    """

    cost: Floats
    use: Integers
    start: Integers
    limit: Integers
    names: tuple[str, ...]
    chains: tuple[Integers, ...] = ()
    ties: tuple[Integers, ...] = ()
    level: Integers | None = None

    def __post_init__(self) -> None:
        expected = len(self.names), len(self.cost)
        if self.use.shape != expected or self.limit.shape != expected[:1]:
            raise InvalidProblemError(
                f"{len(self.names)} resources need use of shape {expected} and as many limits, "
                f"got {self.use.shape} and {self.limit.shape}"
            )
        if self.coupled and (self.level is None or self.level.shape != self.cost.shape):
            raise InvalidProblemError("monotone chains and ties need the level of every option")
        groups = np.concatenate([np.empty(0, dtype=np.int64), *self.coupled])
        if len(np.unique(groups)) < len(groups):
            raise InvalidProblemError("a group is in two chains or ties; give each group to one of them")
        for used in self.use:
            Problem(self.cost, used, self.start, 0)

    @classmethod
    def of(cls, problem: Problem) -> ResourceProblem:
        """The same problem with bytes as its only resource."""
        limit = np.array([problem.budget_bytes], dtype=np.int64)
        return cls(problem.cost, problem.size[None, :], problem.start, limit, ("bytes",))

    def with_resource(self, name: str, use: Integers, limit: int) -> ResourceProblem:
        """One more resource of which option i takes `use[i]`, (N,) whole units."""
        used = np.vstack([self.use, np.asarray(use)[None, :]])
        limits = np.append(self.limit, limit).astype(np.int64)
        return replace(self, use=used, limit=limits, names=(*self.names, name))

    @property
    def coupled(self) -> tuple[Integers, ...]:
        return (*self.chains, *self.ties)

    @property
    def group_count(self) -> int:
        return len(self.start) - 1

    def cost_of(self, choice: Integers) -> float:
        return float(self.cost[self.start[:-1] + choice].sum())

    def used_by(self, choice: Integers) -> Integers:
        """(R,) int64, exact."""
        return np.asarray(self.use[:, self.start[:-1] + choice].sum(axis=1), dtype=np.int64)

    def keeps_levels(self, choice: Integers) -> bool:
        """Whether every chain is monotone and every tie equal."""
        if self.level is None:
            return True
        level = self.level[self.start[:-1] + choice]
        falling = all(bool((np.diff(level[chain]) <= 0).all()) for chain in self.chains)
        return falling and all(bool((level[tie] == level[tie[0]]).all()) for tie in self.ties)


@dataclass(frozen=True, slots=True)
class ResourceSolution:
    """choice (G,) int64; used (R,) int64; lower_bound: no feasible choice costs less; gap = cost −
    lower_bound; proven: the gap is nothing but rounding; prices (R,): cost saved per further unit of each
    resource."""

    choice: Integers
    cost: float
    used: Integers
    lower_bound: float
    gap: float
    proven: bool
    prices: Floats

    def of_first_resource(self) -> Solution:
        """The same solution as of a problem that has the first resource alone."""
        return Solution(
            self.choice,
            self.cost,
            int(self.used[0]),
            self.lower_bound,
            self.gap,
            self.proven,
            float(self.prices[0]),
        )


def check_each_resource(problem: ResourceProblem) -> None:
    """Raises `InfeasibleError` for the first resource whose smallest use exceeds its limit."""
    for r, name in enumerate(problem.names):
        least = least_use(problem, r)
        if least > problem.limit[r]:
            raise InfeasibleError(
                f"{name} needs at least {least}, {least - int(problem.limit[r])} more than its limit; "
                "raise it or offer smaller options",
                least if r == 0 else least_use(problem, 0),
            )


def least_use(problem: ResourceProblem, r: int) -> int:
    return int(np.minimum.reduceat(problem.use[r], problem.start[:-1]).sum())
