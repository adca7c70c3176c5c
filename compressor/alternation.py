"""GPTQ and low-rank factors in turn, from three starts.

What lives here: the search for Q and L·R of several matrices at once, all of one shape and under one Hessian H = SSᵀ.
Which options take it is for `decompose.py`. Shapes: P problems, O rows, I columns, r rank, G groups of columns.

Each round fits factors to W − Q, then quantizes W − LR (Li et al., LoftQ, arXiv 2310.08659; Saha et al., CALDERA,
arXiv 2405.18886, with H in both steps). A search ends when a refit gains under 1 %; the best pair is kept. It is tried
from two starts, since neither always wins: from Q of W, which improves over several rounds, and from Q of W − L·R with
L·R the best low-rank part of W itself, which is at its fixed point after one. The second is tried only where it can
win, and that can be foretold: GPTQ's output error is Σ d_i e_oi² over its rounding errors, d the pivots of H (QuIP,
arXiv 2307.13304), and those are as large as the range of their group.

A third start is for inputs of which a few directions hold much of H, as outlier channels do: L can make good any error
of Q along the rows of R, so Q is rounded under what is left of H without them. It is foretold in the same way, and
tried where it promises something.

Both end with coordinate descent on the codes of Q (`descent.py`), which alternation starts without: from codes that it
has bent to W alone, factors find less.

One product by S a round gives the error, tr((W − Q − LR) H (W − Q − LR)ᵀ) = ‖(W − Q)S − L(RS)‖², and the next factors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from allocator.storage import Option
from compressor.curvature import Curvature
from compressor.decomposition import Decomposition, rest_of
from compressor.descent import descended
from compressor.gptq import Factor, rounded
from compressor.grid import Quantized, group_ranges, grouped
from compressor.lowrank import Fit, alike, factorize, leading_directions, sharpened, through
from compressor.precision import ROOM, Operand, product, subtract_product
from compressor.residual import put_columns, residuals, squared_distances

LEAST_GAIN = 0.01
ABSORBING_ROUNDS = 2
WORTH_ABSORBING = 1.1
"""Error foretold of the third start, over the least so far, up to which it is tried."""

_Start = tuple[int, int, int]
_Cut = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Problem:
    """One matrix (O, I), its largest magnitude, and one option; `place` is where the caller put it.

    Matrices lie in memory column by column, as GPTQ and descent work on them."""

    place: int
    weight_OI: Tensor
    largest: float
    option: Option

    @property
    def start(self) -> _Start:
        """What Q of W depends on."""
        return id(self.weight_OI), self.option.bits, self.option.group_size


def _cut_of(problem: Problem) -> _Cut:
    """What the best low-rank part of W depends on."""
    return id(problem.weight_OI), problem.option.rank, problem.option.factor_bits


def quantized_of(problems: Sequence[Problem], factor: Factor) -> list[Quantized]:
    """Q of W."""
    return _rounded(torch.cat([p.weight_OI.T for p in problems], dim=1), problems, factor)


def descended_of(
    problems: Sequence[Problem], quantized: Sequence[Quantized], curvature: Curvature
) -> list[Quantized]:
    """Q of W with better codes."""
    largest = max(problem.largest for problem in problems)
    return descended([p.weight_OI for p in problems], quantized, curvature.hessian_II, largest=largest)


def _rounded(target_IR: Tensor, problems: Sequence[Problem], factor: Factor) -> list[Quantized]:
    """Q of matrices beside each other, one a problem, which are used up."""
    options, largest = [p.option for p in problems], max(p.largest for p in problems)
    bits, group_sizes = [o.bits for o in options], [o.group_size for o in options]
    return rounded(target_IR, largest, factor, bits, group_sizes)


def alternate(
    problems: Sequence[Problem], curvature: Curvature, starts: Starts, rounds: int
) -> list[_Search]:
    """Every problem from both starts."""
    searches = starts.searches(problems)
    _refit(searches, curvature)
    active = searches
    for _ in range(rounds - 1):
        _leave(search for search in active if not search.gained)
        if not (active := [search for search in active if search.gained]):
            break
        _requantize(active, curvature)
        _sharpen(active)
        _refit(active, curvature)
    _leave(active)
    if again := _restarted(searches, starts, curvature):
        _requantize(again, curvature)
        _consider(again, curvature)
        _sharpen(again)
        _refit(again, curvature)
        _requantize(again, curvature)
        _consider(again, curvature)
        _leave(again)
    _absorb(searches, curvature)
    _polish(searches, curvature)
    return searches


def _leave(searches: Iterable[_Search]) -> None:
    """Free what they stand on, which searches that began together share."""
    for search in searches:
        del search.quantized, search.residual, search.weighted


@dataclass(frozen=True, slots=True)
class _Part:
    """Factors found along orthonormal directions (O, r)."""

    fit: Fit
    direction_Or: Tensor


class Starts:
    """Where searches start, each found once: Q of W and its leading directions, and W's best low-rank parts."""

    def __init__(self, curvature: Curvature, problems: Sequence[Problem]) -> None:
        self.curvature, self.problems = curvature, problems
        self.largest = max((problem.option.rank for problem in problems), default=0)
        self.wanted = {problem.start for problem in problems}
        self.quantized: dict[_Start, Quantized] = {}
        self.directions: dict[_Start, Tensor] = {}
        self.parts: dict[_Cut, _Part] = {}
        self.range_sums: dict[tuple[_Cut, int], Tensor] = {}

    def offer(self, problems: Sequence[Problem], quantized: Sequence[Quantized]) -> None:
        """Q of W, which a search may start from."""
        for problem, q in zip(problems, quantized, strict=True):
            if problem.start in self.wanted:
                self.quantized[problem.start] = q

    def _quantize(self, problems: Sequence[Problem]) -> None:
        """Find every Q of W that these need and nobody offered."""
        missing = {p.start: p for p in problems if p.start not in self.quantized}
        if missing:
            found = quantized_of(list(missing.values()), self.curvature.factor)
            self.quantized |= dict(zip(missing, found, strict=True))

    def searches(self, problems: Sequence[Problem]) -> list[_Search]:
        """Standing on Q of W; those that start alike share what they stand on."""
        self._quantize(problems)
        searches = [_Search(problem) for problem in problems]
        first = {search.problem.start: search for search in reversed(searches)}
        _stand(list(first.values()), [self.quantized[start] for start in first], self.curvature)
        for search in first.values():
            search.plain_error = search.weighted.squared_norms(1)[0]
            search.plain_sums_G = self.plain_sums(search.problem)
            search.plain_ranges = search.ranges(search.plain_sums_G, self.curvature.factor)
        self._lead({start: search.weighted for start, search in first.items()})
        for search in searches:
            start = search.problem.start
            search.stand_like(first[start])
            search.direction_Or = self.directions[start][:, : search.option.rank]
        return searches

    def _lead(self, weighted: dict[_Start, Operand]) -> None:
        """Find leading directions that are not known yet."""
        missing = [start for start in weighted if start not in self.directions]
        if missing:
            found = leading_directions([weighted[start] for start in missing], self.largest)
            self.directions |= dict(zip(missing, found, strict=True))

    def part(self, problem: Problem) -> _Part:
        """The best low-rank part of W."""
        if not self.parts:
            for bits in sorted({p.option.factor_bits for p in self.problems}):
                self._find_parts({_cut_of(p): p for p in self.problems if p.option.factor_bits == bits}, bits)
        return self.parts[_cut_of(problem)]

    def _find_parts(self, problem_of: dict[_Cut, Problem], bits: int) -> None:
        """All of one width of factors at once."""
        whole = {(id(p.weight_OI), 0, 0): Operand.of(p.weight_OI, p.largest) for p in problem_of.values()}
        self._lead({start: through(w, self.curvature.root) for start, w in whole.items()})
        starts = [(id(p.weight_OI), 0, 0) for p in problem_of.values()]
        ranks = [p.option.rank for p in problem_of.values()]
        directions = [self.directions[s][:, :rank] for s, rank in zip(starts, ranks, strict=True)]
        found = factorize([whole[s] for s in starts], directions, self.curvature.factor, bits)
        self.parts |= dict(zip(problem_of, map(_Part, found, directions), strict=True))

    def plain_sums(self, problem: Problem) -> Tensor:
        """`range_sums` of W."""
        key = (id(problem.weight_OI), 0, 0), problem.option.group_size
        if key not in self.range_sums:
            self.range_sums[key] = range_sums(problem.weight_OI, problem.option.group_size)
        return self.range_sums[key]

    def sums_left(self, problem: Problem) -> Tensor:
        """`range_sums` of what W's best low-rank part leaves."""
        key = _cut_of(problem), problem.option.group_size
        if key not in self.range_sums:
            fit = self.part(problem).fit
            rest_OI = rest_of(problem.weight_OI, fit.left, fit.right)
            self.range_sums[key] = range_sums(rest_OI, problem.option.group_size)
        return self.range_sums[key]


