"""The best low-rank correction of a residual under a Hessian, with quantized factors.

What lives here: L and R for a residual E, so that tr((E − LR) H (E − LR)ᵀ) is least. When to correct what is for
`alternating.py`.

Letters: P problems of one shape under one Hessian, O rows, I columns, r rank.

No inverse of H is needed: with U_r the leading eigenvectors of E H Eᵀ, L = U_r and R = U_rᵀE is optimal, and the
tail of the eigenvalues is the error left at every r. (Write H = SSᵀ; by Eckart-Young the best rank-r part of ES is
U_rU_rᵀES, which U_rU_rᵀE attains, S singular or not.) U_r comes from a subspace iteration on ES (Halko, Martinsson
and Tropp, arXiv 0909.4061). L is rounded to its grid first, to the nearest: its columns are orthonormal, so that none
can make good another's error. R is fitted to the rounded L by least squares (LPLR, arXiv 2310.11028, without the
pseudo-inverse of H: it cancels) and rounded by GPTQ under H, because an error in R reaches the output through H just
as an error in Q does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor

from allocator.storage import FACTOR_GROUP_SIZE, KEEP_BITS, ceil_div
from compressor.cuda.scaled_half import Operand, largest_of, put_product
from compressor.cuda.scaled_half import product as product_of
from compressor.grid import Quantized
from compressor.quantize.gptq import (
    DAMPING,
    Factor,
    SingularHessianError,
    cholesky,
    round_to_nearest,
    rounded,
)

OVERSAMPLING = 8
ITERATIONS = 2
ROOT_DAMPING = (1e-8, 1e-6, 1e-4)
TRIANGLE_BLOCKS = 4
FARTHEST = 16.0
"""No normal number is larger."""
WIDEST_LEFT = 2.0
"""Nor is a number of L, whose columns are of length 1 but for their rounding, nearly as large."""
DEPENDENT = 1e-5
"""Ratio of Cholesky pivots below which columns count as dependent."""


Found = TypeVar("Found")
Basis = Callable[[Tensor], Tensor]
"""Finds orthonormal bases of the columns of matrices, (P, n, k)."""


@dataclass(frozen=True, slots=True)
class Factors:
    """L (O, r), stored as its transpose, and R (r, I); quantized, or bfloat16 where factor_bits is 16.

    Of several heads, below each other: L (heads·r, O/heads) as it is stored, R (heads·r, I).
    """

    left_rO: Quantized | Tensor
    right_rI: Quantized | Tensor
    heads: int = 1

    def product(self) -> Tensor:
        """L·R, float32 (O, I)."""
        return product(dense(self.left_rO), dense(self.right_rI), self.heads)


def product(left_rO: Tensor, right_rI: Tensor, heads: int) -> Tensor:
    """L·R (O, I) from factors as `Factors` stores them."""
    if heads == 1:
        return left_rO.T @ right_rI
    product_HoI: Tensor = left_rO.unflatten(0, (heads, -1)).mT @ right_rI.unflatten(0, (heads, -1))
    return product_HoI.flatten(0, 1)


def dense(factor: Quantized | Tensor) -> Tensor:
    """A factor in float32."""
    return factor.dequantize() if isinstance(factor, Quantized) else factor.float()


def square_root(hessian_II: Tensor) -> Tensor:
    """Lower S with SSᵀ = H, float32. A singular H is damped just as much as float64 takes to factor it.

    Raises `SingularHessianError` when H is not finite or has a direction of negative curvature.
    """
    for damping in ROOT_DAMPING:
        with suppress(SingularHessianError):
            return cholesky(hessian_II, damping)
    return cholesky(hessian_II, DAMPING)


@dataclass(frozen=True, slots=True)
class Root:
    """S with SSᵀ = H, lower triangular, as a factor of products; widest is the largest sum of a column's magnitudes."""

    values: Operand
    widest: float

    @classmethod
    def of(cls, root_II: Tensor) -> Root:
        if root_II.device.type != "cuda":
            return cls(Operand.of(root_II), 0.0)
        return cls(Operand.of(root_II), torch.linalg.matrix_norm(root_II, 1).item())


def through(residual: Operand, root: Root) -> Operand:
    """E·S (O, I), in memory column by column: a block of its columns needs the later columns of E alone."""
    residual_IO, (rows, columns) = residual.T, residual.values.shape
    weighted_IO = Operand.empty(columns, rows, residual.values.device, residual.bound() * root.widest)
    width = ceil_div(columns, TRIANGLE_BLOCKS)
    for first in range(0, columns, width):
        block, later = slice(first, first + width), slice(first, columns)
        put_product(weighted_IO[block], root.values[later, block].T, residual_IO[later])
    return weighted_IO.T


