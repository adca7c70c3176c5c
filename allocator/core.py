"""The integer search over the options that reduced-cost fixing leaves: meet in the middle.

What lives here: `Core`, what is searched, and `search`, one pass over it with lists of bounded length.

A choice is worth its *excess* over the relaxation's bound: Σ reduced cost + λ·unused bytes, both never negative. Only
groups with a surviving option can move, and a choice better than the incumbent has Σ reduced cost below its excess.
Stages (the options of a group, or a ladder of groups, see below) join in order of their least reduced cost, each the
shorter of two Pareto lists of (bytes more, Σ reduced cost); a list keeps no state beaten in both bytes and cost, nor
one whose reduced cost reaches the incumbent's excess. Binary search pairs the lists (Horowitz & Sahni 1974), which
lowers the incumbent, which shortens the lists. The pass is over when the next stage's least reduced cost reaches the
excess. A list that outgrows its cap drops the states of highest reduced cost (a beam), and the least dropped bounds
what may have been missed: a pass proves exactly what it claims, capped or not.

Weights are divided by their greatest common divisor: the remainder of the slack can never be used and is charged to
the bound. Groups with one surviving option each, of equal weight, form a *ladder*: of any k of them only the cheapest
k matter, so a ladder is one integer count. That holds for identical layers above all, whose symmetric choices would
otherwise multiply; identical groups with several options collapse in the lists, where equal bytes keep one state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from allocator.problem import Floats, Integers
from allocator.relaxation import Candidates

EXPANSION_CAP = 1 << 22
"""Most states made at once, before pruning: 100 MB."""
LADDER = 16
"""Most groups in one stage."""
_ZERO_BYTES, _ZERO_COST = np.zeros(1, dtype=np.int64), np.zeros(1)


@dataclass(frozen=True, slots=True)
class Stage:
    """A decision: nothing, or one of m moves. bytes_more (m,) int64 and reduced_cost (m,) float64 ascending; move j
    takes the candidates index[begin[j]:end[j]]."""

    bytes_more: Integers
    reduced_cost: Floats
    index: Integers
    begin: Integers
    end: Integers

    def taken(self, move: int) -> Integers:
        return self.index[self.begin[move] : self.end[move]]


@dataclass(frozen=True, slots=True)
class Core:
    """Candidates in the order of their groups, bytes in units of their greatest common divisor.

    bytes_more (n,) int64, in units; slack: such units free; multiplier: cost per unit. waste: the excess that no
    choice of the core avoids, λ·(slack mod unit).
    """

    candidates: Candidates
    bytes_more: Integers
    slack: int
    multiplier: float
    waste: float

    @classmethod
    def of(cls, candidates: Candidates, slack_bytes: int, multiplier: float) -> Core:
        """`candidates` by ascending reduced cost."""
        unit = greatest_common_divisor(candidates.bytes_more) or abs(slack_bytes) + 1
        waste = multiplier * (slack_bytes % unit)
        grouped = candidates.take(np.argsort(candidates.group, kind="stable"))
        return cls(grouped, grouped.bytes_more // unit, slack_bytes // unit, multiplier * unit, waste)

    def stages(self, excess: float, most: int) -> tuple[list[Stage], float]:
        """The first `most` stages by least reduced cost, and a lower bound on that of any left out."""
        if excess <= 0 or not len(self.candidates):
            return [], math.inf
        price = self.candidates.reduced_cost
        first = np.flatnonzero(np.diff(self.candidates.group, prepend=-1))
        count = np.diff(first, append=len(self.candidates))
        stages = list(self._ladders(first[count == 1], excess))
        wide = np.flatnonzero(count > 1)
        wide = wide[np.argsort(price[first[wide]], kind="stable")]
        stages += [self._moves_of_one(int(first[row]), int(count[row])) for row in wide[:most]]
        stages.sort(key=lambda stage: float(stage.reduced_cost[0]))
        left_out = [float(stage.reduced_cost[0]) for stage in stages[most : most + 1]]
        left_out += [float(price[first[row]]) for row in wide[most : most + 1]]
        return stages[:most], min(left_out, default=math.inf)

    def _moves_of_one(self, first: int, count: int) -> Stage:
        rows, begin = slice(first, first + count), np.arange(count)
        return Stage(
            self.bytes_more[rows], self.candidates.reduced_cost[rows], begin + first, begin, begin + 1
        )

    def _ladders(self, index: Integers, excess: float) -> Iterator[Stage]:
        """Ladders of the candidates at `index`, each the only one of its group."""
        index = index[np.lexsort((self.candidates.reduced_cost[index], self.bytes_more[index]))]
        weights = self.bytes_more[index]
        heads = np.flatnonzero(np.concatenate(([True], weights[1:] != weights[:-1]))[: len(index)])
        for head, end in zip(heads.tolist(), [*heads[1:].tolist(), len(index)], strict=False):
            yield from self._ladder(index[head:end], excess)

    def _ladder(self, index: Integers, excess: float) -> Iterator[Stage]:
        """Candidates of equal weight by ascending reduced cost. Equal costs go in powers of two, others in runs."""
        price = self.candidates.reduced_cost[index]
        payable = 1 + int(np.searchsorted(np.cumsum(price)[:-1], excess))
        index, price = index[:payable], price[:payable]
        if len(index) > LADDER and price[0] == price[-1]:
            yield from self._powers_of_two(index)
            return
        for head in range(0, len(index), LADDER):
            run = index[head : head + LADDER]
            number = np.arange(1, len(run) + 1)
            total = np.cumsum(price[head : head + LADDER])
            yield Stage(self.bytes_more[run] * number, total, run, np.zeros_like(number), number)

    def _powers_of_two(self, index: Integers) -> Iterator[Stage]:
        copies = 1
        while len(index):
            run, index = index[:copies], index[copies:]
            one, all_of_it = np.zeros(1, dtype=np.int64), np.array([len(run)])
            yield Stage(
                self.bytes_more[run[:1]] * len(run),
                self.candidates.reduced_cost[run[:1]] * len(run),
                run,
                one,
                all_of_it,
            )
            copies *= 2


@dataclass(frozen=True, slots=True)
class Outcome:
    """excess: that of the best choice known. swaps: the candidates it takes instead of the base, None where the pass
    found nothing better. floor: no choice has less excess than min(excess, floor)."""

    excess: float
    swaps: Candidates | None
    floor: float


def greatest_common_divisor(values: Integers) -> int:
    """Of all |values|, 0 where there is none; reads them about once, not once per step of Euclid's algorithm."""
    divisor = 0
    rest = values[values != 0]
    while len(rest):
        divisor = math.gcd(divisor, int(rest[0]))
        rest = rest[rest % divisor != 0]
    return divisor


