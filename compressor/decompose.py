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

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from allocator.errors import BitrankError
from allocator.storage import KEEP_BITS, Option
from compressor.descent import descended
from compressor.gptq import SingularHessianError, gptq, inverse_factor
from compressor.grid import Quantized, group_ranges, grouped
from compressor.incoherence import restored, rotated, rotation
from compressor.lowrank import (
    Factors,
    dense,
    factorize,
    leading_directions,
    orthonormal,
    sharpened,
    square_root,
    stacked,
    through,
)
from compressor.precision import Operand, tensor_cores

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
    def root(self) -> Operand:
        """S as a factor of products."""
        return Operand.of(self.root_II)

    def squared_norm(self, delta_OI: Tensor) -> Tensor:
        """‖ΔS‖² = tr(Δ H Δᵀ): the squared output error of all rows, per token."""
        return _squared_norm(through(delta_OI, self.root))

    @cached_property
    def rotated(self) -> Curvature:
        """Of rotated inputs: V H Vᵀ."""
        return Curvature.of(_turned(_turned(self.hessian_II).T))

    def without(self, right_rI: Tensor) -> Curvature | None:
        """Down-dated: H − HRᵀ(RHRᵀ)⁻¹RH, which an error that a multiple of R can make good does not feel.

        None where R takes less than `LEAST_ABSORBED` of the trace, or leaves nothing that can be factored.
        """
        reach_Ir = self.root_II @ orthonormal(through(right_rI, self.root).T[None])[0]
        if reach_Ir.square().sum() < LEAST_ABSORBED * self.hessian_II.diagonal().sum():
            return None
        hessian_II = self.hessian_II - reach_Ir @ reach_Ir.T
        hessian_II.diagonal().clamp_(min=0)
        with suppress(SingularHessianError):
            return replace(self, hessian_II=hessian_II, factor_II=inverse_factor(hessian_II))
        return None

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

    def _whole(self) -> Tensor:
        if self.quantized is None:
            assert self.factors is not None
            return self.factors.product()
        q_OI = self.quantized.dequantize()
        if self.factors is None:
            return q_OI
        return torch.addmm(q_OI.T, dense(self.factors.right_rI).T, dense(self.factors.left_rO)).T


