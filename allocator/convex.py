"""General-purpose solvers: the integer programme as method of record, and the continuous relaxation of the
curves.

What lives here: `solve_milp` (HiGHS through scipy, for any number of resources and monotone chains) and
`relax_curves` (cvxpy + CLARABEL, straight from the fitted error curves, independent of any grid of options),
with `round_to_menu` back to options. The fast exact solver of one resource is `knapsack.py`.

The curve E(b, r) = c·2^(−βb)·(1+r/r₀)^(−δ)·(1−r/n)^η is not convex as it stands: log E has the convex term
−δ·log(1+r/r₀) and the concave term η·log(1−r/n). On ranks 0..R the concave term lies above its chord
r·η·log(1−R/n)/R, so E with the chord instead is a convex under-estimator (the exponential of a convex
function), exact at r = 0 and r = R. The reported bound doesn't rest on it, nor on the cone solver's
tolerances: it is the Lagrangian dual of the true curves at the cone solver's multiplier, minimised over bits
in closed form and over every whole rank.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from allocator.errors import AllocationError, InfeasibleError, InvalidProblemError
from allocator.highs import quiet_stdout
from allocator.knapsack import solve
from allocator.problem import Floats, Integers, Menu, Problem, Solution
from allocator.resources import ResourceProblem, ResourceSolution, check_each_resource
from allocator.storage import FACTOR_GROUP_SIZE, KEEP_BITS, Option
from allocator.ties import Mask

if TYPE_CHECKING:
    from scipy.sparse import csr_array

SCALED_SPREAD = 1e6
"""Costs are scaled to this total spread, which makes HiGHS's absolute gap of 1e-6 a relative one of 1e-12."""
RECHECKS = 8
"""Times the limits are tightened by what a rounded HiGHS solution exceeds them, before it is given up."""


def solve_milp(problem: Problem, *, time_limit_seconds: float = 60.0) -> Solution:
    """The same problem as `knapsack.solve`, by HiGHS. Raises `InfeasibleError`."""
    found = solve_resources_milp(ResourceProblem.of(problem), time_limit_seconds=time_limit_seconds)
    return Solution(
        found.choice,
        found.cost,
        int(found.used[0]),
        found.lower_bound,
        found.gap,
        found.proven,
        float(found.prices[0]),
    )


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


@dataclass(frozen=True, slots=True)
class ErrorCurve:
    """The fitted error of one layer: E(b, r) = scale·2^(−bits_decay·b)·(1+r/rank_scale)^(−rank_decay)·
    (1−r/n)^rank_edge, n the smaller of rows and columns; its cost is sensitivity·E (nats per token)."""

    name: str
    rows: int
    columns: int
    scale: float
    bits_decay: float
    rank_scale: float
    rank_decay: float
    rank_edge: float
    sensitivity: float

    def __post_init__(self) -> None:
        positive = (self.scale, self.bits_decay, self.rank_scale, self.sensitivity)
        if not all(np.isfinite(value) and value > 0 for value in positive):
            raise InvalidProblemError(f"curve of {self.name!r} needs finite, positive parameters, got {self}")
        if not (np.isfinite(self.rank_decay) and self.rank_decay >= 0):
            raise InvalidProblemError(
                f"curve of {self.name!r} has rank_decay {self.rank_decay}; it can't be negative"
            )
        if not (np.isfinite(self.rank_edge) and self.rank_edge >= 0):
            raise InvalidProblemError(
                f"curve of {self.name!r} has rank_edge {self.rank_edge}; it can't be negative"
            )


@dataclass(frozen=True, slots=True)
class CurveLimits:
    """The continuous choices: bits in [min_bits, max_bits], ranks up to `max_rank_share` of the smaller
    dimension.

    group_size is the largest and factor_bits the smallest that count, so that no option takes fewer bytes.
    """

    min_bits: float = 2.0
    max_bits: float = 8.0
    max_rank_share: float = 0.5
    group_size: int = 128
    factor_bits: int = 4