class _Search:
    """The Q and L·R that a problem stands at, and the best pair so far."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.option = problem, problem.option
        self.best = Decomposition(problem.option, None, None)
        self.least = self.error = float("inf")
        self.gained = False

    def stand_like(self, other: _Search) -> None:
        self.quantized, self.residual, self.weighted = other.quantized, other.residual, other.weighted
        self.plain_error, self.plain_ranges = other.plain_error, other.plain_ranges
        self.plain_sums_G = other.plain_sums_G

    def apart(self, weighted_right: Operand) -> tuple[Operand, Tensor]:
        """(W − Q)S and L(RS), (I, O), whose distance is the error."""
        return self.weighted.T, product(weighted_right.T, self.fit.left)

    def foretold(self, sums_G: Tensor, factor: Factor) -> Tensor:
        """Error that Q of a matrix of these `range_sums` is to leave under the H of a factor, from what Q of W left."""
        return self.plain_error * self.ranges(sums_G, factor) / self.plain_ranges

    def ranges(self, sums_G: Tensor, factor: Factor) -> Tensor:
        """The squared ranges of all groups, each times the pivots of its columns."""
        return sums_G @ grouped(factor.pivots()[None], self.option.group_size).sum(dim=2)[0]


def range_sums(w_OI: Tensor, group_size: int) -> Tensor:
    """(G,): of every group of columns, the squared ranges of all rows."""
    return group_ranges(w_OI, group_size).square_().sum(dim=0)


def _restarted(searches: Sequence[_Search], starts: Starts, curvature: Curvature) -> list[_Search]:
    """Searches where Q of W − LR, L·R the best low-rank part of W, may leave the least error; they take up that L·R."""
    foretold = torch.stack([s.foretold(starts.sums_left(s.problem), curvature.factor) for s in searches])
    again = []
    for search, error in zip(searches, foretold.tolist(), strict=True):
        if error < worth_trying(search.option.bits) * search.least:
            part = starts.part(search.problem)
            search.fit, search.direction_Or = part.fit, part.direction_Or
            again.append(search)
    return again


def _absorb(searches: Sequence[_Search], curvature: Curvature) -> None:
    """The third start: Q of W under H down-dated by R, then factors of what that left, and once more with the new R."""
    for _ in range(ABSORBING_ROUNDS):
        begun = list(_absorbed(searches, curvature))
        if not begun:
            return
        searches = [search for search, _ in begun]
        _stand(searches, [quantized for _, quantized in begun], curvature)
        _lead(searches)
        _refit(searches, curvature)
        _leave(searches)


def _absorbed(searches: Sequence[_Search], curvature: Curvature) -> Iterator[tuple[_Search, Quantized]]:
    """Q of W under the down-dated H, of the searches that this promises something."""
    for places in alike([search.option.rank for search in searches]):
        members = [searches[p] for p in places]
        rests = curvature.deflated([search.best_fit.right_rI for search in members])
        for search, rest in zip(members, rests, strict=True):
            if rest is None:
                continue
            if search.foretold(search.plain_sums_G, rest).item() <= WORTH_ABSORBING * search.least:
                (quantized,) = quantized_of([search.problem], rest)
                yield search, quantized


def _lead(searches: Sequence[_Search]) -> None:
    """The leading directions of (W − Q)S."""
    for places in alike([search.option.rank for search in searches]):
        members = [searches[p] for p in places]
        found = leading_directions([search.weighted for search in members], members[0].option.rank)
        for search, direction_Or in zip(members, found, strict=True):
            search.direction_Or = direction_Or


def worth_trying(bits: int) -> float:
    """Error foretold of the second start, over the first's, up to which it is tried: coarse grids clip, tell less."""
    return 1 + 0.4 * 2 ** (2 - bits)


