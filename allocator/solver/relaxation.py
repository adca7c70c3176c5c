"""The Lagrangian relaxation of the knapsack: its multiplier, its bound, and the options that can still
matter.

What lives here: `Table` and its `Block`s (the options as matrices, read in cache-sized runs), `relax` (the
multiplier at which the relaxation breaks) and `Table.survivors` (reduced-cost fixing). The integer search is
`core_search.py`.

For a multiplier λ ≥ 0 (cost per byte) every group separately takes the option of least cost + λ·size. Those
minima sum to a lower bound on any feasible choice, after subtracting λ·budget, and the best λ gives the bound
of the linear relaxation (Sinha & Zoltners 1979; Kellerer, Pferschy & Pisinger, Knapsack Problems, ch. 11).
The best λ is found by intersecting tangents of the concave dual. Groups whose minimiser is the same at both
ends of the bracket are settled and never read again, so the search reads the table about twice in all. From
`4 * SAMPLE` groups on, a sample gives the first bracket and the whole table is read three times, the pass of
`survivors` included, and its sizes once more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allocator.problem import Floats, Integers, Problem

RUN = 1 << 15
"""Options handled at once: three float64 runs of this length stay in a second-level cache."""
SAMPLE = 512
"""Groups in the sample that brackets the multiplier."""
NEAR = 96
"""Least groups among which the first incumbent is sought."""
_NONE = np.empty(0, dtype=np.int64)
ROUNDING = 1e-13
"""Slack, relative to the terms summed, given to every comparison of reduced costs that would discard an
option."""


@dataclass(frozen=True, slots=True)
class Pick:
    """One option for each of g groups: choice (g,) int64, cost (g,) float64, size (g,) int64."""

    choice: Integers
    cost: Floats
    size: Integers

    @property
    def total_bytes(self) -> int:
        return int(self.size.sum())

    def take(self, index: NDArray[Any] | slice) -> Pick:
        return Pick(self.choice[index], self.cost[index], self.size[index])

    def put(self, index: Integers, other: Pick) -> None:
        self.choice[index], self.cost[index], self.size[index] = other.choice, other.cost, other.size

    @classmethod
    def concatenated(cls, parts: Sequence[Pick]) -> Pick:
        if len(parts) == 1:
            return parts[0]
        return cls(*(np.concatenate([getattr(part, field) for part in parts]) for field in cls.__slots__))


@dataclass(frozen=True, slots=True)
class Candidates:
    """Options that may replace the base option of their group, by ascending reduced cost.

    group, option, bytes_more int64; cost_more, reduced_cost float64; all of one length. bytes_more and
    cost_more are differences to the base option; reduced_cost = cost_more + λ·bytes_more, never below zero.
    """

    group: Integers
    option: Integers
    bytes_more: Integers
    cost_more: Floats
    reduced_cost: Floats

    def __len__(self) -> int:
        return len(self.group)

    def take(self, index: NDArray[Any]) -> Candidates:
        return Candidates(*(getattr(self, field)[index] for field in self.__slots__))

    @classmethod
    def concatenated(cls, parts: Sequence[Candidates]) -> Candidates:
        return cls(*(np.concatenate([getattr(part, field) for part in parts]) for field in cls.__slots__))


@dataclass(frozen=True, slots=True)
class Block:
    """g groups as matrices. groups (g,) and count (g,) int64, cost (g, K) float64, size (g, K) int64. A group
    of fewer than K options repeats its last one, which changes no minimum and never comes before the
    original."""

    groups: Integers
    count: Integers
    cost: Floats
    size: Integers

    @classmethod
    def padded(cls, problem: Problem, groups: Integers, count: Integers) -> Block:
        column = np.arange(count.max())
        index = np.minimum(problem.start[groups][:, None] + column, problem.start[groups + 1][:, None] - 1)
        return cls(groups, count, problem.cost[index], problem.size[index])

    def rows(self, index: NDArray[Any]) -> Block:
        return Block(self.groups[index], self.count[index], self.cost[index], self.size[index])

    def pick(self, choice: Integers) -> Pick:
        row = np.arange(len(choice))
        return Pick(choice, self.cost[row, choice], self.size[row, choice])

    def lightest(self) -> Pick:
        least = self.size.min(axis=1, keepdims=True)
        return self.pick(np.where(self.size == least, self.cost, np.inf).argmin(axis=1))

    def cheapest(self) -> Pick:
        least = self.cost.min(axis=1, keepdims=True)
        return self.pick(np.where(self.cost == least, self.size, np.iinfo(np.int64).max).argmin(axis=1))

    def at(self, multiplier: float) -> Pick:
        choice = np.empty(len(self.groups), dtype=np.int64)
        for run in self.runs():
            self._priced(run, multiplier).argmin(axis=1, out=choice[run])
        return self.pick(choice)

    def survivors(self, multiplier: float, base: Pick, limit: float) -> Candidates:
        """The options other than the base whose reduced cost over it is at most `limit`."""
        rows, columns = [_NONE], [_NONE]
        for run in self.runs():
            value = base.cost[run] + multiplier * base.size[run]
            scale = limit + np.abs(base.cost[run]) + multiplier * float(self.size[run].max())
            kept = self._priced(run, multiplier) <= (value + (limit + ROUNDING * scale))[:, None]
            row, column = np.divmod(np.flatnonzero(kept), kept.shape[1])
            rows.append(row + run.start)
            columns.append(column)
        row, column = np.concatenate(rows), np.concatenate(columns)
        other = np.flatnonzero((column != base.choice[row]) & (column < self.count[row]))
        row, column = row[other], column[other]
        bytes_more = self.size[row, column] - base.size[row]
        cost_more = self.cost[row, column] - base.cost[row]
        reduced_cost = np.maximum(cost_more + multiplier * bytes_more, 0.0)
        return Candidates(self.groups[row], column, bytes_more, cost_more, reduced_cost)

    def runs(self) -> Iterator[slice]:
        """Rows a few at a time, so that what is computed of them stays in the cache."""
        rows = max(1, RUN // self.cost.shape[1])
        for first in range(0, len(self.groups), rows):
            yield slice(first, first + rows)

    def _priced(self, run: slice, multiplier: float) -> Floats:
        total = np.multiply(self.size[run], multiplier)
        total += self.cost[run]
        return total


@dataclass(frozen=True, slots=True)
class Table:
    """The options of a problem, or of some of its groups: one block where option counts are about equal,
    otherwise one for every octave of counts. Rows are numbered through the blocks."""

    blocks: tuple[Block, ...]

    @classmethod
    def of(cls, problem: Problem) -> Table:
        """Views, not copies, where all groups have as many options."""
        count = np.diff(problem.start)
        groups = np.arange(len(count))
        width = int(count.max())
        if (count == width).all():
            shape = (len(count), width)
            return cls((Block(groups, count, problem.cost.reshape(shape), problem.size.reshape(shape)),))
        if len(count) * width <= max(2 * len(problem.cost), RUN):
            return cls((Block.padded(problem, groups, count),))
        octave = np.frexp(count - 0.5)[1]
        parts = [np.flatnonzero(octave == k) for k in np.unique(octave)]
        return cls(tuple(Block.padded(problem, part, count[part]) for part in parts))

    @property
    def groups(self) -> Integers:
        """(g,) int64: the group of every row."""
        return np.concatenate([block.groups for block in self.blocks])

    def __len__(self) -> int:
        return sum(len(block.groups) for block in self.blocks)

    def rows(self, index: Integers) -> Table:
        """`index` ascending."""
        if len(self.blocks) == 1:
            return Table((self.blocks[0].rows(index),))
        parts, first = [], 0
        for block in self.blocks:
            last = first + len(block.groups)
            begin, end = np.searchsorted(index, (first, last))
            parts.append(block.rows(index[begin:end] - first))
            first = last
        return Table(tuple(part for part in parts if len(part.groups)))

    def least_bytes(self) -> int:
        return sum(int(block.size.min(axis=1).sum()) for block in self.blocks)

    def lightest(self) -> Pick:
        """The smallest option of every group, the cheapest among equals."""
        return Pick.concatenated([block.lightest() for block in self.blocks])

    def cheapest(self) -> Pick:
        """The option of least cost in every group, the smallest among equals."""
        return Pick.concatenated([block.cheapest() for block in self.blocks])

    def at(self, multiplier: float) -> Pick:
        """The first option of least cost + λ·size in every group."""
        return Pick.concatenated([block.at(multiplier) for block in self.blocks])

    def survivors(self, multiplier: float, base: Pick, limit: float) -> Candidates:
        """Reduced-cost fixing: by ascending reduced cost, the options within `limit` of `base`, a minimiser
        at λ."""
        parts, first = [], 0
        for block in self.blocks:
            rows = slice(first, first + len(block.groups))
            parts.append(block.survivors(multiplier, base.take(rows), limit))
            first = rows.stop
        found = Candidates.concatenated(parts)
        return found.take(np.argsort(found.reduced_cost, kind="stable"))


@dataclass(frozen=True, slots=True)
class Relaxation:
    """Where the relaxation breaks.

    multiplier: λ, cost per byte. base: a minimiser at λ of every group, within the budget, so that no reduced
    cost over it is negative. near: the rows that break closest to λ, about `NEAR` of them.
    """

    multiplier: float
    base: Pick
    near: Integers


def relax(table: Table, budget_bytes: int, least_bytes: int) -> Relaxation:
    """The multiplier at which the minimisers pass from over the budget to within it.

    The budget must be at least `least_bytes`, which is `table.least_bytes()`. A budget that every group's
    cheapest option fits gives λ = 0.
    """
    low, high = _sampled_bracket(table, budget_bytes, least_bytes) or (table.cheapest(), table.lightest())
    if low.total_bytes <= budget_bytes:
        return Relaxation(0.0, low, np.empty(0, dtype=np.int64))
    return _intersect_tangents(table, budget_bytes, low, high)


def _intersect_tangents(table: Table, budget_bytes: int, low: Pick, high: Pick) -> Relaxation:
    """Narrows the bracket, `low` over the budget and `high` within it, until both ends are minimisers at one
    λ.

    The next λ is where the tangents of the two ends meet. Every round brings one end strictly closer in
    bytes.
    """
    base = Pick(high.choice.copy(), high.cost.copy(), high.size.copy())
    spare = budget_bytes - base.total_bytes
    rows = near = np.arange(len(table))
    while True:
        moved = np.flatnonzero(low.choice != high.choice)
        rows, low, high, table = rows[moved], low.take(moved), high.take(moved), table.rows(moved)
        near = rows if len(rows) >= NEAR else near
        most, least = low.total_bytes, high.total_bytes
        multiplier = float((high.cost - low.cost).sum()) / (most - least)
        middle = table.at(multiplier)
        spent = middle.total_bytes
        if not least < spent < most:
            break
        if spent - least > spare:
            low = middle
            continue
        spare -= spent - least
        high = middle
        base.put(rows, middle)
    _fill(spare, rows, low, base)
    return Relaxation(multiplier, base, near)


def _fill(spare_bytes: int, rows: Integers, low: Pick, base: Pick) -> None:
    """Moves groups of `base` to their heavier minimiser, lightest step first, while the spare bytes last."""
    step = low.size - base.size[rows]
    order = np.argsort(step, kind="stable")
    fits = order[np.cumsum(step[order]) <= spare_bytes]
    base.put(rows[fits], low.take(fits))


def _sampled_bracket(table: Table, budget_bytes: int, least_bytes: int) -> tuple[Pick, Pick] | None:
    """Minimisers of the whole table at one λ over the budget and at one within it, guessed from a sample of
    groups.

    None for tables too small to gain, or where no guess lands on the other side.
    """
    if len(table) < 4 * SAMPLE or least_bytes == 0:
        return None
    drawn = np.random.default_rng(0).choice(len(table), SAMPLE, replace=False)
    sample = table.rows(np.sort(drawn))
    least = sample.least_bytes()
    aim = least * (budget_bytes / least_bytes)
    first = table.at(relax(sample, int(aim), least).multiplier)
    excess = first.total_bytes - budget_bytes
    for overshoot in (0.2, 1.0, 5.0):
        goal = max(least, int(aim - aim * (1 + overshoot) * excess / budget_bytes))
        second = table.at(relax(sample, goal, least).multiplier)
        if (second.total_bytes > budget_bytes) != (excess > 0):
            return (first, second) if excess > 0 else (second, first)
    return None
