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

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from allocator.constraints.ties import Mask
from allocator.errors import AllocationError, InfeasibleError, InvalidProblemError
from allocator.problem import Floats, Integers, Menu, Problem, Solution
from allocator.solver.knapsack import solve
from allocator.storage import FACTOR_GROUP_SIZE, KEEP_BITS, Option

if TYPE_CHECKING:
    pass


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
