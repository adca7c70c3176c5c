"""Tie groups: layers that must share bits become one group whose options are sums over its members.

What lives here: the product of menus, merged pairwise, and the way back from a merged option to one option
per member. The whole product is never enumerated: after each member, options of equal bits and equal bytes
are merged into the cheapest, and options that another beats in bytes and cost are dropped. Tie groups of one
shape share the sorted list of pairs, so each pair costs one vector addition over all of them.

Shapes: K options of a member, B tie groups of one shape, P pairs, C merged columns. Cost matrices are (K, B),
options first, so that a column over all groups is contiguous. A forbidden option has infinite cost.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from allocator.errors import ProblemTooLargeError
from allocator.problem import Floats, Integers

PAIR_CAP = 20_000_000
"""Most pairs that one merge may look at; more are refused."""
CELLS_PER_CHUNK = 4_000_000
"""Cost cells (pairs × groups) worked on at a time, to stay near the cache."""

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Member:
    """One position of B equal-shaped tie groups: bits (K,) and size (K,) int64, cost (K, B) float64."""

    bits: Integers
    size: Integers
    cost: Floats


@dataclass(frozen=True, slots=True)
class Merge:
    """Pairs of a left and a right option, sorted by (bits, bytes); equal ones form a column.

    left, right (P,) int64; first (C,) int64: where each column's run of pairs starts; bits, size (C,) int64.
    """

    left: Integers
    right: Integers
    first: Integers
    bits: Integers
    size: Integers

    @property
    def count(self) -> Integers:
        return np.diff(np.append(self.first, len(self.left)))

    def costs(self, left: Floats, right: Floats) -> Floats:
        """The cheapest pair of every column: (C, B) from (K, B) on both sides."""
        merged = np.empty((len(self.first), left.shape[1]))
        pair_cost = np.empty(left.shape[1])
        last = np.append(self.first[1:], len(self.left)).tolist()
        pairs = list(zip(self.left.tolist(), self.right.tolist(), strict=True))
        for row, start, end in zip(merged, self.first.tolist(), last, strict=True):
            np.add(left[pairs[start][0]], right[pairs[start][1]], out=row)
            for i, j in pairs[start + 1 : end]:
                np.add(left[i], right[j], out=pair_cost)
                np.minimum(row, pair_cost, out=row)
        return merged

    def trace(self, left: Floats, right: Floats, column: Integers) -> tuple[Integers, Integers]:
        """The first cheapest pair behind `column` (B,), as a left and a right option (B,) each."""
        group = np.arange(len(column))
        first, count = self.first[column], self.count[column]
        best = np.full(len(column), np.inf)
        pair = first.copy()
        for step in range(int(count.max())):
            candidate = np.where(step < count, first + step, first)
            pair_cost = left[self.left[candidate], group] + right[self.right[candidate], group]
            better = pair_cost < best
            best, pair = np.where(better, pair_cost, best), np.where(better, candidate, pair)
        return self.left[pair], self.right[pair]

    def keep(self, columns: Mask) -> Merge:
        """The same merge without the columns where `columns` (C,) is false."""
        count = self.count
        pairs = np.repeat(columns, count)
        first = np.cumsum(count[columns]) - count[columns]
        return Merge(self.left[pairs], self.right[pairs], first, self.bits[columns], self.size[columns])


def merge_of(left_bits: Integers, left_size: Integers, right_bits: Integers, right_size: Integers) -> Merge:
    """Every pair of equal bits. Raises `ProblemTooLargeError` above `PAIR_CAP` pairs."""
    shared = np.intersect1d(left_bits, right_bits)
    pair_count = sum(int((left_bits == b).sum()) * int((right_bits == b).sum()) for b in shared)
    if pair_count > PAIR_CAP:
        raise ProblemTooLargeError(
            f"merging tied layers needs {pair_count} pairs of options, more than the cap of {PAIR_CAP}; "
            "offer fewer ranks or group sizes to the tied layers, or untie them"
        )
    blocks = [
        np.meshgrid(np.flatnonzero(left_bits == b), np.flatnonzero(right_bits == b), indexing="ij")
        for b in shared
    ]
    left = np.concatenate([block[0].ravel() for block in blocks]) if blocks else np.empty(0, np.int64)
    right = np.concatenate([block[1].ravel() for block in blocks]) if blocks else np.empty(0, np.int64)
    bits, size = left_bits[left], left_size[left] + right_size[right]
    order = np.lexsort((size, bits))
    bits, size = bits[order], size[order]
    first = np.flatnonzero(_run_starts(bits) | _run_starts(size))
    return Merge(left[order], right[order], first, bits[first], size[first])


def undominated(cost: Floats, restart: Mask) -> Mask:
    """Which cells of `cost` (C, B) are cheaper than every row above, since the last row where
    `restart` (C,) is set."""
    kept = np.empty(cost.shape, dtype=np.bool_)
    cheapest = np.full(cost.shape[1], np.inf)
    for row, kept_row, again in zip(cost, kept, restart.tolist(), strict=True):
        if again:
            cheapest.fill(np.inf)
        np.less(row, cheapest, out=kept_row)
        np.minimum(row, cheapest, out=cheapest)
    return kept


@dataclass(frozen=True, slots=True)
class TiedOptions:
    """The merged options of B tie groups, one group after the other.

    cost (N,) float64, size, bits, column (N,) int64, count (B,) int64 options a group; zero where the members
    share no bits. Within a group options ascend in bytes (with `by_bits`: in bits, then bytes).
    """

    members: tuple[Member, ...]
    merges: tuple[Merge, ...]
    cost: Floats
    size: Integers
    bits: Integers
    column: Integers
    count: Integers

    def member_choice(self, choice: Integers) -> Integers:
        """The option of every member, (M, B) int64, behind the merged options `choice` (B,)."""
        start = np.cumsum(self.count) - self.count
        column = self.column[start + choice]
        if not self.merges:
            return np.asarray(column[None, :])
        left = [self.members[0].cost]
        for merge, member in zip(self.merges[:-1], self.members[1:-1], strict=True):
            left.append(merge.costs(left[-1], member.cost))
        taken = []
        for merge, cost, member in zip(self.merges[::-1], left[::-1], self.members[:0:-1], strict=True):
            column, option = merge.trace(cost, member.cost, column)
            taken.append(option)
        return np.array([column, *taken[::-1]], dtype=np.int64)


def tie(members: tuple[Member, ...], by_bits: bool = False) -> TiedOptions:
    """Merge the members of B tie groups of one shape.

    `by_bits` keeps an option that is beaten only by options of other bits, as constraints on bits need.
    A single member is not pruned, only rid of forbidden options. Raises `ProblemTooLargeError`.
    """
    bits, size, cost = members[0].bits, members[0].size, members[0].cost
    merges: list[Merge] = []
    for member in members[1:]:
        merge = merge_of(bits, size, member.bits, member.size)
        merged = merge.costs(cost, member.cost)
        if len(merges) < len(members) - 2:
            kept = np.asarray(undominated(merged, _run_starts(merge.bits)).any(axis=1))
            merge, merged = merge.keep(kept), merged[kept]
        merges.append(merge)
        bits, size, cost = merge.bits, merge.size, merged
    if not merges:
        return _ragged(members, merges, bits, size, cost, np.isfinite(cost), np.arange(len(bits)))
    order = np.arange(len(bits)) if by_bits else np.lexsort((bits, size))
    bits, size, cost = bits[order], size[order], cost[order]
    restart = _run_starts(bits if by_bits else np.zeros_like(bits))
    return _ragged(members, merges, bits, size, cost, undominated(cost, restart), order)


def _run_starts(values: Integers) -> Mask:
    """Where a new value starts in sorted `values` (C,)."""
    return np.append(True, np.diff(values) != 0)[: len(values)]


def _ragged(
    members: tuple[Member, ...],
    merges: list[Merge],
    bits: Integers,
    size: Integers,
    cost: Floats,
    kept: Mask,
    column: Integers,
) -> TiedOptions:
    """Option-first cells (C, B) where `kept`, laid out group after group."""
    group, row = np.nonzero(np.ascontiguousarray(kept.T))
    count = kept.sum(axis=0, dtype=np.int64)
    return TiedOptions(
        members, tuple(merges), cost[row, group], size[row], bits[row], column[row].astype(np.int64), count
    )


def groups_per_chunk(members_bits: tuple[Integers, ...]) -> int:
    """How many tie groups to merge at a time, from the options' bits of every member."""
    cells = 1
    for bits in np.unique(members_bits[0]):
        per_bits = 1
        for member in members_bits:
            per_bits = min(per_bits * int((member == bits).sum()), PAIR_CAP)
        cells += per_bits
    return max(1, CELLS_PER_CHUNK // cells)
