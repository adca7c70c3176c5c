"""Quantization and low-rank factors in turn (alternating minimisation), from three initialisations.

What lives here: the search for Q and L·R of several matrices at once, all of one shape and under one Hessian H = SSᵀ.
Which options take it is for `decompose.py`. Shapes: P problems, O rows, I columns, r rank, G groups of columns.

A round fits factors to W − Q, then quantizes W − LR (Li et al., LoftQ, arXiv 2310.08659; Saha et al., CALDERA,
arXiv 2405.18886, with H in both steps). One product by S a round gives the error,
tr((W − Q − LR) H (W − Q − LR)ᵀ) = ‖(W − Q)S − L(RS)‖², and the directions of the next factors.

1. From GPTQ: Q of W, then rounds until one gains under 1 %.
2. From low rank: Q of W − L·R, with L·R the best low-rank part of W itself, which is at its fixed point after one
   round. It is tried only where it can win. That can be predicted: GPTQ's output error is Σ d_i e_oi² over its rounding
   errors, d the pivots of H (QuIP, arXiv 2307.13304), and those are as large as the range of their group.
3. From the deflated Hessian: where a few directions hold much of H, as with outlier channels, L can make good any
   error of Q along the rows of R. So Q is rounded under what is left of H without them, where the same prediction
   promises something; then factors are fitted to what that left, and once more with the new R.
4. Coordinate descent on the codes of the best Q (`descent.py`), its factors as they are. It comes last: from codes
   that descent has bent to W alone, factors find less.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from allocator.storage import Option
from compressor.cuda.residual import put_columns, residuals, squared_distances
from compressor.cuda.scaled_half import ROOM, Operand, product, subtract_product
from compressor.grid import Quantized, group_ranges, grouped
from compressor.lowrank.decomposition import Decomposition, rest_of
from compressor.lowrank.factorize import Fit, alike, factorize, leading_directions, sharpened, through
from compressor.lowrank.hessian import Curvature
from compressor.quantize.descent import descended
from compressor.quantize.gptq import Factor, rounded

LEAST_GAIN = 0.01
DEFLATION_ROUNDS = 2
DEFLATION_RATIO = 1.1
"""Predicted error of the third initialisation, over the least so far, up to which it is tried."""

QuantizedKey = tuple[int, int, int]
"""What Q of W depends on: the matrix, bits, group size. (matrix, 0, 0) is W itself."""
PartKey = tuple[int, int, int]
"""What the best low-rank part of W depends on: the matrix, rank, factor bits."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One matrix (O, I), its largest magnitude, and one option.

    matrix: its number among the matrices of a call. place: where the caller put the problem. Matrices lie in memory
    column by column, as GPTQ and descent work on them.
    """

    place: int
    matrix: int
    weight_OI: Tensor
    largest: float
    option: Option

    @property
    def quantized_key(self) -> QuantizedKey:
        return self.matrix, self.option.bits, self.option.group_size

    @property
    def part_key(self) -> PartKey:
        return self.matrix, self.option.rank, self.option.factor_bits


@dataclass(frozen=True, slots=True)
class Residual:
    """Q, W − Q (O, I) and (W − Q)S (O, I)."""

    quantized: Quantized
    rest: Operand
    weighted: Operand


@dataclass(frozen=True, slots=True)
class Factorization:
    """Factors along orthonormal directions (O, r), and the error that they leave of their residual."""

    direction_Or: Tensor
    fit: Fit
    error: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """Q and L·R of one problem, and their error."""

    quantized: Quantized
    fit: Fit
    error: float


@dataclass(frozen=True, slots=True)
class Baseline:
    """What Q of W leaves, from which errors of other Q are predicted.

    range_sums (G,) are those of W, ranges their weighted sum.
    """

    error: Tensor
    range_sums_G: Tensor
    ranges: Tensor

    def predicted_error(self, range_sums_G: Tensor, factor: Factor, group_size: int) -> Tensor:
        """Error of Q of a matrix of these `range_sums` under the H of a factor."""
        return self.error * weighted_ranges(range_sums_G, factor, group_size) / self.ranges


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
    problems: Sequence[Problem], curvature: Curvature, cache: InitCache, rounds: int
) -> list[Decomposition]:
    """The best pair found for every problem."""
    best = _Best()
    # 1. From GPTQ.
    baselines = _from_gptq(problems, curvature, cache, rounds, best)
    # 2. From low rank.
    _from_low_rank(problems, curvature, cache, baselines, best)
    # 3. From the deflated Hessian.
    _from_deflated_hessian(problems, curvature, baselines, best)
    # 4. Coordinate descent.
    found = [best[problem.place] for problem in problems]
    quantized = _descended_rests(problems, found, curvature)
    return [
        Decomposition(problem.option, better, candidate.fit.factors)
        for problem, better, candidate in zip(problems, quantized, found, strict=True)
    ]


class _Best:
    """The best candidate of every problem so far, by its place."""

    def __init__(self) -> None:
        self._of: dict[int, Candidate] = {}

    def __getitem__(self, place: int) -> Candidate:
        return self._of[place]

    def consider(self, problem: Problem, candidate: Candidate) -> None:
        before = self._of.get(problem.place)
        if candidate.error < (float("inf") if before is None else before.error):
            self._of[problem.place] = candidate


def _from_gptq(
    problems: Sequence[Problem], curvature: Curvature, cache: InitCache, rounds: int, best: _Best
) -> list[Baseline]:
    """Rounds from Q of W; the baselines come with it."""
    started, baselines = cache.from_gptq(problems)
    directions = [cache.direction(problem) for problem in problems]
    found = _refitted(problems, started, directions, curvature, best)
    del started
    active = list(zip(problems, found, strict=True))
    for _ in range(rounds - 1):
        members = [problem for problem, _ in active]
        standing = _requantized(members, [last.fit for _, last in active], curvature)
        directions = sharpened([r.weighted for r in standing], [last.direction_Or for _, last in active])
        found = _refitted(members, standing, directions, curvature, best)
        active = [
            (problem, now)
            for (problem, last), now in zip(active, found, strict=True)
            if now.error < last.error * (1 - LEAST_GAIN)
        ]
        if not active:
            break
    return baselines


def _from_low_rank(
    problems: Sequence[Problem],
    curvature: Curvature,
    cache: InitCache,
    baselines: Sequence[Baseline],
    best: _Best,
) -> None:
    """One round from W's best low-rank part, and Q once more, where that is predicted to win."""
    predicted = torch.stack(
        [
            baseline.predicted_error(
                cache.range_sums_left(problem), curvature.factor, problem.option.group_size
            )
            for problem, baseline in zip(problems, baselines, strict=True)
        ]
    ).tolist()
    members = [
        problem
        for problem, error in zip(problems, predicted, strict=True)
        if error < retry_ratio(problem.option.bits) * best[problem.place].error
    ]
    if not members:
        return
    parts = [cache.part(problem) for problem in members]
    fits = [part.fit for part in parts]
    standing = _requantized(members, fits, curvature)
    _evaluate(members, standing, fits, curvature, best)
    directions = sharpened([r.weighted for r in standing], [part.direction_Or for part in parts])
    fits = [found.fit for found in _refitted(members, standing, directions, curvature, best)]
    standing = _requantized(members, fits, curvature)
    _evaluate(members, standing, fits, curvature, best)


