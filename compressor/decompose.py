"""W ≈ Q + L·R for one option or many: GPTQ and low-rank factors in turn.

What lives here: the alternation and its error. Shapes: P problems, O rows, I columns, r rank; every problem is one
option for one matrix, all of one shape and under one Hessian H = SSᵀ, so that one column loop serves them all.

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

A rotated option is decomposed in the space of rotated inputs, factors and all: W' = W Vᵀ under H' = V H Vᵀ
(`incoherence.py`). Its error there is its error here.

One product by S a round gives the error, tr((W − Q − LR) H (W − Q − LR)ᵀ) = ‖(W − Q)S − L(RS)‖², and the next factors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import compress

import torch
from torch import Tensor

from allocator.errors import BitrankError
from allocator.storage import KEEP_BITS, Option, ceil_div
from compressor.descent import descended
from compressor.gptq import Factor, SingularHessianError, inverse_factor, rounded
from compressor.grid import Quantized, group_ranges, grouped
from compressor.incoherence import restored, rotated, rotation
from compressor.lowrank import (
    WIDEST_LEFT,
    Factors,
    Fit,
    Root,
    dense,
    factorize,
    leading_directions,
    orthonormal,
    sharpened,
    square_root,
    stacked,
    through,
)
from compressor.precision import ROOM, Operand, largest_of, product, subtract_product, tensor_cores
from compressor.residual import put_columns, residuals, squared_distances

ROUNDS = 4
LEAST_GAIN = 0.01
ABSORBING_ROUNDS = 2
LEAST_ABSORBED = 0.15
WORTH_ABSORBING = 1.1
"""Error foretold of the third start, over the least so far, up to which it is tried."""
MAXIMUM_ELEMENTS = 6_000_000
"""Weights in flight at once, over all problems of a batch; each takes some 40 bytes of working memory."""


class RankError(BitrankError):
    """The rank is larger than the smaller side of the matrix, or of a head's rows of it."""


@dataclass(frozen=True)
class Curvature:
    """What decomposing needs of a Hessian, computed once per Hessian: H, its root, its damped inverse factor."""

    hessian_II: Tensor
    root_II: Tensor
    factor_II: Tensor

    @classmethod
    def of(cls, hessian_II: Tensor) -> Curvature:
        return cls(hessian_II.float(), square_root(hessian_II), inverse_factor(hessian_II))

    @cached_property
    def factor(self) -> Factor:
        """The damped inverse factor, as rounding takes it."""
        return Factor(self.factor_II)

    @cached_property
    def root(self) -> Root:
        """S as a factor of products."""
        return Root.of(self.root_II)

    def squared_norms(self, deltas: Operand, parts: int = 1) -> Tensor:
        """‖ΔS‖² = tr(Δ H Δᵀ) of P matrices of as many rows, below each other: squared output errors per token."""
        return through(deltas, self.root).squared_norms(parts)

    def squared_errors(
        self, weights: Sequence[Tensor], found: Sequence[Decomposition], largest: float
    ) -> Tensor:
        """The squared output error per token, (P,), of what was made of matrices (O, I); none is above `largest`."""
        quantized = [d.quantized for d in found if d.quantized is not None and d.is_subtracted]
        pairs = zip(weights, found, strict=True)
        if len(quantized) < len(found):
            deltas = Operand.of(torch.cat([w_OI - d.dense() for w_OI, d in pairs]))
        else:
            rests = (d.rest(w_OI, largest) for w_OI, d in pairs)
            deltas, _ = residuals(rests, quantized, len(weights[0]), ROOM * largest)
        return self.squared_norms(deltas, len(found))

    @cached_property
    def rotated(self) -> Curvature:
        """Of rotated inputs: V H Vᵀ."""
        return Curvature.of(_turned(_turned(self.hessian_II).T))

    def without(self, right_rI: Tensor) -> Curvature | None:
        """Down-dated: H − HRᵀ(RHRᵀ)⁻¹RH, which an error that a multiple of R can make good does not feel.

        None where R takes less than `LEAST_ABSORBED` of the trace, or leaves nothing that can be factored.
        """
        if not self.absorbed([right_rI])[0]:
            return None
        reach_Ir = self.root_II @ self._orthonormal([right_rI])[0]
        hessian_II = self.hessian_II - reach_Ir @ reach_Ir.T
        hessian_II.diagonal().clamp_(min=0)
        with suppress(SingularHessianError):
            return replace(self, hessian_II=hessian_II, factor_II=inverse_factor(hessian_II))
        return None

    def absorbed(self, rights: Sequence[Tensor]) -> list[bool]:
        """Whether each R (r, I), all of one rank, takes `LEAST_ABSORBED` of the trace."""
        basis_IR = torch.cat(tuple(self._orthonormal(rights)), dim=1)
        reach_IR = product(self.root.values, Operand.of(basis_IR, 1.0))
        taken_P = reach_IR.square_().sum(dim=0).unflatten(0, (len(rights), -1)).sum(dim=1)
        return (taken_P >= LEAST_ABSORBED * self.hessian_II.diagonal().sum()).tolist()

    def _orthonormal(self, rights: Sequence[Tensor]) -> Tensor:
        """(P, I, r): bases of the columns of (RS)ᵀ."""
        weighted = through(Operand.of(torch.cat(tuple(rights))), self.root)
        return orthonormal(weighted.dense().unflatten(0, (len(rights), -1)).mT)

    def pivots(self) -> Tensor:
        """d (I,): H = L diag(d) Lᵀ with unit triangular L; what an error costs after later columns made it good."""
        return self.factor_II.diagonal().square().reciprocal()


