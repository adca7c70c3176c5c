"""The integer search over the options that reduced-cost fixing leaves: meet in the middle.

What lives here: `Core`, what is searched; `search`, one pass over it with lists of bounded length; and
`integer_program`, the last resort where the lists outgrow every cap.

A choice is worth its *excess* over the relaxation's bound: Σ reduced cost + λ·unused bytes, both never
negative. Only groups with a surviving option can move, and a choice better than the incumbent has Σ reduced
cost below its excess. Stages (the options of a group, or a ladder of groups, see below) join in order of
their least reduced cost, each the shorter of two Pareto lists of (bytes more, Σ reduced cost); a list keeps
no state beaten in both bytes and cost, nor one whose reduced cost reaches the incumbent's excess. Binary
search pairs the lists (Horowitz & Sahni 1974), which lowers the incumbent, which shortens the lists. The pass
is over when the next stage's least reduced cost reaches the excess. A list that outgrows its cap drops the
states of highest reduced cost (a beam), and the least dropped bounds what may have been missed: a pass proves
exactly what it claims, capped or not.

Weights are divided by their greatest common divisor: the remainder of the slack can never be used and is
charged to the bound. Groups with one surviving option each, of equal weight, form a *ladder*: of any k of
them only the cheapest k matter, so a ladder is one integer count. That holds for identical layers above all,
whose symmetric choices would otherwise multiply. Identical groups with several options collapse in the lists,
where equal bytes keep one state, and only as many of them join as the excess can pay for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from allocator.problem import Floats, Integers
from allocator.solver.highs import quiet_stdout
from allocator.solver.relaxation import Candidates

EXPANSION_CAP = 1 << 22
"""Most states made at once, before pruning: 100 MB."""
BLIND = 24
"""Stages joined after a list was cut among states that cost nothing: they can fill the slack, but prove
nothing."""
LADDER = 16
"""Most groups in one stage."""
_ZERO_BYTES, _ZERO_COST = np.zeros(1, dtype=np.int64), np.zeros(1)


@dataclass(frozen=True, slots=True)
class Stage:
    """A decision: nothing, or one of m moves. bytes_more (m,) int64, reduced_cost (m,) float64; move j takes
    the candidates begin[j] … end[j] − 1 of the core, (m,) int64 each."""

    bytes_more: Integers
    reduced_cost: Floats
    begin: Integers
    end: Integers


@dataclass(frozen=True, slots=True)
class Core:
    """Candidates, those of a ladder and those of a group side by side, bytes in whole units.

    bytes_more (n,) int64, in units; slack: such units free; multiplier: cost per unit. waste: the excess that
    no choice of the core avoids, λ·(slack mod unit). ladders: how many of the candidates, the first ones, are
    the only one of their group; they are ordered by bytes, then reduced cost, the others by group, then
    reduced cost.
    """

    candidates: Candidates
    bytes_more: Integers
    slack: int
    multiplier: float
    waste: float
    ladders: int

    @classmethod
    def of(cls, candidates: Candidates, slack_bytes: int, multiplier: float) -> Core:
        """`candidates` by ascending reduced cost."""
        unit = greatest_common_divisor(candidates.bytes_more) or abs(slack_bytes) + 1
        waste = multiplier * (slack_bytes % unit)
        grouped = candidates.take(np.argsort(candidates.group, kind="stable"))
        new = np.concatenate(([True], grouped.group[1:] != grouped.group[:-1], [True]))[-len(grouped) - 1 :]
        alone = new[:-1] & new[1:]
        single, several = np.flatnonzero(alone), np.flatnonzero(~alone)
        single = single[np.lexsort((grouped.reduced_cost[single], grouped.bytes_more[single]))]
        ordered = grouped.take(np.concatenate((single, several)))
        units = ordered.bytes_more // unit
        return cls(ordered, units, slack_bytes // unit, multiplier * unit, waste, len(single))

    def stages(self, excess: float, tolerance: float) -> list[tuple[float, int, int]]:
        """(least reduced cost, first candidate, last candidate + 1) of every stage, by the first of these.

        Costs within `tolerance` count as nothing, and of the stages that cost nothing those of different
        bytes take turns: neighbours are often of one shape, whose bytes alone cannot fill every slack.
        """
        key = np.concatenate((self.bytes_more[: self.ladders], self.candidates.group[self.ladders :]))
        new = np.ones(len(key), dtype=np.bool_)
        new[1:] = key[1:] != key[:-1]
        new[self.ladders : self.ladders + 1] = True
        first = np.flatnonzero(new)
        last = np.append(first[1:], len(key))
        first, last = self._cut_ladders(*self._payable(first, last, excess))
        least = self.candidates.reduced_cost[first]
        least = np.where(least > tolerance, least, 0.0)
        order = np.argsort(least, kind="stable")
        free = int(np.searchsorted(least[order], 0.0, side="right"))
        if free > 2:
            turn = _occurrence(self.bytes_more[first[order[:free]]])
            order[:free] = order[:free][np.argsort(turn, kind="stable")]
        return list(zip(least[order].tolist(), first[order].tolist(), last[order].tolist(), strict=True))

    def _payable(self, first: Integers, last: Integers, excess: float) -> tuple[Integers, Integers]:
        """Leaves out identical groups beyond as many as can move, at their least reduced cost, below the
        excess."""
        wide = np.flatnonzero(first >= self.ladders)
        if len(wide) <= LADDER:
            return first, last
        begin, count = first[wide], (last - first)[wide]
        same = _classes(self.bytes_more, self.candidates.reduced_cost, begin, count)
        copies = 1 + _occurrence(same)
        dear = wide[copies * self.candidates.reduced_cost[begin] >= excess]
        return np.delete(first, dear), np.delete(last, dear)

    def _cut_ladders(self, first: Integers, last: Integers) -> tuple[Integers, Integers]:
        long = np.flatnonzero((last - first > LADDER) & (first < self.ladders))
        if not len(long):
            return first, last
        parts = [self._parts(int(first[row]), int(last[row])) for row in long]
        return (
            np.concatenate((np.delete(first, long), *(begin for begin, _ in parts))),
            np.concatenate((np.delete(last, long), *(end for _, end in parts))),
        )

    def _parts(self, first: int, last: int) -> tuple[Integers, Integers]:
        """Cuts a long ladder: into runs, or, where all cost the same, into powers of two."""
        price = self.candidates.reduced_cost
        if price[first] == price[last - 1]:
            cuts = first + 2 ** np.arange((last - first).bit_length()) - 1
        else:
            cuts = np.arange(first, last, LADDER)
        return cuts, np.append(cuts[1:], last)

    def stage(self, first: int, last: int) -> Stage:
        rows, begin = slice(first, last), np.arange(first, last)
        bytes_more, price = self.bytes_more[rows], self.candidates.reduced_cost[rows]
        if first >= self.ladders:
            return Stage(bytes_more, price, begin, begin + 1)
        if last - first > LADDER:
            return Stage(bytes_more.sum(keepdims=True), price.sum(keepdims=True), begin[:1], begin[-1:] + 1)
        number = np.arange(1, last - first + 1)
        return Stage(bytes_more * number, np.cumsum(price), np.full_like(begin, first), begin + 1)


def _occurrence(labels: Integers) -> Integers:
    """(n,) int64: how many equal labels come before each."""
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    heads = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
    before = np.empty(len(labels), dtype=np.int64)
    before[order] = np.arange(len(labels)) - np.repeat(heads, np.diff(heads, append=len(labels)))
    return before


def _classes(bytes_more: Integers, reduced_cost: Floats, begin: Integers, count: Integers) -> Integers:
    """(groups,) int64: equal for groups whose rows begin[g] … begin[g] + count[g] − 1 are equal, side by side
    from begin[0] on. Rows are first told apart by a fingerprint; those that share one are then compared."""
    mixed = reduced_cost[begin[0] :].view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= bytes_more[begin[0] :].view(np.uint64) * np.uint64(0xC2B2AE3D27D4EB4F)
    mixed *= mixed >> np.uint64(29)
    fingerprint = np.add.reduceat(mixed, begin - begin[0])
    leaders, kin = np.unique(fingerprint, return_index=True, return_inverse=True)[1:]
    leader = leaders[kin]
    index = np.arange(begin[0], begin[0] + count.sum())
    twin = np.minimum(index + np.repeat(begin[leader] - begin, count), len(bytes_more) - 1)
    differs = (reduced_cost[index] != reduced_cost[twin]) | (bytes_more[index] != bytes_more[twin])
    alike = (count == count[leader]) & ~np.logical_or.reduceat(differs, begin - begin[0])
    return np.where(alike, leader, np.arange(len(begin)))


@dataclass(frozen=True, slots=True)
class Outcome:
    """excess: that of the best choice known. swaps: the candidates it takes instead of the base, None where
    the pass found nothing better. floor: no choice has less excess than min(excess, floor)."""

    excess: float
    swaps: Candidates | None
    floor: float


def greatest_common_divisor(values: Integers) -> int:
    """Of all |values|, 0 where none is other than 0; reads them about once, not at every step of Euclid."""
    divisor = 0
    rest = values[values != 0]
    while len(rest):
        divisor = math.gcd(divisor, int(rest[0]))
        rest = rest[rest % divisor != 0]
    return divisor


@dataclass(slots=True)
class Half:
    """A Pareto list: bytes_more ascending, reduced_cost, and for every stage joined, or cut, where each state
    came from: its index in the list before, plus that list's length for every move.

    dropped: the least reduced cost among the states cut off by a cap.
    """

    bytes_more: Integers = field(default_factory=lambda: np.zeros(1, dtype=np.int64))
    reduced_cost: Floats = field(default_factory=lambda: np.zeros(1))
    steps: list[tuple[Stage | None, int, NDArray[np.int32]]] = field(default_factory=list)
    dropped: float = math.inf

    def __len__(self) -> int:
        return len(self.bytes_more)

    def join(self, stage: Stage, multiplier: float, excess: float, cap: int) -> None:
        self._cut(min(cap, max(1, EXPANSION_CAP // (1 + len(stage.bytes_more)))))
        parents = len(self.bytes_more)
        steps = np.concatenate((_ZERO_BYTES, stage.bytes_more))
        prices = np.concatenate((_ZERO_COST, stage.reduced_cost))
        reduced_cost = (prices[:, None] + self.reduced_cost).ravel()
        origin = (reduced_cost < excess).nonzero()[0]
        bytes_more = (steps[:, None] + self.bytes_more).ravel()[origin]
        order = bytes_more.argsort(kind="stable")
        origin, bytes_more = origin[order], bytes_more[order]
        reduced_cost = reduced_cost[origin]
        kept = _undominated(bytes_more, reduced_cost - multiplier * bytes_more)
        self.bytes_more, self.reduced_cost = bytes_more[kept], reduced_cost[kept]
        self.steps.append((stage, parents, origin[kept].astype(np.int32)))
        self._cut(cap)

    def _cut(self, cap: int) -> None:
        if len(self.bytes_more) <= cap:
            return
        order = np.argpartition(self.reduced_cost, cap)
        self.dropped = min(self.dropped, float(self.reduced_cost[order[cap]]))
        kept = np.sort(order[:cap])
        self.steps.append((None, len(self.bytes_more), kept.astype(np.int32)))
        self.bytes_more, self.reduced_cost = self.bytes_more[kept], self.reduced_cost[kept]

    def taken(self, depth: int, state: int) -> list[Integers]:
        """The candidates that `state` of the list after `depth` steps takes."""
        taken = []
        for stage, parents, origin in reversed(self.steps[:depth]):
            move, state = divmod(int(origin[state]), parents)
            if stage is not None and move:
                taken.append(np.arange(stage.begin[move - 1], stage.end[move - 1]))
        return taken


def _undominated(bytes_more: Integers, cost_more: Floats) -> Integers:
    """The states, sorted by bytes, that cost less than every lighter one; one for equal bytes."""
    better = np.ones(len(cost_more), dtype=np.bool_)
    np.less(cost_more[1:], np.minimum.accumulate(cost_more)[:-1], out=better[1:])
    kept = better.nonzero()[0]
    sizes = bytes_more[kept]
    last = np.ones(len(kept), dtype=np.bool_)
    np.not_equal(sizes[1:], sizes[:-1], out=last[:-1])
    return kept[last]


@dataclass(slots=True)
class _Best:
    """The least excess met and the two states that have it, as numbered in the lists at these depths."""

    excess: float
    depths: tuple[int, int] = (0, 0)
    states: tuple[int, int] | None = None


def _pair(left: Half, right: Half, core: Core, best: _Best) -> None:
    """Pairs every state of `left` with the heaviest state of `right` that still fits."""
    room = core.slack - left.bytes_more
    partner = np.searchsorted(right.bytes_more, room, side="right") - 1
    state = (partner >= 0).nonzero()[0]
    if not len(state):
        return
    partner = partner[state]
    excess = left.reduced_cost[state] + right.reduced_cost[partner]
    excess += core.multiplier * (room[state] - right.bytes_more[partner])
    least = int(excess.argmin())
    if excess[least] < best.excess:
        best.excess = float(excess[least])
        best.depths = len(left.steps), len(right.steps)
        best.states = int(state[least]), int(partner[least])


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one pass: states in a list, stages joined, the excess over `Core.waste` that is as good as none, and
    the `time.perf_counter` at which to stop."""

    states: int
    stages: int
    tolerance: float
    deadline: float