def _refit(searches: Sequence[_Search], curvature: Curvature) -> None:
    """Factors of W − Q along the present directions."""
    for bits in sorted({s.option.factor_bits for s in searches}):
        members = [s for s in searches if s.option.factor_bits == bits]
        residuals, directions = [s.residual for s in members], [s.direction_Or for s in members]
        found = factorize(residuals, directions, curvature.factor, bits)
        for search, fit in zip(members, found, strict=True):
            search.fit = fit
    before = [search.error for search in searches]
    _consider(searches, curvature)
    for search, error in zip(searches, before, strict=True):
        search.gained = search.error < error * (1 - LEAST_GAIN)


def _requantize(searches: Sequence[_Search], curvature: Curvature) -> None:
    """Q of W − LR."""
    weight_OI = searches[0].problem.weight_OI
    rest_IR = weight_OI.new_empty(weight_OI.shape[1], len(searches) * len(weight_OI))
    for search, rest_IO in zip(searches, rest_IR.split(len(weight_OI), dim=1), strict=True):
        put_columns(rest_IO, search.problem.weight_OI.T)
        subtract_product(rest_IO, search.fit.right.T, search.fit.left)
    found = _rounded(rest_IR, [search.problem for search in searches], curvature.factor)
    del rest_IR
    _stand(searches, found, curvature)


