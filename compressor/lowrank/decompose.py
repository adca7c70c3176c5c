"""W ≈ Q + L·R for one option or many.

What lives here: which way each option takes. Shapes: P problems, O rows, I columns, r rank; every problem is one option
for one matrix, all of one shape and under one Hessian, so that one column loop serves them all. Plain options are GPTQ
and descent, mixed ones GPTQ and factors in turn (`alternating.py`), those of 0 bits the best low-rank part of W or of
its heads.

A rotated option is decomposed in the space of rotated inputs, factors and all: W' = W Vᵀ under H' = V H Vᵀ
(`hadamard.py`). Its error there is its error here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from allocator.errors import BitrankError
from allocator.storage import KEEP_BITS, Option, ceil_div
from compressor.cuda.scaled_half import Operand, largest_of
from compressor.hadamard import turned
from compressor.lowrank.alternating import InitCache, Problem, alternate, descended_of, quantized_of
from compressor.lowrank.decomposition import Decomposition, by_column
from compressor.lowrank.factorize import Factors, leading_directions, stacked, through
from compressor.lowrank.hessian import Curvature

ROUNDS = 4
MAXIMUM_ELEMENTS = 6_000_000
"""Weights in flight at once, over all problems of a batch; each takes some 40 bytes of working memory."""


class RankError(BitrankError):
    """The rank is larger than the smaller side of the matrix, or of a head's rows of it."""


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
    distinct = _distinct(weights)
    of_matrix = [(by_column(w_OI), largest_of(w_OI)) for w_OI in distinct]
    numbers = [next(k for k, other in enumerate(distinct) if other is w_OI) for w_OI in weights]
    problems = [
        Problem(p, k, *of_matrix[k], option)
        for p, (k, option) in enumerate(zip(numbers, options, strict=True))
    ]
    batch = max(1, elements // (rows * columns))
    yield from _solved([p for p in problems if not p.option.rotated], curvature, rounds, batch)
    if left := [p for p in problems if p.option.rotated]:
        turned_of = {k: by_column(turned(of_matrix[k][0])) for k in {p.matrix for p in left}}
        left = [replace(p, weight_OI=turned_of[p.matrix]) for p in left]
        yield from _solved(left, curvature.rotated, rounds, batch)


def _distinct(weights: Sequence[Tensor]) -> list[Tensor]:
    """Every matrix once, in the order of first mention."""
    found: list[Tensor] = []
    for w_OI in weights:
        if not any(other is w_OI for other in found):
            found.append(w_OI)
    return found


def _solved(
    problems: Sequence[Problem], curvature: Curvature, rounds: int, batch: int
) -> Iterator[tuple[int, Decomposition]]:
    """Every problem under the curvature of its space, `batch` at once."""
    plain = [problem for problem in problems if problem.option.rank == 0]
    low_rank = [problem for problem in problems if problem.option.bits == 0 and problem.option.heads == 1]
    head_wise = [problem for problem in problems if problem.option.heads > 1]
    mixed = [problem for problem in problems if problem.option.bits and problem.option.rank]
    cache = InitCache(curvature, mixed + low_rank)
    for chunk in _batches(plain, batch):
        quantized = quantized_of(chunk, curvature.factor)
        cache.offer(chunk, quantized)
        for problem, better in zip(chunk, descended_of(chunk, quantized, curvature), strict=True):
            yield problem.place, Decomposition(problem.option, better, None)
    for problem in low_rank:
        yield problem.place, Decomposition(problem.option, None, cache.part(problem).fit.factors)
    for problem in head_wise:
        yield problem.place, Decomposition(problem.option, None, _of_heads(problem, curvature))
    for chunk in _batches(mixed, batch):
        found = alternate(chunk, curvature, cache, rounds)
        yield from zip((problem.place for problem in chunk), found, strict=True)


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


def _batches(problems: Sequence[Problem], most: int) -> Iterator[Sequence[Problem]]:
    """As few as may be, and none much smaller than another."""
    size = ceil_div(len(problems), max(1, ceil_div(len(problems), most)))
    return (problems[first : first + size] for first in range(0, len(problems), max(1, size)))


def _of_heads(problem: Problem, curvature: Curvature) -> Factors:
    """The best low-rank part of every head's rows of W, each as a matrix of its own."""
    w_OI, option = problem.weight_OI, problem.option
    whole, height = Operand.of(w_OI), len(w_OI) // option.heads
    weighted = through(whole, curvature.root)
    rows_of = [slice(first, first + height) for first in range(0, len(w_OI), height)]
    direction_HOr = leading_directions([weighted[rows] for rows in rows_of], option.rank)
    blocks = [whole[rows] for rows in rows_of]
    left_rO, right_rI, _ = stacked(blocks, list(direction_HOr), curvature.factor, option.factor_bits)
    return Factors(left_rO, right_rI, option.heads)