def retry_ratio(bits: int) -> float:
    """Predicted error of the second initialisation, over the least so far, up to which it is tried.

    Coarse grids clip, so that ranges tell less of them.
    """
    return 1 + 0.4 * 2.0 ** (2 - bits)


def _from_deflated_hessian(
    problems: Sequence[Problem], curvature: Curvature, baselines: Sequence[Baseline], best: _Best
) -> None:
    """Q of W under H without what the best R takes, factors of what that left, and once more with the new R."""
    active = list(zip(problems, baselines, strict=True))
    for _ in range(DEFLATION_ROUNDS):
        begun = list(_quantized_deflated(active, curvature, best))
        if not begun:
            return
        active = [(problem, baseline) for problem, baseline, _ in begun]
        members = [problem for problem, _ in active]
        standing = _residuals(members, [quantized for *_, quantized in begun], curvature)
        _refitted(members, standing, _leading(members, standing), curvature, best)


def _quantized_deflated(
    active: Sequence[tuple[Problem, Baseline]], curvature: Curvature, best: _Best
) -> Iterator[tuple[Problem, Baseline, Quantized]]:
    """Q of W under the deflated H, of the problems for which that is predicted to pay."""
    for places in alike([problem.option.rank for problem, _ in active]):
        members = [active[p] for p in places]
        factors = curvature.deflated([best[problem.place].fit.right_rI for problem, _ in members])
        for (problem, baseline), factor in zip(members, factors, strict=True):
            if factor is None:
                continue
            error = baseline.predicted_error(baseline.range_sums_G, factor, problem.option.group_size)
            if error.item() <= DEFLATION_RATIO * best[problem.place].error:
                (quantized,) = quantized_of([problem], factor)
                yield problem, baseline, quantized