def _stand(searches: Sequence[_Search], quantized: Sequence[Quantized], curvature: Curvature) -> None:
    """Have searches stand on Q."""
    problems = [search.problem for search in searches]
    rows, largest = len(problems[0].weight_OI), ROOM * max(problem.largest for problem in problems)
    whole, parts = residuals((p.weight_OI for p in problems), quantized, rows, largest)
    weighted = through(whole, curvature.root).split([rows] * len(problems))
    for search, *stand in zip(searches, quantized, parts, weighted, strict=True):
        search.quantized, search.residual, search.weighted = stand


def _polish(searches: Sequence[_Search], curvature: Curvature) -> None:
    """Better codes for the best Q, its factors as they are."""
    quantized = [search.best.quantized for search in searches if search.best.quantized is not None]
    rests = [rest_of(s.problem.weight_OI, s.best_fit.left, s.best_fit.right) for s in searches]
    largest = max(search.problem.largest for search in searches)
    polished = descended(rests, quantized, curvature.hessian_II, largest=largest)
    for search, better in zip(searches, polished, strict=True):
        search.best = replace(search.best, quantized=better)


def _sharpen(searches: Sequence[_Search]) -> None:
    """Directions a step nearer to the leading ones of (W − Q)S: the last round's are near already."""
    bases = [search.direction_Or for search in searches]
    found = sharpened([search.weighted for search in searches], bases)
    for search, direction_Or in zip(searches, found, strict=True):
        search.direction_Or = direction_Or


def _consider(searches: Sequence[_Search], curvature: Curvature) -> None:
    """Measure where they stand, and keep what is the best so far."""
    rights = [search.fit.right_rI for search in searches]
    right = Operand.of(torch.cat(rights), 2 * max(search.fit.largest for search in searches))
    weighted = through(right, curvature.root).split(list(map(len, rights)))
    errors = squared_distances(s.apart(part) for s, part in zip(searches, weighted, strict=True))
    for search, error in zip(searches, errors.tolist(), strict=True):
        search.error = error
        if error < search.least:
            search.least, search.best_fit = error, search.fit
            search.best = Decomposition(search.option, search.quantized, search.fit.factors)