@dataclass(frozen=True, slots=True)
class CurveRelaxation:
    """bits, rank (G,) float64, continuous; cost: the under-estimated cost there (nats per token);
    lower_bound: no bits and whole ranks within the limits and the budget cost less on the true curves;
    shadow_price: nats per byte."""

    bits: Floats
    rank: Floats
    cost: float
    lower_bound: float
    shadow_price: float


@dataclass(frozen=True, slots=True)
class _CurveTable:
    """The curves as arrays (G,), and their bytes as base + per_bit·b + per_rank·r, which no real layer
    undercuts."""

    log_scale: Floats
    bits_slope: Floats
    rank_scale: Floats
    rank_decay: Floats
    rank_edge: Floats
    smaller: Floats
    max_rank: Floats
    base: Floats
    per_bit: Floats
    per_rank: Floats

    @classmethod
    def of(cls, curves: Sequence[ErrorCurve], limits: CurveLimits) -> _CurveTable:
        rows, columns = _column(c.rows for c in curves), _column(c.columns for c in curves)
        smaller = np.minimum(rows, columns)
        groups = rows * np.ceil(columns / limits.group_size)
        factor_share = limits.factor_bits / 8
        if limits.factor_bits < KEEP_BITS:
            factor_share += (2 + limits.factor_bits / 8) / FACTOR_GROUP_SIZE
        return cls(
            log_scale=np.log(_column(c.scale * c.sensitivity for c in curves)),
            bits_slope=np.log(2) * _column(c.bits_decay for c in curves),
            rank_scale=_column(c.rank_scale for c in curves),
            rank_decay=_column(c.rank_decay for c in curves),
            rank_edge=_column(c.rank_edge for c in curves),
            smaller=smaller,
            max_rank=np.maximum(1.0, np.minimum(np.floor(limits.max_rank_share * smaller), smaller - 1)),
            base=2 * groups,
            per_bit=(rows * columns + groups) / 8,
            per_rank=(rows + columns) * factor_share,
        )

    def chord(self) -> Floats:
        """Slope of the chord that replaces rank_edge·log(1 − r/n), (G,)."""
        return np.asarray(self.rank_edge * np.log1p(-self.max_rank / self.smaller) / self.max_rank)

    def dual(self, price: float, budget_bytes: int, limits: CurveLimits) -> float:
        """The Lagrangian dual of the true curves at `price`: exact in bits, over every whole rank."""
        total = -price * budget_bytes
        for g in range(len(self.base)):
            rank = np.arange(self.max_rank[g] + 1)
            log_error = self.log_scale[g] - self.rank_decay[g] * np.log1p(rank / self.rank_scale[g])
            log_error += self.rank_edge[g] * np.log1p(-rank / self.smaller[g])
            turning = np.log(max(price, 1e-300) * self.per_bit[g] / self.bits_slope[g])
            bits = np.clip((log_error - turning) / self.bits_slope[g], limits.min_bits, limits.max_bits)
            taken = self.base[g] + self.per_bit[g] * bits + self.per_rank[g] * rank
            total += float((np.exp(log_error - self.bits_slope[g] * bits) + price * taken).min())
        return total