def search(core: Core, excess: float, limits: Limits) -> Outcome:
    """One pass within `limits`; `excess` is the incumbent's.

    Stops early once the incumbent is as good as optimal, or once nothing more can be proven under the caps.
    """
    best = _Best(excess - core.waste)
    left, right = Half(), Half()
    unseen, paired, blind = math.inf, 1, 0
    _pair(left, right, core, best)
    for number, (least, first, last) in enumerate(core.stages(best.excess, limits.tolerance)):
        dropped = min(left.dropped, right.dropped)
        blind += dropped <= limits.tolerance
        settled = (
            least >= best.excess or best.excess <= limits.tolerance or least >= dropped > limits.tolerance
        )
        if settled or number == limits.stages or blind > BLIND or perf_counter() > limits.deadline:
            unseen = least
            break
        shorter = left if len(left) <= len(right) else right
        shorter.join(core.stage(first, last), core.multiplier, best.excess, limits.states)
        if blind or len(left) * len(right) >= 4 * paired:
            paired = len(left) * len(right)
            _pair(left, right, core, best)
    _pair(left, right, core, best)
    floor = core.waste + min(unseen, left.dropped, right.dropped)
    if best.states is None:
        return Outcome(excess, None, floor)
    taken = left.taken(best.depths[0], best.states[0]) + right.taken(best.depths[1], best.states[1])
    index = np.concatenate(taken) if taken else np.empty(0, dtype=np.int64)
    return Outcome(best.excess + core.waste, core.candidates.take(index), floor)


