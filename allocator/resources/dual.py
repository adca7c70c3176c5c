"""The Lagrangian dual of a problem with several resources, and its maximum.

For multipliers λ ≥ 0, one per resource, every group takes the option of least cost + λ·use; the sum of those
minima less λ·limits bounds every feasible choice from below (Geoffrion 1974). The dual is concave and
piecewise linear, so Kelley's cutting planes (1960) find its maximum in finitely many steps. Monotone chains
keep the inner minimum exact: along a chain it is a shortest path over bits; in a tie it is the best common
level.

Shapes: G groups, R resources, K the largest option count of a group.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from allocator.problem import Floats, Integers
from allocator.resources.problem import ResourceProblem

DUAL_TOLERANCE = 1e-9
"""Kelley's planes stop when the dual is known to this share of its value."""
CUT_LIMIT = 400

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Lagrangian:
    """The inner problem as matrices: cost (G, K) padded with inf, use (R, G, K) float64, limit (R,), and the
    chains."""

    cost: Floats
    use: Floats
    limit: Floats
    chains: tuple[Chains, ...]

    @classmethod
    def of(cls, problem: ResourceProblem) -> Lagrangian:
        count = np.diff(problem.start)
        width = int(count.max())
        index = problem.start[:-1, None] + np.minimum(np.arange(width), count[:, None] - 1)
        padding = np.arange(width) >= count[:, None]
        return cls(
            np.where(padding, np.inf, problem.cost[index]),
            problem.use[:, index].astype(np.float64),
            problem.limit.astype(np.float64),
            _chains_by_length(problem, problem.chains, index, padding, tied=False)
            + _chains_by_length(problem, problem.ties, index, padding, tied=True),
        )

    def priced(self, prices: Floats) -> Floats:
        """cost + λ·use, (G, K)."""
        total = self.cost.copy()
        for price, used in zip(prices.tolist(), self.use, strict=True):
            if price:
                total += price * used
        return total

    def minimise(self, prices: Floats) -> tuple[Integers, float]:
        """A choice (G,) of least cost + λ·use, and the dual value there."""
        total = self.priced(prices)
        choice = total.argmin(axis=1)
        for chains in self.chains:
            choice[chains.groups] = chains.shortest(total)
        value = total[np.arange(len(choice)), choice].sum() - prices @ self.limit
        return choice, float(value)


@dataclass(frozen=True, slots=True)
class Chains:
    """C chains of one length D: groups (C, D); masks (L, C, D, K): the options of each level, levels
    ascending. tied: levels are equal along a chain, otherwise they never rise."""

    groups: Integers
    masks: Mask
    tied: bool

    def shortest(self, total: Floats) -> Integers:
        """The options (C, D) of least `total` (G, K) along which the levels are as they must be."""
        priced = np.where(self.masks, total[self.groups], np.inf)
        option = priced.argmin(axis=3)
        value = np.take_along_axis(priced, option[..., None], axis=3)[..., 0]
        level = value.sum(axis=2).argmin(axis=0)[:, None] if self.tied else _falling_path(value)
        path = np.broadcast_to(level, self.groups.shape)
        return np.asarray(np.take_along_axis(option, path[None], axis=0)[0])


def _falling_path(value: Floats) -> Integers:
    """The levels (C, D) that never rise along D and have the least sum of `value` (L, C, D)."""
    levels, chains, depth = value.shape
    best = value[:, :, 0]
    came_from = np.zeros((levels, chains, depth), dtype=np.int64)
    for d in range(1, depth):
        previous, source = best[-1], np.full(chains, levels - 1)
        step = np.empty_like(best)
        for level in range(levels - 1, -1, -1):
            cheaper = best[level] < previous
            previous, source = np.where(cheaper, best[level], previous), np.where(cheaper, level, source)
            step[level], came_from[level, :, d] = previous + value[level, :, d], source
        best = step
    path = np.empty((chains, depth), dtype=np.int64)
    each = np.arange(chains)
    path[:, -1] = best.argmin(axis=0)
    for d in range(depth - 1, 0, -1):
        path[:, d - 1] = came_from[path[:, d], each, d]
    return path


