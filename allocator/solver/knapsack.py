"""The exact solver of the multiple-choice knapsack: one option per group, least cost, within a budget.

What lives here: `solve`, which joins the relaxation (`relaxation.py`), the search of the core (`core_search.py`)
and, as a last resort, an integer program; and `Knapsack`, the same for many budgets of one table. The frontier
is `frontier.py`, the check of an answer `certificate.py`.

How it works (after Pisinger 1995, "A minimal algorithm for the multiple-choice knapsack problem"):

1. The Lagrangian relaxation gives a multiplier λ (the shadow price), a lower bound and a choice that fits.
2. The best swap of one or two options, then a beam over the groups that break near λ, give a first incumbent.
   Where all groups are near there is no beam: the first pass of 4 looks at the same candidates.
3. Reduced-cost fixing against the incumbent leaves a core, usually some tens of options.
4. Passes of `core.search` with growing caps improve the incumbent and raise the bound until they meet.
5. Where the caps are not enough, `scipy.optimize.milp` tries what is left of the core; failing that, the best
   choice is returned with the gap that remains.

Tolerances. Arithmetic is float64 on differences to the base option, so what is compared has the size of one
move, never that of the total. `proven` says that no choice is better by more than `TOLERANCE`·λ·max|Δbytes|,
Δbytes over the options of the core (the integer program: `PROGRAM_TOLERANCE`). Total bytes are int64 and
exact; `cost` is summed in float64. Ties break by position: equal problems give equal answers, unless the time
limit cuts one short.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from allocator.errors import InfeasibleError, ProblemTooLargeError
from allocator.problem import Floats, Integers, Problem, Solution
from allocator.solver.core_search import Core, Limits, integer_program, search
from allocator.solver.frontier import Frontier, frontier
from allocator.solver.relaxation import NEAR, Candidates, Pick, Relaxation, Table, relax

OPTION_CAP = 200_000_000
"""Most options taken on: beyond it the tables outgrow the memory of one machine."""
TOLERANCE = 1e-13
"""Of a proof, relative to λ·max|Δbytes|."""
PROGRAM_TOLERANCE = 1e-9
"""The same where HiGHS proved it: its own feasibility tolerances allow no better."""
BEAM = (256, 48)
"""List and stage cap of the pass that finds the first incumbent."""
START_CANDIDATES, BEAM_CANDIDATES = 600, 192
"""Candidates that the search for its start, and the pass itself, look at."""
MISS = 0.05
"""Price, relative to λ, of a byte by which a start of that pass misses the budget: the beam makes it up."""
PROGRAM_CAP = 20_000
"""Most candidates handed to the integer program."""
PASSES = ((2_048, 512), (32_768, 4_096), (400_000, 65_536))
"""List and stage caps of the passes that prove."""


def solve(problem: Problem, *, time_limit_seconds: float = 10.0) -> Solution:
    """The choice of least cost within the budget, with its certificate.

    A budget that every group's cheapest option fits leaves slack and has a shadow price of 0.
    `time_limit_seconds` bounds the search for a proof, not the relaxation; 0 returns the first incumbent with
    its gap. Raises `InfeasibleError` where even the smallest options exceed the budget, and
    `ProblemTooLargeError` where there are more than `OPTION_CAP` options.
    """
    deadline = perf_counter() + time_limit_seconds
    table = _table(problem)
    least = table.least_bytes()
    _check_feasible(least, problem.budget_bytes)
    relaxation = relax(table, problem.budget_bytes, least)
    return _search(problem, table, relaxation, problem.budget_bytes, deadline)


@dataclass(frozen=True, slots=True)
class Knapsack:
    """The options of a problem, read once to be solved for any number of budgets.

    The relaxation is looked up on the frontier, not searched for. The optimum is that of `solve`; where several
    choices cost the same, another may be taken.
    """

    problem: Problem
    table: Table
    frontier: Frontier

    @classmethod
    def of(cls, problem: Problem) -> Knapsack:
        """The budget of the problem plays no part. Raises `ProblemTooLargeError`."""
        return cls(problem, _table(problem), frontier(problem))

    def solve(self, budget_bytes: int, *, time_limit_seconds: float = 10.0) -> Solution:
        """As the function `solve`. Raises `InfeasibleError`."""
        deadline = perf_counter() + time_limit_seconds
        _check_feasible(int(self.frontier.total_bytes[0]), budget_bytes)
        relaxation = self._relaxation(self.frontier.within(budget_bytes))
        return _search(self.problem, self.table, relaxation, budget_bytes, deadline)

    def _relaxation(self, breakpoint: int) -> Relaxation:
        """Between a breakpoint and the next, whose edge has the multiplier."""
        line, problem, groups = self.frontier, self.problem, self.table.groups
        choice = line.choice(breakpoint)
        taken = problem.start[:-1] + choice
        base = Pick(choice[groups], problem.cost[taken[groups]], problem.size[taken[groups]])
        if breakpoint == len(line) - 1:
            return Relaxation(0.0, base, groups[:0])
        group = line.group[breakpoint]
        before, after = taken[group], problem.start[group] + line.option[breakpoint]
        saved, added = problem.cost[before] - problem.cost[after], problem.size[after] - problem.size[before]
        edges = slice(max(0, breakpoint - NEAR), breakpoint + NEAR)
        near = (
            np.flatnonzero(np.isin(groups, line.group[edges]))
            if len(groups) > NEAR
            else np.arange(len(groups))
        )
        return Relaxation(float(saved / added), base, near)


def _table(problem: Problem) -> Table:
    if len(problem.cost) > OPTION_CAP:
        raise ProblemTooLargeError(
            f"{len(problem.cost):,} options exceed the cap of {OPTION_CAP:,}; offer fewer bits or ranks"
        )
    return Table.of(problem)


def _check_feasible(least_bytes: int, budget_bytes: int) -> None:
    if least_bytes > budget_bytes:
        raise InfeasibleError(
            f"the smallest options take {least_bytes:,} bytes but the budget leaves {budget_bytes:,}; "
            f"raise it by {least_bytes - budget_bytes:,} bytes or offer smaller options",
            least_bytes,
        )


def _search(
    problem: Problem, table: Table, relaxation: Relaxation, budget_bytes: int, deadline: float
) -> Solution:
    """From the relaxation to a choice, proven where time and caps allow."""
    multiplier, base, near = relaxation.multiplier, relaxation.base, relaxation.near
    hunt = _Hunt(relaxation, budget_bytes - base.total_bytes, deadline)
    if hunt.proven:
        return hunt.solution(problem, table.groups)
    candidates = table.rows(near).survivors(multiplier, base.take(near), hunt.excess)
    hunt.pair(candidates)
    if len(near) < len(table):
        hunt.beam(candidates)
        if hunt.proven or perf_counter() > deadline:
            return hunt.solution(problem, table.groups)
        candidates = table.survivors(multiplier, base, hunt.excess)
    hunt.prove(candidates)
    return hunt.solution(problem, table.groups)


class _Hunt:
    """The best choice so far, and what is known of the others.

    excess: cost of the best choice above the relaxation's bound. floor: no choice has an excess below it that
    is also below `excess`. swaps: the candidates that the best choice takes instead of the base.
    """

    def __init__(self, relaxation: Relaxation, slack_bytes: int, deadline: float) -> None:
        self.relaxation = relaxation
        self.slack_bytes = slack_bytes
        self.deadline = deadline
        self.excess = relaxation.multiplier * slack_bytes
        self.floor = 0.0
        self.swaps: Candidates | None = None

    @property
    def proven(self) -> bool:
        return self.floor >= self.excess

    def pair(self, candidates: Candidates) -> None:
        """A first incumbent: the best swap of one or two of the candidates."""
        candidates = candidates.take(_best_and_others(len(candidates), START_CANDIDATES))
        excess, swaps = best_pair(candidates, self.slack_bytes, self.relaxation.multiplier, math.inf)
        if excess < self.excess:
            self.excess, self.swaps = excess, candidates.take(swaps)

    def beam(self, candidates: Candidates) -> None:
        """A better incumbent: a beam around the swap that most cheaply brings the total close to the budget."""
        candidates = candidates.take(_best_and_others(len(candidates), START_CANDIDATES))
        anchor, others = self._anchor(candidates)
        self._pass_over(others.take(_best_and_others(len(others), BEAM_CANDIDATES)), anchor, *BEAM)

    def prove(self, candidates: Candidates) -> None:
        """Searches all candidates, with growing caps, until the incumbent meets the floor."""
        nothing = candidates.take(np.arange(0))
        for cap, stage_cap in PASSES:
            if self.proven or perf_counter() > self.deadline:
                return
            self.floor = max(self.floor, self._pass_over(candidates, nothing, cap, stage_cap))
        if not self.proven:
            self._last_resort(candidates.take(candidates.reduced_cost < self.excess))

    def _last_resort(self, candidates: Candidates) -> None:
        seconds = self.deadline - perf_counter()
        if len(candidates) > PROGRAM_CAP or seconds <= 0:
            return
        core = Core.of(candidates, self.slack_bytes, self.relaxation.multiplier)
        tolerance = PROGRAM_TOLERANCE * self.relaxation.multiplier * _largest(candidates.bytes_more)
        outcome = integer_program(core, self.excess, tolerance=tolerance, seconds=seconds)
        if outcome.swaps is not None:
            self.excess, self.swaps = outcome.excess, outcome.swaps
        closed = outcome.floor >= self.excess - 2 * tolerance
        self.floor = math.inf if closed else max(self.floor, outcome.floor)

    def solution(self, problem: Problem, groups: Integers) -> Solution:
        choice = np.empty(problem.group_count, dtype=np.int64)
        choice[groups] = self.relaxation.base.choice
        if self.swaps is not None:
            choice[self.swaps.group] = self.swaps.option
        taken = problem.start[:-1] + choice
        cost = float(problem.cost[taken].sum())
        gap = 0.0 if self.proven else self.excess - self.floor
        return Solution(
            choice=choice,
            cost=cost,
            total_bytes=int(problem.size[taken].sum()),
            lower_bound=cost - gap,
            gap=gap,
            proven=self.proven,
            shadow_price=self.relaxation.multiplier,
        )

    def _anchor(self, candidates: Candidates) -> tuple[Candidates, Candidates]:
        """Swaps that bring the total close to the budget, and the candidates of all other groups."""
        anchor, left = candidates.take(np.arange(0)), self.slack_bytes
        price = MISS * self.relaxation.multiplier
        while True:
            score, swaps = best_pair(candidates, left, price, price)
            if score >= price * abs(left):
                return anchor, candidates
            anchor = Candidates.concatenated((anchor, candidates.take(swaps)))
            left = self.slack_bytes - int(anchor.bytes_more.sum())
            candidates = candidates.take(~np.isin(candidates.group, anchor.group))

    def _pass_over(self, candidates: Candidates, anchor: Candidates, cap: int, stage_cap: int) -> float:
        """One pass with the anchor's swaps made; returns the floor it shows among these candidates, infinite
        where the incumbent is optimal."""
        paid = float(anchor.reduced_cost.sum())
        candidates = candidates.take(candidates.reduced_cost < self.excess - paid)
        slack_bytes = self.slack_bytes - int(anchor.bytes_more.sum())
        core = Core.of(candidates, slack_bytes, self.relaxation.multiplier)
        tolerance = TOLERANCE * self.relaxation.multiplier * _largest(candidates.bytes_more)
        limits = Limits(cap, stage_cap, tolerance, self.deadline)
        outcome = search(core, self.excess - paid, limits)
        if outcome.swaps is not None:
            self.excess, self.swaps = outcome.excess + paid, Candidates.concatenated((anchor, outcome.swaps))
        return math.inf if self.excess - paid <= core.waste + tolerance else outcome.floor


def best_pair(candidates: Candidates, slack_bytes: int, below: float, above: float) -> tuple[float, Integers]:
    """The one or two candidates of least reduced cost + `below` per byte left + `above` per byte too many.

    Returns that sum and their indices. Every candidate, and none, is tried with its best partner on either
    side; where the two would be of one group the pair is passed over.
    """
    order = np.argsort(np.concatenate(([0], candidates.bytes_more)), kind="stable")
    bytes_more = np.concatenate(([0], candidates.bytes_more))[order]
    reduced_cost = np.concatenate(([0.0], candidates.reduced_cost))[order]
    group = np.concatenate(([-1], candidates.group))[order]
    wanted = slack_bytes - bytes_more
    split = np.searchsorted(bytes_more, wanted, side="right")
    best, pair = math.inf, (0, 0)
    for price, lighter in ((below, True), (above, False)):
        if math.isinf(price):
            continue
        first = np.flatnonzero(split > 0 if lighter else split < len(split))
        if lighter:
            second = _first_minimum_so_far(reduced_cost - price * bytes_more)[split[first] - 1]
        else:
            backwards = _first_minimum_so_far((reduced_cost + price * bytes_more)[::-1])[::-1]
            second = len(split) - 1 - backwards[split[first]]
        missed = np.abs(wanted[first] - bytes_more[second])
        score = reduced_cost[first] + reduced_cost[second] + price * missed
        score[group[first] == group[second]] = math.inf
        if len(score) and score.min() < best:
            least = int(score.argmin())
            best, pair = float(score[least]), (int(first[least]), int(second[least]))
    chosen = order[list(pair)]
    return best, chosen[chosen > 0] - 1


def _first_minimum_so_far(values: Floats) -> Integers:
    """(n,) int64: where the least of values[: i + 1] is, for every i."""
    fresh = np.ones(len(values), dtype=np.bool_)
    fresh[1:] = values[1:] < np.minimum.accumulate(values)[:-1]
    return np.maximum.accumulate(np.where(fresh, np.arange(len(values)), 0))


def _best_and_others(count: int, most: int) -> Integers:
    """Up to `most` of `count` positions, ascending: three in four from the front, the rest spread over all,
    because where costs are linear in bytes the front is nothing but ties of the first few groups."""
    if count <= most:
        return np.arange(count)
    return np.unique(
        np.concatenate((np.arange(most * 3 // 4), np.linspace(0, count - 1, most // 4).astype(np.int64)))
    )


def _largest(bytes_more: Integers) -> int:
    return int(np.abs(bytes_more).max()) if len(bytes_more) else 0