def integer_program(core: Core, excess: float, *, tolerance: float, seconds: float) -> Outcome:
    """The same core by HiGHS (`scipy.optimize.milp`, zero relative gap), on whole units of bytes.

    Costs are scaled so that the largest move is worth 1e6, which puts HiGHS's absolute tolerances far below
    `tolerance`; the bytes of its answer are counted again and its bound is lowered by `tolerance`.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    count = len(core.bytes_more)
    scale = 1e6 / (core.multiplier * max(1, int(np.abs(core.bytes_more).max())))
    group = np.unique(core.candidates.group, return_inverse=True)[1]
    one_each = csr_array((np.ones(count), (group, np.arange(count))))
    weight = core.bytes_more.astype(np.float64)
    constraints = [
        LinearConstraint(one_each, -np.inf, 1),
        LinearConstraint(weight[None], -np.inf, core.slack),
    ]
    with quiet_stdout():
        answer = milp(
            (core.candidates.reduced_cost - core.multiplier * weight) * scale,
            integrality=np.ones(count, dtype=np.int64),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0, "time_limit": seconds},
        )
    spent = core.multiplier * core.slack + core.waste
    bound = getattr(answer, "mip_dual_bound", None)
    floor = 0.0 if bound is None or not math.isfinite(bound) else bound / scale + spent - tolerance
    taken = np.flatnonzero(answer.x > 0.5) if answer.x is not None else np.empty(0, dtype=np.int64)
    unused = core.slack - int(core.bytes_more[taken].sum())
    found = float(core.candidates.reduced_cost[taken].sum()) + core.multiplier * unused + core.waste
    apart = len(np.unique(group[taken])) == len(taken)
    if unused < 0 or not apart or found >= excess:
        return Outcome(excess, None, floor)
    return Outcome(found, core.candidates.take(taken), floor)
