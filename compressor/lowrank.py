"""The best low-rank correction of a residual under a Hessian, with quantized factors.

What lives here: L and R for a residual E, so that tr((E − LR) H (E − LR)ᵀ) is least. When to correct what is for
`decompose.py`.

Letters: P problems of one shape under one Hessian, O rows, I columns, r rank.

No inverse of H is needed: with U_r the leading eigenvectors of E H Eᵀ, L = U_r and R = U_rᵀE is optimal, and the
tail of the eigenvalues is the error left at every r. (Write H = SSᵀ; by Eckart-Young the best rank-r part of ES is
U_rU_rᵀES, which U_rU_rᵀE attains, S singular or not.) U_r comes from a subspace iteration on ES (Halko, Martinsson
and Tropp, arXiv 0909.4061). L is rounded to its grid first, R is fitted to the rounded L by least squares (LPLR,
arXiv 2310.11028, without the pseudo-inverse of H: it cancels) and rounded by GPTQ under H, because an error in R
reaches the output through H just as an error in Q does.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from allocator.storage import FACTOR_GROUP_SIZE, KEEP_BITS
from compressor.gptq import DAMPING, SingularHessianError, cholesky, gptq
from compressor.grid import Quantized, round_to_nearest
from compressor.precision import tensor_cores

OVERSAMPLING = 8
ITERATIONS = 2
ROOT_DAMPING = (1e-8, 1e-6, 1e-4)


@dataclass(frozen=True, slots=True)
class Factors:
    """L (O, r), stored as its transpose, and R (r, I); quantized, or bfloat16 where factor_bits is 16."""

    left_rO: Quantized | Tensor
    right_rI: Quantized | Tensor

    def product(self) -> Tensor:
        """L·R, float32 (O, I)."""
        return dense(self.left_rO).T @ dense(self.right_rI)


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


def leading_directions(residual_POI: Tensor, root_II: Tensor, rank: int) -> Tensor:
    """(P, O, rank) orthonormal, the leading eigenvectors of E H Eᵀ = (ES)(ES)ᵀ in falling order."""
    _, rows, columns = residual_POI.shape
    with tensor_cores():
        weighted_POI = residual_POI @ root_II
    width = min(rank + OVERSAMPLING, rows, columns)
    generator = torch.Generator().manual_seed(0)
    start_Ik = torch.randn(columns, width, generator=generator).to(residual_POI.device)
    basis_POk = orthonormal(weighted_POI @ start_Ik)
    for _ in range(ITERATIONS):
        other_PIk = orthonormal(weighted_POI.mT @ basis_POk)
        basis_POk = orthonormal(weighted_POI @ other_PIk)
    small_PkI = basis_POk.mT @ weighted_POI
    _, vector_Pkk = torch.linalg.eigh((small_PkI @ small_PkI.mT).double())
    return (basis_POk.double() @ vector_Pkk.flip(-1)[..., :rank]).float()


def orthonormal(span_POk: Tensor) -> Tensor:
    """Orthonormal columns of the same span, by Householder's QR; on CUDA, where its thin steps are slow, by Cholesky's.

    Columns that all but depend on each other leave Cholesky's to Householder's.
    """
    by_products_POk = cholesky_qr(span_POk) if span_POk.is_cuda else None
    return torch.linalg.qr(span_POk).Q if by_products_POk is None else by_products_POk


def cholesky_qr(span_POk: Tensor) -> Tensor | None:
    """Cholesky QR in float64, twice (Yamamoto et al., ETNA 44, 2015); None where once was far from enough."""
    once_POk, _ = _normalized(span_POk.double())
    twice_POk, gram_Pkk = _normalized(once_POk)
    identity_kk = torch.eye(gram_Pkk.shape[-1], device=gram_Pkk.device, dtype=gram_Pkk.dtype)
    return twice_POk.float() if (gram_Pkk - identity_kk).abs().amax() < 0.1 else None


def _normalized(span_POk: Tensor) -> tuple[Tensor, Tensor]:
    """Y L⁻ᵀ, and YᵀY = LLᵀ; NaN where that is not positive definite."""
    gram_Pkk = span_POk.mT @ span_POk
    lower_Pkk, failed_P = torch.linalg.cholesky_ex(gram_Pkk)
    lower_Pkk[failed_P > 0] = torch.nan
    return torch.linalg.solve_triangular(lower_Pkk, span_POk.mT, upper=False).mT, gram_Pkk


def factorize(
    residual_POI: Tensor,
    root_II: Tensor,
    factor_II: Tensor,
    ranks: Sequence[int],
    factor_bits: Sequence[int],
) -> list[Factors]:
    """Quantized factors of P residuals, each with its own rank and factor bits.

    residual (P, O, I); root from `square_root`, factor from `gptq.inverse_factor`; ranks at most min(O, I).
    """
    direction_POr = leading_directions(residual_POI, root_II, max(ranks))
    lefts, targets = [], []
    for residual_OI, direction_Or, rank, bits in zip(
        residual_POI, direction_POr, ranks, factor_bits, strict=True
    ):
        left_rO = _round_left(direction_Or[:, :rank].T, bits)
        left_Or = dense(left_rO).T
        gram_rr = left_Or.T @ left_Or
        lefts.append(left_rO)
        targets.append(torch.linalg.solve(gram_rr, left_Or.T @ residual_OI))
    return [
        Factors(left, right)
        for left, right in zip(lefts, _round_rights(targets, factor_II, factor_bits), strict=True)
    ]


def _round_left(left_rO: Tensor, bits: int) -> Quantized | Tensor:
    """Nearest rounding: in this basis R H Rᵀ is diagonal, so no column can make good another's error."""
    if bits == KEEP_BITS:
        return left_rO.bfloat16()
    return round_to_nearest(left_rO, bits, FACTOR_GROUP_SIZE)


def _round_rights(
    targets: list[Tensor], factor_II: Tensor, factor_bits: Sequence[int]
) -> list[Quantized | Tensor]:
    """GPTQ of every R that is quantized, in one column loop: rows of one width share it, whatever their problem."""
    rights: list[Quantized | Tensor] = [target.bfloat16() for target in targets]
    for bits in sorted(set(factor_bits) - {KEEP_BITS}):
        members = [p for p, width in enumerate(factor_bits) if width == bits]
        stacked = torch.cat([targets[p] for p in members])
        rounded = gptq(stacked[None], factor_II, [bits], [FACTOR_GROUP_SIZE])[0]
        first = 0
        for p in members:
            rows = slice(first, first + len(targets[p]))
            first = rows.stop
            rights[p] = Quantized(
                rounded.code_OI[rows], rounded.scale_OG[rows], rounded.zero_OG[rows], bits, FACTOR_GROUP_SIZE
            )
    return rights