@dataclass(frozen=True, slots=True)
class Decomposition:
    """Q and L·R of one matrix under one option; either may be absent."""

    option: Option
    quantized: Quantized | None
    factors: Factors | None

    def dense(self) -> Tensor:
        """Q + L·R as it acts on the layer's inputs, float32 (O, I)."""
        whole_OI = self._whole()
        if not self.option.rotated:
            return whole_OI
        return restored(whole_OI, rotation(whole_OI.shape[1], whole_OI.device))

    @property
    def is_subtracted(self) -> bool:
        """Whether its error is what remains of W when L·R and then Q, as they are stored, are taken off."""
        return self.quantized is not None and not self.option.rotated

    def rest(self, w_OI: Tensor, largest: float) -> Tensor:
        """W − L·R of a matrix (O, I) that it was made of, of which no entry is above `largest`.

        R is W − Q along unit vectors of O entries, and no entry of W − Q is above twice the largest of W or so.
        """
        if self.factors is None:
            return w_OI
        left = Operand.of(dense(self.factors.left_rO), WIDEST_LEFT)
        right = Operand.of(dense(self.factors.right_rI), 4 * len(w_OI) ** 0.5 * largest)
        return _rest(w_OI, left, right)

    def _whole(self) -> Tensor:
        if self.quantized is None:
            assert self.factors is not None
            return self.factors.product()
        q_OI = self.quantized.dequantize()
        if self.factors is None:
            return q_OI
        return torch.addmm(q_OI.T, dense(self.factors.right_rI).T, dense(self.factors.left_rO)).T


def _turned(w_OI: Tensor) -> Tensor:
    """W Vᵀ: what W is to rotated inputs."""
    return rotated(w_OI, rotation(w_OI.shape[1], w_OI.device))


def row_errors(w_OI: Tensor, approximation_OI: Tensor, hessian_II: Tensor) -> Tensor:
    """diag(ΔW H ΔWᵀ), float32 (O,): the squared output error of every row, per token."""
    delta_OI = w_OI - approximation_OI
    with tensor_cores():
        return ((delta_OI @ hessian_II) * delta_OI).sum(dim=1).clamp_(min=0)


def squared_error(w_OI: Tensor, approximation_OI: Tensor, hessian_II: Tensor) -> float:
    """tr(ΔW H ΔWᵀ): the squared output error of all rows, per token."""
    return row_errors(w_OI, approximation_OI, hessian_II).sum().item()


def by_column(w_OI: Tensor) -> Tensor:
    """W in memory column by column."""
    return w_OI.T.contiguous().T


