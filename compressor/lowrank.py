"""The best low-rank correction of a residual under a Hessian, with quantized factors.

What lives here: L and R for a residual E, so that tr((E − LR) H (E − LR)ᵀ) is least. When to correct what is for
`decompose.py`.

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

import torch
from torch import Tensor

from allocator.storage import FACTOR_GROUP_SIZE, KEEP_BITS, ceil_div
from compressor.gptq import DAMPING, SingularHessianError, cholesky, gptq, round_to_nearest
from compressor.grid import Quantized
from compressor.precision import Operand, tensor_cores
from compressor.precision import product as product_of

OVERSAMPLING = 8
ITERATIONS = 2
ROOT_DAMPING = (1e-8, 1e-6, 1e-4)
TRIANGLE_BLOCKS = 4
DEPENDENT = 1e-5
"""Ratio of Cholesky pivots below which columns count as dependent."""


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
    return (left_rO.unflatten(0, (heads, -1)).mT @ right_rI.unflatten(0, (heads, -1))).flatten(0, 1)


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


def through(residual_OI: Tensor, root: Operand) -> Tensor:
    """E·S (O, I): S is lower triangular, so that a block of its columns needs the later columns of E alone."""
    columns = residual_OI.shape[1]
    residual, weighted_OI = Operand.of(residual_OI), torch.empty_like(residual_OI)
    width = ceil_div(columns, TRIANGLE_BLOCKS)
    for first in range(0, columns, width):
        block, later = slice(first, first + width), slice(first, columns)
        product_of(residual[:, later], root[later, block], weighted_OI[:, block])
    return weighted_OI


def leading_directions(weighted_POI: Tensor, rank: int) -> Tensor:
    """(P, O, rank) orthonormal, the leading eigenvectors of (ES)(ES)ᵀ = E H Eᵀ in falling order; weighted is ES."""
    _, rows, columns = weighted_POI.shape
    width = min(rank + OVERSAMPLING, rows, columns)
    generator = torch.Generator(weighted_POI.device).manual_seed(0)
    start_Ik = torch.randn(columns, width, generator=generator, device=weighted_POI.device)
    with tensor_cores():
        basis_POk = orthonormal(weighted_POI @ start_Ik)
        for _ in range(ITERATIONS):
            basis_POk = sharpened(weighted_POI, basis_POk)
        small_PkI = basis_POk.mT @ weighted_POI
    _, vector_Pkk = torch.linalg.eigh((small_PkI @ small_PkI.mT).double())
    return (basis_POk.double() @ vector_Pkk.flip(-1)[..., :rank]).float()


def sharpened(weighted_POI: Tensor, basis_POk: Tensor) -> Tensor:
    """One step of subspace iteration from an orthonormal basis: nearer to the leading directions, in no order."""
    with tensor_cores():
        return orthonormal(weighted_POI @ orthonormal(weighted_POI.mT @ basis_POk))


def orthonormal(tall_Pnk: Tensor) -> Tensor:
    """An orthonormal basis of the columns, (P, n, k), by the Cholesky factor of their Gram matrix.

    In float64 that loses nothing that float32 has; columns that depend on each other take Householder's way.
    """
    wide_Pnk = tall_Pnk.double()
    lower_Pkk, _ = torch.linalg.cholesky_ex(wide_Pnk.mT @ wide_Pnk)
    pivot_Pk = lower_Pkk.diagonal(dim1=-2, dim2=-1)
    if not (pivot_Pk.amin(dim=-1) > DEPENDENT * pivot_Pk.amax(dim=-1)).all():
        return torch.linalg.qr(tall_Pnk).Q
    one_kk = torch.eye(tall_Pnk.shape[-1], dtype=wide_Pnk.dtype, device=wide_Pnk.device)
    inverse_Pkk = torch.linalg.solve_triangular(lower_Pkk, one_kk.expand_as(lower_Pkk), upper=False)
    return (wide_Pnk @ inverse_Pkk.mT).float()


def factorize(
    residuals: Sequence[Tensor], directions: Sequence[Tensor], factor_II: Tensor, factor_bits: int
) -> list[Factors]:
    """Quantized factors of residuals (O, I) along orthonormal directions (O, r), each with a rank of its own.

    factor from `gptq.inverse_factor`. All rows of all factors are rounded at once.
    """
    left_RO, right_RI = stacked(residuals, directions, factor_II, factor_bits)
    parts, first = [], 0
    for direction_Or in directions:
        part = slice(first, first + direction_Or.shape[1])
        parts.append(Factors(_rows(left_RO, part), _rows(right_RI, part)))
        first = part.stop
    return parts


def stacked(
    residuals: Sequence[Tensor], directions: Sequence[Tensor], factor_II: Tensor, factor_bits: int
) -> tuple[Quantized | Tensor, Quantized | Tensor]:
    """L and R as `factorize` has them, those of all residuals below each other."""
    left_RO = _rounded(
        torch.cat([direction_Or.T for direction_Or in directions]), factor_bits, round_to_nearest
    )
    lefts = dense(left_RO).split([direction_Or.shape[1] for direction_Or in directions])
    rights = [fitted(left_rO, residual_OI) for left_rO, residual_OI in zip(lefts, residuals, strict=True)]
    right_RI = _rounded(torch.cat(rights), factor_bits, partial(_round_right, factor_II))
    return left_RO, right_RI


def fitted(left_rO: Tensor, residual_OI: Tensor) -> Tensor:
    """R (r, I) of least squares: L's columns, orthonormal but for their rounding, make the normal equations tame."""
    lower_rr, _ = torch.linalg.cholesky_ex(left_rO @ left_rO.T)
    with tensor_cores():
        seen_rI = left_rO @ residual_OI
    return torch.cholesky_solve(seen_rI, lower_rr)


def _rounded(
    factor_RI: Tensor, bits: int, round_rows: Callable[[Tensor, int, int], Quantized]
) -> Quantized | Tensor:
    return factor_RI.bfloat16() if bits == KEEP_BITS else round_rows(factor_RI, bits, FACTOR_GROUP_SIZE)


def _round_right(factor_II: Tensor, right_RI: Tensor, bits: int, group_size: int) -> Quantized:
    return gptq(right_RI[None], factor_II, [bits], [group_size])[0]


def _rows(factor_RI: Quantized | Tensor, rows: slice) -> Quantized | Tensor:
    if isinstance(factor_RI, Tensor):
        return factor_RI[rows]
    code_RI, scale_RG, zero_RG = factor_RI.code_OI[rows], factor_RI.scale_OG[rows], factor_RI.zero_OG[rows]
    return Quantized(code_RI, scale_RG, zero_RG, factor_RI.bits, factor_RI.group_size)