def _chains_by_length(
    problem: ResourceProblem, chains: tuple[Integers, ...], index: Integers, padding: Mask, tied: bool
) -> tuple[Chains, ...]:
    if problem.level is None:
        return ()
    level = np.where(padding, -1, problem.level[index])
    levels = np.unique(problem.level)
    alike: dict[int, list[Integers]] = {}
    for chain in chains:
        alike.setdefault(len(chain), []).append(chain)
    batches = []
    for same in alike.values():
        groups = np.array(same, dtype=np.int64)
        batches.append(Chains(groups, level[groups] == levels[:, None, None, None], tied))
    return tuple(batches)


@dataclass(frozen=True, slots=True)
class Bundle:
    """What the cutting planes leave: the best multipliers (R,), their bound, and the choices behind the
    planes."""

    prices: Floats
    bound: float
    choices: tuple[Integers, ...]
    values: Floats

    def nearest(self, count: int = 2) -> list[Integers]:
        """The choices whose planes are lowest at the best multipliers: the closest to optimal there."""
        return [self.choices[i] for i in np.argsort(self.values, kind="stable")[:count]]


def maximise(lagrangian: Lagrangian, deadline: float) -> Bundle:
    """Kelley's cutting planes on the dual, each price in units of cost per share of its limit.

    The box that holds the prices starts around the best point of the diagonal and grows while they lean on
    it.
    """
    planes = Planes(lagrangian)
    box = 16.0 * planes.search_diagonal()
    for _ in range(CUT_LIMIT):
        ceiling, prices = planes.highest(box)
        if (
            ceiling - planes.best_value <= DUAL_TOLERANCE * abs(planes.best_value)
            or time.monotonic() > deadline
        ):
            if prices.max() < box * 0.999 or box > 1e6 * planes.spread:
                break
            box *= 16.0
            continue
        planes.cut(prices)
    return planes.bundle()


class Planes:
    """The planes cut so far, value ≤ height + slope · price, and the best point evaluated."""

    def __init__(self, lagrangian: Lagrangian) -> None:
        self.lagrangian = lagrangian
        self.scale = np.maximum(lagrangian.limit, 1.0)
        finite = np.where(np.isfinite(lagrangian.cost), lagrangian.cost, np.nan)
        self.spread = float((np.nanmax(finite, axis=1) - np.nanmin(finite, axis=1)).sum()) or 1.0
        self.slopes: list[Floats] = []
        self.heights: list[float] = []
        self.choices: list[Integers] = []
        self.best_value = -np.inf
        self.best_prices = np.zeros(len(self.scale))

    def cut(self, prices: Floats) -> Floats:
        """Evaluate the dual at `prices` (R,) and add its plane; returns the slope (R,)."""
        choice, value = self.lagrangian.minimise(prices / self.scale)
        each = np.arange(len(choice))
        if value > self.best_value:
            self.best_value, self.best_prices = value, prices
        self.choices.append(choice)
        self.slopes.append(
            (self.lagrangian.use[:, each, choice].sum(axis=1) - self.lagrangian.limit) / self.scale
        )
        self.heights.append(float(self.lagrangian.cost[each, choice].sum()))
        return self.slopes[-1]

    def search_diagonal(self) -> float:
        """The price, equal for all resources, at which the dual turns, within a factor of two; at least
        tiny."""
        ones = np.ones(len(self.scale))
        self.cut(0.0 * ones)
        low, high = -40.0, 20.0
        while high - low > 1.0:
            middle = (low + high) / 2
            low, high = (
                (middle, high) if self.cut(self.spread * 2.0**middle * ones).sum() > 0 else (low, middle)
            )
        return float(self.spread * 2.0**high)

    def highest(self, box: float) -> tuple[float, Floats]:
        """The highest point under all planes with prices in [0, box]: its value and its prices (R,)."""
        from scipy.optimize import linprog

        heights = np.array(self.heights)
        unit = 1e-4 * max(abs(self.best_value - heights.min()), abs(self.best_value), 1e-300)
        master = linprog(
            np.append(np.zeros(len(self.scale)), -1.0),
            A_ub=np.column_stack([-np.array(self.slopes), np.ones(len(heights))]),
            b_ub=(heights - self.best_value) / unit,
            bounds=[(0, box / unit)] * len(self.scale) + [(None, None)],
            method="highs-ds",
        )
        if master.x is None:
            return self.best_value, self.best_prices
        return self.best_value + unit * float(master.x[-1]), np.maximum(master.x[:-1], 0.0) * unit

    def bundle(self) -> Bundle:
        values = np.array(self.heights) + np.array(self.slopes) @ self.best_prices
        return Bundle(self.best_prices / self.scale, self.best_value, tuple(self.choices), values)