def _leading(problems: Sequence[Problem], standing: Sequence[Residual]) -> list[Tensor]:
    """The leading directions (O, r) of every (W − Q)S."""
    found: dict[int, Tensor] = {}
    for places in alike([problem.option.rank for problem in problems]):
        weighted = [standing[p].weighted for p in places]
        directions = leading_directions(weighted, problems[places[0]].option.rank)
        found |= dict(zip(places, directions, strict=True))
    return [found[p] for p in range(len(problems))]


def _refitted(
    problems: Sequence[Problem],
    standing: Sequence[Residual],
    directions: Sequence[Tensor],
    curvature: Curvature,
    best: _Best,
) -> list[Factorization]:
    """Factors of W − Q along the directions; the best hears of them."""
    fit_of: dict[int, Fit] = {}
    for bits in sorted({problem.option.factor_bits for problem in problems}):
        places = [p for p, problem in enumerate(problems) if problem.option.factor_bits == bits]
        rests = [standing[p].rest for p in places]
        found = factorize(rests, [directions[p] for p in places], curvature.factor, bits)
        fit_of |= dict(zip(places, found, strict=True))
    fits = [fit_of[p] for p in range(len(problems))]
    errors = _evaluate(problems, standing, fits, curvature, best)
    return list(map(Factorization, directions, fits, errors))


def _evaluate(
    problems: Sequence[Problem],
    standing: Sequence[Residual],
    fits: Sequence[Fit],
    curvature: Curvature,
    best: _Best,
) -> list[float]:
    """The error of every pair, ‖(W − Q)S − L(RS)‖²; the best hears of them."""
    rights = [fit.right_rI for fit in fits]
    right = Operand.of(torch.cat(rights), 2 * max(fit.largest for fit in fits))
    weighted_rights = through(right, curvature.root).split(list(map(len, rights)))
    pairs = (
        (residual.weighted.T, product(weighted_right.T, fit.left))
        for residual, fit, weighted_right in zip(standing, fits, weighted_rights, strict=True)
    )
    errors: list[float] = squared_distances(pairs).tolist()
    for problem, residual, fit, error in zip(problems, standing, fits, errors, strict=True):
        best.consider(problem, Candidate(residual.quantized, fit, error))
    return errors


def _requantized(problems: Sequence[Problem], fits: Sequence[Fit], curvature: Curvature) -> list[Residual]:
    """Q of W − LR, and what it leaves of W."""
    weight_OI = problems[0].weight_OI
    rest_IR = weight_OI.new_empty(weight_OI.shape[1], len(problems) * len(weight_OI))
    parts = rest_IR.split(len(weight_OI), dim=1)
    for problem, fit, rest_IO in zip(problems, fits, parts, strict=True):
        put_columns(rest_IO, problem.weight_OI.T)
        subtract_product(rest_IO, fit.right.T, fit.left)
    found = _rounded(rest_IR, problems, curvature.factor)
    del rest_IR, parts
    return _residuals(problems, found, curvature)


def _residuals(
    problems: Sequence[Problem], quantized: Sequence[Quantized], curvature: Curvature
) -> list[Residual]:
    """W − Q and (W − Q)S of every problem."""
    rows, largest = len(problems[0].weight_OI), ROOM * max(problem.largest for problem in problems)
    whole, rests = residuals((p.weight_OI for p in problems), quantized, rows, largest)
    weighted = through(whole, curvature.root).split([rows] * len(problems))
    return list(map(Residual, quantized, rests, weighted))


def _descended_rests(
    problems: Sequence[Problem], found: Sequence[Candidate], curvature: Curvature
) -> list[Quantized]:
    """Better codes for Q of W − LR."""
    rests = [
        rest_of(problem.weight_OI, candidate.fit.left, candidate.fit.right)
        for problem, candidate in zip(problems, found, strict=True)
    ]
    largest = max(problem.largest for problem in problems)
    quantized = [candidate.quantized for candidate in found]
    return descended(rests, quantized, curvature.hessian_II, largest=largest)


@dataclass(frozen=True, slots=True)
class Part:
    """The best low-rank part of W, and the orthonormal directions (O, r) that it was found along."""

    fit: Fit
    direction_Or: Tensor