def leading_directions(weighted: Sequence[Operand], rank: int) -> Tensor:
    """(P, O, rank) orthonormal, the leading eigenvectors of (ES)(ES)ᵀ = E H Eᵀ in falling order; weighted are P ES."""
    rows, columns = weighted[0].values.shape
    width = min(rank + OVERSAMPLING, rows, columns)
    device = weighted[0].values.device
    generator = torch.Generator(device).manual_seed(0)
    start = Operand.of(torch.randn(columns, width, generator=generator, device=device), FARTHEST)

    def iterated(basis_of: Basis) -> Tensor:
        basis_POk = basis_of(_products(weighted, [start] * len(weighted)))
        for _ in range(ITERATIONS):
            basis_POk = _sharpened(weighted, basis_POk, basis_of)
        return basis_POk

    basis_POk = _trusted(iterated)
    seen_PIk = _seen(weighted, basis_POk)
    _, vector_Pkk = torch.linalg.eigh((seen_PIk.mT @ seen_PIk).double())
    leading_POr: Tensor = basis_POk.double() @ vector_Pkk.flip(-1)[..., :rank]
    return leading_POr.float()


def sharpened(weighted: Sequence[Operand], bases: Sequence[Tensor]) -> list[Tensor]:
    """One step of subspace iteration from orthonormal bases (O, k), each of a width of its own.

    Nearer to the leading directions, in no order.
    """
    places = alike([basis_Ok.shape[1] for basis_Ok in bases])

    def find(basis_of: Basis) -> list[Tensor]:
        return [
            _sharpened([weighted[p] for p in some], torch.stack([bases[p] for p in some]), basis_of)
            for some in places
        ]

    found = dict(zip(chain(*places), chain(*_trusted(find)), strict=True))
    return [found[p] for p in range(len(bases))]


def alike(ranks: Sequence[int]) -> list[list[int]]:
    """The places of each rank, in rising order of ranks."""
    return [[p for p in range(len(ranks)) if ranks[p] == rank] for rank in sorted(set(ranks))]


def _sharpened(weighted: Sequence[Operand], basis_POk: Tensor, basis_of: Basis) -> Tensor:
    seen = Operand.of(basis_of(_seen(weighted, basis_POk)), 1.0)
    return basis_of(_products(weighted, [seen[p] for p in range(len(weighted))]))


def _seen(weighted: Sequence[Operand], basis_POk: Tensor) -> Tensor:
    """(ES)ᵀ times each basis, (P, I, k)."""
    basis = Operand.of(basis_POk, 1.0)
    return _products([part.T for part in weighted], [basis[p] for p in range(len(weighted))])


def _products(lefts: Sequence[Operand], rights: Sequence[Operand]) -> Tensor:
    """Of all pairs, behind each other; float32."""
    rows, columns = lefts[0].values.shape[0], rights[0].values.shape[1]
    found_Pnm = torch.empty(len(lefts), rows, columns, device=lefts[0].values.device)
    for left, right, found_nm in zip(lefts, rights, found_Pnm, strict=True):
        product_of(left, right, found_nm)
    return found_Pnm


def orthonormal(tall_Pnk: Tensor) -> Tensor:
    """An orthonormal basis of the columns, (P, n, k)."""
    return _trusted(lambda basis_of: basis_of(tall_Pnk))


def _trusted(find: Callable[[Basis], Found]) -> Found:
    """What `find` makes with bases by Cholesky factors; where columns depend on each other, with Householder's.

    Whether they do is asked once, after all is found: a card that is asked at every basis rests meanwhile.
    """
    ratios: list[Tensor] = []

    def by_cholesky(tall_Pnk: Tensor) -> Tensor:
        basis_Pnk, ratio_P = _by_cholesky(tall_Pnk)
        ratios.append(ratio_P)
        return basis_Pnk

    found = find(by_cholesky)
    is_independent = (torch.cat(ratios) > DEPENDENT).all()
    return found if is_independent else find(lambda tall_Pnk: torch.linalg.qr(tall_Pnk).Q)


def _by_cholesky(tall_Pnk: Tensor) -> tuple[Tensor, Tensor]:
    """A basis by the Cholesky factor of the columns' Gram matrix, and of each the ratio of its pivots, NaN where
    there is no factor.

    In float64 that loses nothing that float32 has.
    """
    wide_Pnk = tall_Pnk.double()
    lower_Pkk, _ = torch.linalg.cholesky_ex(wide_Pnk.mT @ wide_Pnk)
    least_P, most_P = lower_Pkk.diagonal(dim1=-2, dim2=-1).aminmax(dim=-1)
    basis_Pkn = torch.linalg.solve_triangular(lower_Pkk, wide_Pnk.mT, upper=False)
    return basis_Pkn.mT.float(), least_P / most_P