def _squared_norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x).square()


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
    by_column = {id(w_OI): w_OI.T.contiguous().T for w_OI in weights}
    problems = [
        _Problem(p, by_column[id(w_OI)], option)
        for p, (w_OI, option) in enumerate(zip(weights, options, strict=True))
    ]
    batch = max(1, elements // (rows * columns))
    yield from _solved([p for p in problems if not p.option.rotated], curvature, rounds, batch)
    if turned := [p for p in problems if p.option.rotated]:
        weight_of = {id(p.weight_OI): _turned(p.weight_OI) for p in turned}
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
        yield problem.place, Decomposition(problem.option, None, starts.part(problem).factors)
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


@dataclass(frozen=True, slots=True)
class _Problem:
    """One matrix (O, I) under one option; `place` is where the caller put it.

    Matrices lie in memory column by column, as GPTQ and descent work on them."""

    place: int
    weight_OI: Tensor
    option: Option

    @property
    def start(self) -> _Start:
        """What Q of W depends on."""
        return id(self.weight_OI), self.option.bits, self.option.group_size


def _batches(problems: Sequence[_Problem], size: int) -> Iterator[Sequence[_Problem]]:
    return (problems[first : first + size] for first in range(0, len(problems), size))


def _quantized_of(problems: Sequence[_Problem], curvature: Curvature) -> list[Quantized]:
    """Q of W."""
    return _gptq([problem.weight_OI for problem in problems], problems, curvature)


def _descended_of(
    problems: Sequence[_Problem], quantized: Sequence[Quantized], curvature: Curvature
) -> list[Quantized]:
    """Q of W with better codes."""
    return descended([p.weight_OI for p in problems], quantized, curvature.hessian_II)


def _gptq(targets: Sequence[Tensor], problems: Sequence[_Problem], curvature: Curvature) -> list[Quantized]:
    options = [problem.option for problem in problems]
    return gptq(targets, curvature.factor_II, [o.bits for o in options], [o.group_size for o in options])


def _alternate(
    problems: Sequence[_Problem], curvature: Curvature, starts: _Starts, rounds: int
) -> list[_Search]:
    """Every problem from both starts."""
    searches = starts.searches(problems)
    _refit(searches, curvature)
    active = searches
    for _ in range(rounds - 1):
        if not (active := [search for search in active if search.gained]):
            break
        _requantize(active, curvature)
        _sharpen(active)
        _refit(active, curvature)
    if again := _restarted(searches, starts, curvature):
        _requantize(again, curvature)
        _consider(again, curvature)
        _sharpen(again)
        _refit(again, curvature)
        _requantize(again, curvature)
        _consider(again, curvature)
    for search in searches:
        _absorb(search, curvature)
    _polish(searches, curvature)
    return searches


def _of_heads(problem: _Problem, curvature: Curvature) -> Factors:
    """The best low-rank part of every head's rows of W, each as a matrix of its own."""
    w_OI, option = problem.weight_OI, problem.option
    weighted_HOI = through(w_OI, curvature.root).unflatten(0, (option.heads, -1))
    direction_HOr = leading_directions(weighted_HOI, option.rank)
    blocks = w_OI.chunk(option.heads)
    left_rO, right_rI = stacked(blocks, list(direction_HOr), curvature.factor_II, option.factor_bits)
    return Factors(left_rO, right_rI, option.heads)


@dataclass(frozen=True, slots=True)
class _Part:
    """Factors found along orthonormal directions (O, r)."""

    factors: Factors
    direction_Or: Tensor


class _Starts:
    """Where searches start, each found once: Q of W and its leading directions, and W's best low-rank parts."""

    def __init__(self, curvature: Curvature, problems: Sequence[_Problem]) -> None:
        self.curvature = curvature
        self.largest = max((problem.option.rank for problem in problems), default=0)
        self.wanted = {problem.start for problem in problems}
        self.quantized: dict[_Start, Quantized] = {}
        self.directions: dict[_Start, Tensor] = {}
        self.parts: dict[tuple[int, int, int], _Part] = {}

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
        first: dict[_Start, _Search] = {}
        for search in searches:
            start = search.problem.start
            if start not in first:
                first[start] = search
                search.stand_on(self.quantized[start], self.curvature)
                search.plain_error = _squared_norm(search.weighted_OI)
                search.plain_ranges = search.ranges(search.problem.weight_OI, self.curvature)
            if start not in self.directions:
                self.directions[start] = self._leading(search.weighted_OI)
            search.stand_like(first[start])
            search.direction_Or = self.directions[start][:, : search.option.rank]
        return searches

    def part(self, problem: _Problem) -> _Part:
        """The best low-rank part of W."""
        w_OI, option = problem.weight_OI, problem.option
        whole, cut = (id(w_OI), 0, 0), (id(w_OI), option.rank, option.factor_bits)
        if whole not in self.directions:
            self.directions[whole] = self._leading(through(w_OI, self.curvature.root))
        if cut not in self.parts:
            direction_Or = self.directions[whole][:, : option.rank]
            (factors,) = factorize([w_OI], [direction_Or], self.curvature.factor_II, option.factor_bits)
            self.parts[cut] = _Part(factors, direction_Or)
        return self.parts[cut]

    def _leading(self, weighted_OI: Tensor) -> Tensor:
        return leading_directions(weighted_OI[None], self.largest)[0]


class _Search:
    """The Q and L·R that a problem stands at, and the best pair so far."""

    def __init__(self, problem: _Problem) -> None:
        self.problem, self.option = problem, problem.option
        self.best = Decomposition(problem.option, None, None)
        self.least = self.error = float("inf")
        self.gained = False

    def stand_on(self, quantized: Quantized, curvature: Curvature) -> None:
        self.quantized = quantized
        self.residual_OI = self.problem.weight_OI - quantized.dequantize()
        self.weighted_OI = through(self.residual_OI, curvature.root)

    def stand_like(self, other: _Search) -> None:
        self.quantized, self.residual_OI = other.quantized, other.residual_OI
        self.weighted_OI = other.weighted_OI
        self.plain_error, self.plain_ranges = other.plain_error, other.plain_ranges

    def measured(self, weighted_right_rI: Tensor) -> Tensor:
        """‖(W − Q)S − L(RS)‖²."""
        left_rO = dense(self.factors.left_rO)
        with tensor_cores():
            return _squared_norm(torch.addmm(self.weighted_OI.T, weighted_right_rI.T, left_rO, alpha=-1))

    @property
    def best_factors(self) -> Factors:
        assert self.best.factors is not None
        return self.best.factors

    def foretold(self, target_OI: Tensor, curvature: Curvature) -> Tensor:
        """Error that Q of another matrix is to leave under another H, by ranges and pivots, from what Q of W left."""
        return self.plain_error * self.ranges(target_OI, curvature) / self.plain_ranges

    def ranges(self, w_OI: Tensor, curvature: Curvature) -> Tensor:
        """The squared ranges of all groups, each times the pivots of its columns."""
        pivot_1G = grouped(curvature.pivots()[None], self.option.group_size).sum(dim=2)
        return (group_ranges(w_OI, self.option.group_size).square_() * pivot_1G).sum()


def _restarted(searches: Sequence[_Search], starts: _Starts, curvature: Curvature) -> list[_Search]:
    """Searches where Q of W − LR, L·R the best low-rank part of W, may leave the least error; they take up that L·R."""
    foretold = torch.stack(
        [s.foretold(_rest(s.problem, starts.part(s.problem).factors), curvature) for s in searches]
    )
    again = []
    for search, error in zip(searches, foretold.tolist(), strict=True):
        if error < worth_trying(search.option.bits) * search.least:
            part = starts.part(search.problem)
            search.factors, search.direction_Or = part.factors, part.direction_Or
            again.append(search)
    return again


def _absorb(search: _Search, curvature: Curvature) -> None:
    """The third start: Q of W under H down-dated by R, then factors of what that left, and once more with the new R."""
    for _ in range(ABSORBING_ROUNDS):
        w_OI, rest = search.problem.weight_OI, curvature.without(dense(search.best_factors.right_rI))
        if rest is None or search.foretold(w_OI, rest).item() > WORTH_ABSORBING * search.least:
            return
        (quantized,) = _gptq([w_OI], [search.problem], rest)
        search.stand_on(quantized, curvature)
        search.direction_Or = leading_directions(search.weighted_OI[None], search.option.rank)[0]
        _refit([search], curvature)


def worth_trying(bits: int) -> float:
    """Error foretold of the second start, over the first's, up to which it is tried: coarse grids clip, tell less."""
    return 1 + 0.4 * 2 ** (2 - bits)


def _refit(searches: Sequence[_Search], curvature: Curvature) -> None:
    """Factors of W − Q along the present directions."""
    for bits in sorted({s.option.factor_bits for s in searches}):
        members = [s for s in searches if s.option.factor_bits == bits]
        residuals, directions = [s.residual_OI for s in members], [s.direction_Or for s in members]
        found = factorize(residuals, directions, curvature.factor_II, bits)
        for search, factors in zip(members, found, strict=True):
            search.factors = factors
    before = [search.error for search in searches]
    _consider(searches, curvature)
    for search, error in zip(searches, before, strict=True):
        search.gained = search.error < error * (1 - LEAST_GAIN)


def _rest(problem: _Problem, factors: Factors) -> Tensor:
    """W − LR."""
    with tensor_cores():
        return torch.addmm(problem.weight_OI.T, dense(factors.right_rI).T, dense(factors.left_rO), alpha=-1).T


def _requantize(searches: Sequence[_Search], curvature: Curvature) -> None:
    """Q of W − LR."""
    problems = [s.problem for s in searches]
    rests = [_rest(s.problem, s.factors) for s in searches]
    for search, quantized in zip(searches, _gptq(rests, problems, curvature), strict=True):
        search.stand_on(quantized, curvature)


def _polish(searches: Sequence[_Search], curvature: Curvature) -> None:
    """Better codes for the best Q, its factors as they are."""
    rests, quantized = [], []
    for search in searches:
        assert search.best.quantized is not None and search.best.factors is not None
        rests.append(_rest(search.problem, search.best.factors))
        quantized.append(search.best.quantized)
    for search, better in zip(searches, descended(rests, quantized, curvature.hessian_II), strict=True):
        search.best = replace(search.best, quantized=better)


def _sharpen(searches: Sequence[_Search]) -> None:
    """Directions a step nearer to the leading ones of (W − Q)S: the last round's are near already."""
    for rank in sorted({s.option.rank for s in searches}):
        members = [s for s in searches if s.option.rank == rank]
        weighted_POI = torch.stack([s.weighted_OI for s in members])
        direction_POr = sharpened(weighted_POI, torch.stack([s.direction_Or for s in members]))
        for search, direction_Or in zip(members, direction_POr, strict=True):
            search.direction_Or = direction_Or


def _consider(searches: Sequence[_Search], curvature: Curvature) -> None:
    """Measure where they stand, and keep what is the best so far."""
    rights = [dense(search.factors.right_rI) for search in searches]
    weighted_RI = through(torch.cat(rights), curvature.root)
    parts = zip(searches, weighted_RI.split([len(right) for right in rights]), strict=True)
    errors = torch.stack([search.measured(weighted_rI) for search, weighted_rI in parts]).tolist()
    for search, error in zip(searches, errors, strict=True):
        search.error = error
        if error < search.least:
            search.least = error
            search.best = Decomposition(search.option, search.quantized, search.factors)
