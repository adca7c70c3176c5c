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

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

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
    basis_POk = torch.linalg.qr(weighted_POI @ start_Ik).Q
    for _ in range(ITERATIONS):
        other_PIk = torch.linalg.qr(weighted_POI.mT @ basis_POk).Q
        basis_POk = torch.linalg.qr(weighted_POI @ other_PIk).Q
    small_PkI = basis_POk.mT @ weighted_POI
    _, vector_Pkk = torch.linalg.eigh((small_PkI @ small_PkI.mT).double())
    return (basis_POk.double() @ vector_Pkk.flip(-1)[..., :rank]).float()


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
    lefts = _rounded_together(
        [direction_Or[:, :rank].T for direction_Or, rank in zip(direction_POr, ranks, strict=True)],
        factor_bits,
        _round_left,
    )
    targets = []
    for left, residual_OI in zip(lefts, residual_POI, strict=True):
        left_Or = dense(left).T
        targets.append(torch.linalg.solve(left_Or.T @ left_Or, left_Or.T @ residual_OI))
    rights = _rounded_together(targets, factor_bits, partial(_round_right, factor_II))
    return [Factors(left, right) for left, right in zip(lefts, rights, strict=True)]


def _round_left(left_RO: Tensor, bits: int) -> Quantized:
    """Nearest rounding: in this basis R H Rᵀ is diagonal, so no column can make good another's error."""
    return round_to_nearest(left_RO, bits, FACTOR_GROUP_SIZE)


def _round_right(factor_II: Tensor, right_RI: Tensor, bits: int) -> Quantized:
    return gptq(right_RI[None], factor_II, [bits], [FACTOR_GROUP_SIZE])[0]


def _rounded_together(
    parts: Sequence[Tensor], factor_bits: Sequence[int], round_rows: Callable[[Tensor, int], Quantized]
) -> list[Quantized | Tensor]:
    """Every part (r, ·) rounded, all rows of one width at once, whatever their problem; bfloat16 where bits are 16."""
    rounded: list[Quantized | Tensor] = [part.bfloat16() for part in parts]
    for bits in sorted(set(factor_bits) - {KEEP_BITS}):
        members = [p for p, width in enumerate(factor_bits) if width == bits]
        whole = round_rows(torch.cat([parts[p] for p in members]), bits)
        first = 0
        for p in members:
            rows = slice(first, first + len(parts[p]))
            first = rows.stop
            rounded[p] = Quantized(
                whole.code_OI[rows], whole.scale_OG[rows], whole.zero_OG[rows], bits, FACTOR_GROUP_SIZE
            )
    return rounded