@dataclass(slots=True)
class Half:
    """A Pareto list: bytes_more ascending, reduced_cost, and for every stage joined, or cut, where each state came from:
    its index in the list before, plus that list's length for every move.

    dropped: the least reduced cost among the states cut off by a cap.
    """

    bytes_more: Integers = field(default_factory=lambda: np.zeros(1, dtype=np.int64))
    reduced_cost: Floats = field(default_factory=lambda: np.zeros(1))
    steps: list[tuple[Stage | None, int, Integers]] = field(default_factory=list)
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
        self.steps.append((stage, parents, origin[kept]))
        self._cut(cap)

    def _cut(self, cap: int) -> None:
        if len(self.bytes_more) <= cap:
            return
        order = np.argpartition(self.reduced_cost, cap)
        self.dropped = min(self.dropped, float(self.reduced_cost[order[cap]]))
        kept = np.sort(order[:cap])
        self.steps.append((None, len(self.bytes_more), kept))
        self.bytes_more, self.reduced_cost = self.bytes_more[kept], self.reduced_cost[kept]

    def taken(self, depth: int, state: int) -> list[Integers]:
        """The candidates that `state` of the list after `depth` steps takes."""
        taken = []
        for stage, parents, origin in reversed(self.steps[:depth]):
            move, state = divmod(int(origin[state]), parents)
            if stage is not None and move:
                taken.append(stage.taken(move - 1))
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
    """The least excess met, and the pair of states that has it; their indices are of the lists at these depths."""

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


def search(
    core: Core, excess: float, *, cap: int, stage_cap: int, tolerance: float, deadline: float
) -> Outcome:
    """One pass, with lists of at most `cap` states over at most `stage_cap` stages.

    `excess` is the incumbent's. Stops once that is within `tolerance` of what no choice can avoid, once nothing more
    can be proven under the cap, or at `deadline` (`time.perf_counter`).
    """
    best = _Best(excess - core.waste)
    left, right = Half(), Half()
    stages, unseen = core.stages(best.excess, stage_cap)
    paired = 1
    _pair(left, right, core, best)
    for stage in stages:
        least = float(stage.reduced_cost[0])
        settled = least >= min(best.excess, left.dropped, right.dropped) or best.excess <= tolerance
        if settled or perf_counter() > deadline:
            unseen = min(unseen, least)
            break
        shorter = left if len(left) <= len(right) else right
        shorter.join(stage, core.multiplier, best.excess, cap)
        if len(left) * len(right) >= 4 * paired:
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
    answer = milp(
        (core.candidates.reduced_cost - core.multiplier * weight) * scale,
        integrality=np.ones(count, dtype=np.int64),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, -np.inf, 1),
            LinearConstraint(weight[None], -np.inf, core.slack),
        ],
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
