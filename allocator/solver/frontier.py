"""Every budget at once: the breakpoints of the linear relaxation, each an optimal plan for its own budget.

What lives here: `frontier` and `Frontier`. A budget between two breakpoints is the business of
`knapsack.solve`.

Only the vertices of a group's lower convex hull of (bytes, cost) ever minimise cost + λ·bytes. Raising the
budget from the smallest choice, the relaxation walks the edges of all hulls in order of cost saved per byte
(Sinha & Zoltners 1979); after every whole edge the choice is integral, and no choice of as many bytes or
fewer costs less.

The hulls are built without a loop over groups or options. Options are sorted by bytes and swept by a running
minimum of cost; then every option that lies on or above the line between its two neighbours is dropped, all
at once, until none does: such an option is above a segment between two options, hence no vertex, whatever
else is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from allocator.errors import InfeasibleError
from allocator.problem import Floats, Integers, Problem
from allocator.solver.relaxation import Block, Table


@dataclass(frozen=True, slots=True)
class Frontier:
    """Breakpoints k = 0 … B−1, bytes ascending, cost descending.

    total_bytes (B,) int64; cost (B,) float64, in the unit of the problem. group and option (B−1,) int64:
    breakpoint k+1 is breakpoint k with group[k] moved to option[k]. smallest (G,) int64: the choice at
    breakpoint 0.
    """

    total_bytes: Integers
    cost: Floats
    group: Integers
    option: Integers
    smallest: Integers

    def __len__(self) -> int:
        return len(self.total_bytes)

    def choice(self, breakpoint: int) -> Integers:
        """(G,) int64: the option of every group at a breakpoint."""
        if not 0 <= breakpoint < len(self):
            raise IndexError(f"breakpoint {breakpoint} is outside 0 … {len(self) - 1}")
        choice = self.smallest.copy()
        choice[self.group[:breakpoint]] = self.option[:breakpoint]
        return choice

    def within(self, budget_bytes: int) -> int:
        """The last breakpoint that fits a budget. Raises `InfeasibleError` below the first."""
        if budget_bytes < self.total_bytes[0]:
            least = int(self.total_bytes[0])
            raise InfeasibleError(
                f"the smallest options take {least:,} bytes, more than {budget_bytes:,}; raise the budget",
                least,
            )
        return int(np.searchsorted(self.total_bytes, budget_bytes, side="right")) - 1

    def shadow_price(self) -> Floats:
        """(B−1,) float64, descending: the cost saved per byte on the way to the next breakpoint."""
        return np.diff(self.cost) / -np.diff(self.total_bytes)


def frontier(problem: Problem) -> Frontier:
    """All breakpoints of the linear relaxation; the budget of the problem plays no part."""
    hulls = [_hull(block) for block in Table.of(problem).blocks]
    group, option, size, cost = (np.concatenate(column) for column in zip(*hulls, strict=True))
    first = np.flatnonzero(np.diff(group, prepend=-1))
    edge = np.flatnonzero(group[1:] == group[:-1])
    bytes_more, cost_more = size[edge + 1] - size[edge], cost[edge + 1] - cost[edge]
    order = np.argsort(cost_more / bytes_more, kind="stable")
    smallest = np.empty(problem.group_count, dtype=np.int64)
    smallest[group[first]] = option[first]
    return Frontier(
        total_bytes=np.cumsum(np.concatenate(([size[first].sum()], bytes_more[order]))),
        cost=np.cumsum(np.concatenate(([cost[first].sum()], cost_more[order]))),
        group=group[edge][order],
        option=option[edge + 1][order],
        smallest=smallest,
    )


def _hull(block: Block) -> tuple[Integers, Integers, Integers, Floats]:
    """Group, option, size and cost of every vertex, group after group by ascending size."""
    row, option = _undominated(block)
    size, cost = block.size[row, option], block.cost[row, option]
    while True:
        slope = np.diff(cost) / np.maximum(np.diff(size), 1)
        within = row[1:] == row[:-1]
        kept = np.ones(len(row), dtype=np.bool_)
        kept[1:-1] = (slope[:-1] < slope[1:]) | ~(within[:-1] & within[1:])
        if kept.all():
            return block.groups[row], option, size, cost
        row, option, size, cost = row[kept], option[kept], size[kept], cost[kept]


def _undominated(block: Block) -> tuple[Integers, Integers]:
    """Rows and options, by row and ascending size, that cost less than every option as small or smaller."""
    rows, options = [], []
    for run in block.runs():
        order = np.argsort(block.size[run], axis=1, kind="stable")
        cost = np.take_along_axis(block.cost[run], order, axis=1)
        kept = np.ones(cost.shape, dtype=np.bool_)
        np.less(cost[:, 1:], np.minimum.accumulate(cost, axis=1)[:, :-1], out=kept[:, 1:])
        row, column = np.nonzero(kept)
        rows.append(row + run.start)
        options.append(order[row, column])
    row, option = np.concatenate(rows), np.concatenate(options)
    size = block.size[row, option]
    last = np.ones(len(row), dtype=np.bool_)
    last[:-1] = (row[1:] != row[:-1]) | (size[1:] != size[:-1])
    return row[last], option[last]