def _inverse(lower_Pkk: Tensor) -> Tensor:
    """Of lower triangular matrices."""
    one_kk = torch.eye(lower_Pkk.shape[-1], dtype=lower_Pkk.dtype, device=lower_Pkk.device)
    inverse_Pkk: Tensor = torch.linalg.solve_triangular(lower_Pkk, one_kk.expand_as(lower_Pkk), upper=False)
    return inverse_Pkk


@dataclass(frozen=True, slots=True)
class Fit:
    """Factors, and both of them in float32; no entry of R is much above `largest`."""

    factors: Factors
    left_rO: Tensor
    right_rI: Tensor
    largest: float

    @property
    def left(self) -> Operand:
        """L as a factor of products."""
        return Operand.of(self.left_rO, WIDEST_LEFT)

    @property
    def right(self) -> Operand:
        """R as a factor of products."""
        return Operand.of(self.right_rI, 2 * self.largest)


def factorize(
    residuals: Sequence[Operand], directions: Sequence[Tensor], factor: Factor, factor_bits: int
) -> list[Fit]:
    """Quantized factors of residuals (O, I) along orthonormal directions (O, r), each with a rank of its own.

    All rows of all factors are rounded at once.
    """
    ranks = [direction_Or.shape[1] for direction_Or in directions]
    left_RO, right_RI, largest = stacked(residuals, directions, factor, factor_bits)
    lefts, rights = dense(left_RO).split(ranks), dense(right_RI).split(ranks)
    fits, first = [], 0
    for rank, left_rO, right_rI in zip(ranks, lefts, rights, strict=True):
        part = slice(first, first + rank)
        fits.append(Fit(Factors(_rows(left_RO, part), _rows(right_RI, part)), left_rO, right_rI, largest))
        first = part.stop
    return fits


def stacked(
    residuals: Sequence[Operand], directions: Sequence[Tensor], factor: Factor, factor_bits: int
) -> tuple[Quantized | Tensor, Quantized | Tensor, float]:
    """L and R as `factorize` has them, of all residuals below each other, and what no entry of R is much above."""
    left_RO = torch.cat([direction_Or.T for direction_Or in directions])
    left_q = _rounded(left_RO, factor_bits, partial(round_to_nearest, largest=WIDEST_LEFT))
    lefts = dense(left_q).split([direction_Or.shape[1] for direction_Or in directions])
    right_RI = fitted(lefts, residuals)
    largest = largest_of(right_RI)
    right_q = _rounded(right_RI, factor_bits, partial(_round_right, factor, largest))
    return left_q, right_q, largest


def fitted(lefts: Sequence[Tensor], residuals: Sequence[Operand]) -> Tensor:
    """R (r, I) of least squares for every L (r, O) and residual, below each other.

    L's columns, orthonormal but for their rounding, make the normal equations tame.
    """
    ranks = list(map(len, lefts))
    left = Operand.of(torch.cat(tuple(lefts)), WIDEST_LEFT)
    right_RI = torch.empty(sum(ranks), residuals[0].values.shape[1], device=left.values.device)
    parts = right_RI.split(ranks)
    for part, residual, right_rI in zip(left.split(ranks), residuals, parts, strict=True):
        product_of(part, residual, right_rI)
    for of_rank in alike(ranks):
        left_PrO = torch.stack([lefts[p] for p in of_rank]).double()
        lower_Prr, _ = torch.linalg.cholesky_ex(left_PrO @ left_PrO.mT)
        inverse_Prr = _inverse(lower_Prr)
        solved_PrI = (inverse_Prr.mT @ inverse_Prr).float() @ torch.stack([parts[p] for p in of_rank])
        for p, solved_rI in zip(of_rank, solved_PrI, strict=True):
            parts[p].copy_(solved_rI)
    return right_RI


def _rounded(
    factor_RI: Tensor, bits: int, round_rows: Callable[[Tensor, int, int], Quantized]
) -> Quantized | Tensor:
    return factor_RI.bfloat16() if bits == KEEP_BITS else round_rows(factor_RI, bits, FACTOR_GROUP_SIZE)


def _round_right(factor: Factor, largest: float, right_RI: Tensor, bits: int, group_size: int) -> Quantized:
    return rounded(right_RI.T.contiguous(), largest, factor, [bits], [group_size])[0]


def _rows(factor_RI: Quantized | Tensor, rows: slice) -> Quantized | Tensor:
    if isinstance(factor_RI, Tensor):
        return factor_RI[rows]
    code_RI, scale_RG, zero_RG = factor_RI.code_OI[rows], factor_RI.scale_OG[rows], factor_RI.zero_OG[rows]
    return Quantized(code_RI, scale_RG, zero_RG, factor_RI.bits, factor_RI.group_size)