def decompose(
    weights: Sequence[Tensor],
    curvature: Curvature,
    options: Sequence[Option],
    rounds: int = ROUNDS,
    elements: int = MAXIMUM_ELEMENTS,
) -> Iterator[tuple[int, Decomposition]]:
    """Carry out `options[p]` on `weights[p]`, matrices (O, I) float32 of one shape under one Hessian.

    Yields (p, decomposition), batch by batch, those of inputs as they are first and plain ones before ranks, so that no
    more than `elements` weights are in flight. Raises `RankError` for a rank above min(O, I), or of a head above
    min(O/heads, I).
    """
    rows, columns = weights[0].shape
    assert all(option.bits != KEEP_BITS for option in options)
    assert all(option.heads == 1 or option.bits == 0 for option in options)
    for option in options:
        _check_rank(rows, columns, option)
    distinct = {id(w_OI): w_OI for w_OI in weights}
    of_weight = {key: (by_column(w_OI), largest_of(w_OI)) for key, w_OI in distinct.items()}
    problems = [
        _Problem(p, *of_weight[id(w_OI)], option)
        for p, (w_OI, option) in enumerate(zip(weights, options, strict=True))
    ]
    batch = max(1, elements // (rows * columns))
    yield from _solved([p for p in problems if not p.option.rotated], curvature, rounds, batch)
    if turned := [p for p in problems if p.option.rotated]:
        weight_of = {id(p.weight_OI): by_column(_turned(p.weight_OI)) for p in turned}
        turned = [replace(p, weight_OI=weight_of[id(p.weight_OI)]) for p in turned]
        yield from _solved(turned, curvature.rotated, rounds, batch)


def _solved(
    problems: Sequence[_Problem], curvature: Curvature, rounds: int, batch: int
) -> Iterator[tuple[int, Decomposition]]:
    """Every problem under the curvature of its space, `batch` at once."""
    plain = [problem for problem in problems if problem.option.rank == 0]
    low_rank = [problem for problem in problems if problem.option.bits == 0 and problem.option.heads == 1]
    head_wise = [problem for problem in problems if problem.option.heads > 1]
    mixed = [problem for problem in problems if problem.option.bits and problem.option.rank]
    starts = _Starts(curvature, mixed + low_rank)
    for chunk in _batches(plain, batch):
        quantized = _quantized_of(chunk, curvature)
        starts.offer(chunk, quantized)
        for problem, better in zip(chunk, _descended_of(chunk, quantized, curvature), strict=True):
            yield problem.place, Decomposition(problem.option, better, None)
    for problem in low_rank:
        yield problem.place, Decomposition(problem.option, None, starts.part(problem).fit.factors)
    for problem in head_wise:
        yield problem.place, Decomposition(problem.option, None, _of_heads(problem, curvature))
    for chunk in _batches(mixed, batch):
        yield from ((s.problem.place, s.best) for s in _alternate(chunk, curvature, starts, rounds))


def _check_rank(rows: int, columns: int, option: Option) -> None:
    if rows % option.heads:
        raise RankError(
            f"{option.heads} heads do not divide the {rows} rows of a matrix; profile the model again"
        )
    height = rows // option.heads
    if option.rank > min(height, columns):
        raise RankError(
            f"rank {option.rank} exceeds the smaller side of a {height} × {columns} matrix;"
            f" use at most {min(height, columns)}"
        )


_Start = tuple[int, int, int]
_Cut = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class _Problem:
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


def _cut_of(problem: _Problem) -> _Cut:
    """What the best low-rank part of W depends on."""
    return id(problem.weight_OI), problem.option.rank, problem.option.factor_bits


def _batches(problems: Sequence[_Problem], most: int) -> Iterator[Sequence[_Problem]]:
    """As few as may be, and none much smaller than another."""
    size = ceil_div(len(problems), max(1, ceil_div(len(problems), most)))
    return (problems[first : first + size] for first in range(0, len(problems), max(1, size)))


def _quantized_of(problems: Sequence[_Problem], curvature: Curvature) -> list[Quantized]:
    """Q of W."""
    return _gptq([problem.weight_OI for problem in problems], problems, curvature)


def _descended_of(
    problems: Sequence[_Problem], quantized: Sequence[Quantized], curvature: Curvature
) -> list[Quantized]:
    """Q of W with better codes."""
    largest = max(problem.largest for problem in problems)
    return descended([p.weight_OI for p in problems], quantized, curvature.hessian_II, largest=largest)


def _gptq(targets: Sequence[Tensor], problems: Sequence[_Problem], curvature: Curvature) -> list[Quantized]:
    options = [problem.option for problem in problems]
    whole_IR, largest = torch.cat([w_OI.T for w_OI in targets], dim=1), max(p.largest for p in problems)
    return rounded(
        whole_IR, largest, curvature.factor, [o.bits for o in options], [o.group_size for o in options]
    )


def _alternate(
    problems: Sequence[_Problem], curvature: Curvature, starts: _Starts, rounds: int
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


def _of_heads(problem: _Problem, curvature: Curvature) -> Factors:
    """The best low-rank part of every head's rows of W, each as a matrix of its own."""
    w_OI, option = problem.weight_OI, problem.option
    whole, height = Operand.of(w_OI), len(w_OI) // option.heads
    weighted = through(whole, curvature.root)
    rows_of = [slice(first, first + height) for first in range(0, len(w_OI), height)]
    direction_HOr = leading_directions([weighted[rows] for rows in rows_of], option.rank)
    blocks = [whole[rows] for rows in rows_of]
    left_rO, right_rI, _ = stacked(blocks, list(direction_HOr), curvature.factor, option.factor_bits)
    return Factors(left_rO, right_rI, option.heads)


@dataclass(frozen=True, slots=True)
class _Part:
    """Factors found along orthonormal directions (O, r)."""

    fit: Fit
    direction_Or: Tensor


class _Starts:
    """Where searches start, each found once: Q of W and its leading directions, and W's best low-rank parts."""

    def __init__(self, curvature: Curvature, problems: Sequence[_Problem]) -> None:
        self.curvature, self.problems = curvature, problems
        self.largest = max((problem.option.rank for problem in problems), default=0)
        self.wanted = {problem.start for problem in problems}
        self.quantized: dict[_Start, Quantized] = {}
        self.directions: dict[_Start, Tensor] = {}
        self.parts: dict[_Cut, _Part] = {}
        self.range_sums: dict[tuple[_Cut, int], Tensor] = {}

    def offer(self, problems: Sequence[_Problem], quantized: Sequence[Quantized]) -> None:
        """Q of W, which a search may start from."""
        for problem, q in zip(problems, quantized, strict=True):
            if problem.start in self.wanted:
                self.quantized[problem.start] = q

    def _quantize(self, problems: Sequence[_Problem]) -> None:
        """Find every Q of W that these need and nobody offered."""
        missing = {p.start: p for p in problems if p.start not in self.quantized}
        if missing:
            found = _quantized_of(list(missing.values()), self.curvature)
            self.quantized |= dict(zip(missing, found, strict=True))

    def searches(self, problems: Sequence[_Problem]) -> list[_Search]:
        """Standing on Q of W; those that start alike share what they stand on."""
        self._quantize(problems)
        searches = [_Search(problem) for problem in problems]
        first = {search.problem.start: search for search in reversed(searches)}
        _stand(list(first.values()), [self.quantized[start] for start in first], self.curvature)
        for search in first.values():
            search.plain_error = search.weighted.squared_norms(1)[0]
            search.plain_sums_G = self.plain_sums(search.problem)
            search.plain_ranges = search.ranges(search.plain_sums_G, self.curvature)
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

    def part(self, problem: _Problem) -> _Part:
        """The best low-rank part of W."""
        if not self.parts:
            for bits in sorted({p.option.factor_bits for p in self.problems}):
                self._find_parts({_cut_of(p): p for p in self.problems if p.option.factor_bits == bits}, bits)
        return self.parts[_cut_of(problem)]

    def _find_parts(self, problem_of: dict[_Cut, _Problem], bits: int) -> None:
        """All of one width of factors at once."""
        whole = {(id(p.weight_OI), 0, 0): Operand.of(p.weight_OI, p.largest) for p in problem_of.values()}
        self._lead({start: through(w, self.curvature.root) for start, w in whole.items()})
        starts = [(id(p.weight_OI), 0, 0) for p in problem_of.values()]
        ranks = [p.option.rank for p in problem_of.values()]
        directions = [self.directions[s][:, :rank] for s, rank in zip(starts, ranks, strict=True)]
        found = factorize([whole[s] for s in starts], directions, self.curvature.factor, bits)
        self.parts |= dict(zip(problem_of, map(_Part, found, directions), strict=True))

    def plain_sums(self, problem: _Problem) -> Tensor:
        """`range_sums` of W."""
        key = (id(problem.weight_OI), 0, 0), problem.option.group_size
        if key not in self.range_sums:
            self.range_sums[key] = range_sums(problem.weight_OI, problem.option.group_size)
        return self.range_sums[key]

    def sums_left(self, problem: _Problem) -> Tensor:
        """`range_sums` of what W's best low-rank part leaves."""
        key = _cut_of(problem), problem.option.group_size
        if key not in self.range_sums:
            fit = self.part(problem).fit
            rest_OI = _rest(problem.weight_OI, fit.left, fit.right)
            self.range_sums[key] = range_sums(rest_OI, problem.option.group_size)
        return self.range_sums[key]


class _Search:
    """The Q and L·R that a problem stands at, and the best pair so far."""

    def __init__(self, problem: _Problem) -> None:
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

    def foretold(self, sums_G: Tensor, curvature: Curvature) -> Tensor:
        """Error that Q of a matrix of these `range_sums` is to leave under another H, from what Q of W left."""
        return self.plain_error * self.ranges(sums_G, curvature) / self.plain_ranges

    def ranges(self, sums_G: Tensor, curvature: Curvature) -> Tensor:
        """The squared ranges of all groups, each times the pivots of its columns."""
        return sums_G @ grouped(curvature.pivots()[None], self.option.group_size).sum(dim=2)[0]


def range_sums(w_OI: Tensor, group_size: int) -> Tensor:
    """(G,): of every group of columns, the squared ranges of all rows."""
    return group_ranges(w_OI, group_size).square_().sum(dim=0)


def _restarted(searches: Sequence[_Search], starts: _Starts, curvature: Curvature) -> list[_Search]:
    """Searches where Q of W − LR, L·R the best low-rank part of W, may leave the least error; they take up that L·R."""
    foretold = torch.stack([s.foretold(starts.sums_left(s.problem), curvature) for s in searches])
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
        searches = [s for s in _absorbing(searches, curvature) if _absorbed(s, curvature)]


def _absorbing(searches: Sequence[_Search], curvature: Curvature) -> Iterator[_Search]:
    """Those whose R takes enough of H."""
    for members in _by_rank(searches):
        rights = [search.best_fit.right_rI for search in members]
        yield from compress(members, curvature.absorbed(rights))


def _absorbed(search: _Search, curvature: Curvature) -> bool:
    """Whether the third start promises something; then it is taken."""
    rest = curvature.without(search.best_fit.right_rI)
    if rest is None or search.foretold(search.plain_sums_G, rest).item() > WORTH_ABSORBING * search.least:
        return False
    (quantized,) = _gptq([search.problem.weight_OI], [search.problem], rest)
    _stand([search], [quantized], curvature)
    search.direction_Or = leading_directions([search.weighted], search.option.rank)[0]
    _refit([search], curvature)
    return True


def _by_rank(searches: Sequence[_Search]) -> Iterator[list[_Search]]:
    for rank in sorted({search.option.rank for search in searches}):
        yield [search for search in searches if search.option.rank == rank]


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


def _rest(w_OI: Tensor, left: Operand, right: Operand) -> Tensor:
    """W − LR (O, I), in memory column by column."""
    rest_IO = w_OI.T.clone(memory_format=torch.contiguous_format)
    subtract_product(rest_IO, right.T, left)
    return rest_IO.T


def _requantize(searches: Sequence[_Search], curvature: Curvature) -> None:
    """Q of W − LR."""
    weight_OI = searches[0].problem.weight_OI
    rest_IR = weight_OI.new_empty(weight_OI.shape[1], len(searches) * len(weight_OI))
    for search, rest_IO in zip(searches, rest_IR.split(len(weight_OI), dim=1), strict=True):
        put_columns(rest_IO, search.problem.weight_OI.T)
        subtract_product(rest_IO, search.fit.right.T, search.fit.left)
    options = [search.option for search in searches]
    bits, group_sizes = [o.bits for o in options], [o.group_size for o in options]
    largest = max(search.problem.largest for search in searches)
    found = rounded(rest_IR, largest, curvature.factor, bits, group_sizes)
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
    rests = [_rest(s.problem.weight_OI, s.best_fit.left, s.best_fit.right) for s in searches]
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