def relax_curves(
    curves: Sequence[ErrorCurve], budget_bytes: int, limits: CurveLimits | None = None
) -> CurveRelaxation:
    """Continuous bits and ranks of least cost within `budget_bytes` for the layers alone, by CLARABEL.

    Raises `InfeasibleError` where min_bits everywhere exceed the budget, `AllocationError` where CLARABEL
    fails.
    """
    import cvxpy

    cp: Any = cvxpy  # its annotations leave out the atoms
    limits = limits or CurveLimits()
    table = _CurveTable.of(curves, limits)
    least = int(np.ceil((table.base + table.per_bit * limits.min_bits).sum()))
    if least > budget_bytes:
        raise InfeasibleError(
            f"{limits.min_bits:g} bits everywhere take {least} bytes, {least - budget_bytes} more than the "
            "budget; raise it or lower min_bits",
            least,
        )
    unit = float(
        np.exp(np.mean(table.log_scale - table.bits_slope * (limits.min_bits + limits.max_bits) / 2))
    )
    bits, share = cp.Variable(len(curves)), cp.Variable(len(curves))
    decay = cp.multiply(table.rank_decay, cp.log(1 + cp.multiply(table.max_rank / table.rank_scale, share)))
    linear = table.log_scale - np.log(unit) - cp.multiply(table.bits_slope, bits)
    cost = cp.sum(cp.exp(linear - decay + cp.multiply(table.chord() * table.max_rank, share)))
    taken = (table.per_bit / budget_bytes) @ bits + (table.per_rank * table.max_rank / budget_bytes) @ share
    within = taken <= 1 - float(table.base.sum()) / budget_bytes
    box = [bits >= limits.min_bits, bits <= limits.max_bits, share >= 0, share <= 1]
    programme = cp.Problem(cp.Minimize(cost), [within, *box])
    try:
        programme.solve(solver=cp.CLARABEL)
    except cp.SolverError as error:
        raise AllocationError(
            f"CLARABEL failed on the error curves ({error}); check their parameters"
        ) from error
    if bits.value is None or share.value is None:
        raise AllocationError(
            f"CLARABEL ended {programme.status} on the error curves; check their parameters"
        )
    price = max(0.0, float(within.dual_value)) * unit / budget_bytes
    return CurveRelaxation(
        np.clip(bits.value, limits.min_bits, limits.max_bits),
        np.clip(share.value, 0, 1) * table.max_rank,
        float(programme.value) * unit,
        table.dual(price, budget_bytes, limits),
        price,
    )


def round_to_menu(relaxation: CurveRelaxation, menu: Menu, total_bytes: int) -> Solution:
    """The best choice from each layer's options around its continuous bits and rank, and its smallest option.

    The bound is the menu's own, over all options, at the multiplier of the restricted optimum. Raises
    `InfeasibleError`.
    """
    near = [
        _neighbours(layer.options, layer.total_bytes, bits, rank)
        for layer, bits, rank in zip(
            menu.layers, relaxation.bits.tolist(), relaxation.rank.tolist(), strict=True
        )
    ]
    full = menu.problem(total_bytes)
    index = np.concatenate([first + options for first, options in zip(full.start[:-1], near, strict=True)])
    start = np.append(0, np.cumsum([len(options) for options in near])).astype(np.int64)
    found = solve(Problem(full.cost[index], full.size[index], start, full.budget_bytes))
    price = found.shadow_price
    dual = (
        float(np.minimum.reduceat(full.cost + price * full.size, full.start[:-1]).sum())
        - price * full.budget_bytes
    )
    bound = min(dual, found.cost)
    choice = np.array([options[k] for options, k in zip(near, found.choice, strict=True)], dtype=np.int64)
    return Solution(
        choice, found.cost, found.total_bytes, bound, found.cost - bound, found.cost == bound, price
    )


def _neighbours(options: Sequence[Option], size: Integers, bits: float, rank: float) -> Integers:
    around = _around(_column(o.bits for o in options), bits) & _around(_column(o.rank for o in options), rank)
    around[int(np.argmin(size))] = True
    return np.flatnonzero(around)


def _around(offered: Floats, value: float) -> Mask:
    """Which are the nearest offered at or below `value`, or the nearest at or above it."""
    below = offered[offered <= value].max(initial=-np.inf)
    above = offered[offered >= value].min(initial=np.inf)
    return np.asarray((offered == below) | (offered == above))


def _column(values: Iterable[float]) -> Floats:
    return np.fromiter(values, dtype=np.float64)