class InitCache:
    """What initialisations share, each found once: Q of W and its leading directions, and W's best low-rank parts."""

    def __init__(self, curvature: Curvature, problems: Sequence[Problem]) -> None:
        self.curvature, self.problems = curvature, problems
        self.largest_rank = max((problem.option.rank for problem in problems), default=0)
        self.wanted = {problem.quantized_key for problem in problems}
        self.quantized: dict[QuantizedKey, Quantized] = {}
        self.directions: dict[QuantizedKey, Tensor] = {}
        self.parts: dict[PartKey, Part] = {}
        self.range_sums: dict[tuple[PartKey | QuantizedKey, int], Tensor] = {}

    def offer(self, problems: Sequence[Problem], quantized: Sequence[Quantized]) -> None:
        """Q of W, which a search may start from."""
        for problem, q in zip(problems, quantized, strict=True):
            if problem.quantized_key in self.wanted:
                self.quantized[problem.quantized_key] = q

    def from_gptq(self, problems: Sequence[Problem]) -> tuple[list[Residual], list[Baseline]]:
        """What Q of W leaves, which problems of one key share."""
        self._quantize(problems)
        first = {problem.quantized_key: problem for problem in reversed(problems)}
        found = _residuals(list(first.values()), [self.quantized[key] for key in first], self.curvature)
        residual_of = dict(zip(first, found, strict=True))
        baseline_of = {key: self._baseline(problem, residual_of[key]) for key, problem in first.items()}
        self._lead({key: residual.weighted for key, residual in residual_of.items()})
        keys = [problem.quantized_key for problem in problems]
        return [residual_of[key] for key in keys], [baseline_of[key] for key in keys]

    def _quantize(self, problems: Sequence[Problem]) -> None:
        """Find every Q of W that these need and nobody offered."""
        missing = {p.quantized_key: p for p in problems if p.quantized_key not in self.quantized}
        if missing:
            found = quantized_of(list(missing.values()), self.curvature.factor)
            self.quantized |= dict(zip(missing, found, strict=True))

    def _baseline(self, problem: Problem, residual: Residual) -> Baseline:
        group_size = problem.option.group_size
        key = (problem.matrix, 0, 0), group_size
        if key not in self.range_sums:
            self.range_sums[key] = range_sums(problem.weight_OI, group_size)
        sums_G = self.range_sums[key]
        ranges = weighted_ranges(sums_G, self.curvature.factor, group_size)
        return Baseline(residual.weighted.squared_norms(1)[0], sums_G, ranges)

    def _lead(self, weighted: dict[QuantizedKey, Operand]) -> None:
        """Find leading directions that are not known yet."""
        missing = [key for key in weighted if key not in self.directions]
        if missing:
            found = leading_directions([weighted[key] for key in missing], self.largest_rank)
            self.directions |= dict(zip(missing, found, strict=True))

    def direction(self, problem: Problem) -> Tensor:
        """The leading directions (O, r) of what Q of W leaves."""
        return self.directions[problem.quantized_key][:, : problem.option.rank]

    def part(self, problem: Problem) -> Part:
        """The best low-rank part of W."""
        if not self.parts:
            for bits in sorted({p.option.factor_bits for p in self.problems}):
                self._find_parts({p.part_key: p for p in self.problems if p.option.factor_bits == bits}, bits)
        return self.parts[problem.part_key]

    def _find_parts(self, problem_of: dict[PartKey, Problem], bits: int) -> None:
        """All of one width of factors at once."""
        problems = list(problem_of.values())
        whole = {(p.matrix, 0, 0): Operand.of(p.weight_OI, p.largest) for p in problems}
        self._lead({key: through(w, self.curvature.root) for key, w in whole.items()})
        keys = [(p.matrix, 0, 0) for p in problems]
        ranks = [p.option.rank for p in problems]
        directions = [self.directions[key][:, :rank] for key, rank in zip(keys, ranks, strict=True)]
        found = factorize([whole[key] for key in keys], directions, self.curvature.factor, bits)
        self.parts |= dict(zip(problem_of, map(Part, found, directions), strict=True))

    def range_sums_left(self, problem: Problem) -> Tensor:
        """`range_sums` (G,) of what W's best low-rank part leaves."""
        key = problem.part_key, problem.option.group_size
        if key not in self.range_sums:
            fit = self.part(problem).fit
            rest_OI = rest_of(problem.weight_OI, fit.left, fit.right)
            self.range_sums[key] = range_sums(rest_OI, problem.option.group_size)
        return self.range_sums[key]


def range_sums(w_OI: Tensor, group_size: int) -> Tensor:
    """(G,): of every group of columns, the squared ranges of all rows."""
    return group_ranges(w_OI, group_size).square_().sum(dim=0)


def weighted_ranges(range_sums_G: Tensor, factor: Factor, group_size: int) -> Tensor:
    """The squared ranges of all groups, each times the pivots of its columns."""
    return range_sums_G @ grouped(factor.pivots()[None], group_size).sum(dim=2)[0]
