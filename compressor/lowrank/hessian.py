"""What decomposing needs of a Hessian, and the output errors that it prices.

What lives here: H, its root S and its damped inverse factor, each found once, and H without what a low-rank part can
make good. Letters: P problems, O rows, I columns, r rank, R all ranks beside each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from compressor.cuda.residual import residuals
from compressor.cuda.scaled_half import ROOM, Operand, product, tensor_cores
from compressor.hadamard import turned
from compressor.lowrank.decomposition import Decomposition
from compressor.lowrank.factorize import Root, orthonormal, square_root, through
from compressor.quantize.gptq import Factor, SingularHessianError, inverse_factor, strict_inverse_factor

LEAST_ABSORBED = 0.15


@dataclass(frozen=True)
class Curvature:
    """What decomposing needs of a Hessian: H, its root, its damped inverse factor, each found when it is first asked
    for."""

    hessian_II: Tensor

    @classmethod
    def of(cls, hessian_II: Tensor) -> Curvature:
        return cls(hessian_II.float())

    @cached_property
    def root_II(self) -> Tensor:
        """S (I, I), lower triangular, with SSᵀ = H."""
        return square_root(self.hessian_II)

    @cached_property
    def factor_II(self) -> Tensor:
        """U (I, I), upper triangular, with UᵀU the inverse of the damped H."""
        return inverse_factor(self.hessian_II)

    @cached_property
    def factor(self) -> Factor:
        """The damped inverse factor, as rounding takes it."""
        return Factor(self.factor_II)

    @cached_property
    def root(self) -> Root:
        """S as a factor of products."""
        return Root.of(self.root_II)

    def squared_norms(self, deltas: Operand, parts: int = 1, share_O: Tensor | None = None) -> Tensor:
        """‖ΔS‖² = tr(Δ H Δᵀ) of P matrices of as many rows, below each other: squared output errors per token.

        share_O: what the error of each row counts; 1 where it is not given.
        """
        return through(deltas, self.root).squared_norms(parts, share_O)

    def squared_errors(
        self,
        weights: Sequence[Tensor],
        found: Sequence[Decomposition],
        largest: float,
        share_O: Tensor | None = None,
    ) -> Tensor:
        """The squared output error per token, (P,), of what was made of matrices (O, I); none is above `largest`.

        share_O as in `squared_norms`.
        """
        quantized = [d.quantized for d in found if d.quantized is not None and d.is_subtracted]
        pairs = zip(weights, found, strict=True)
        if len(quantized) < len(found):
            deltas = Operand.of(torch.cat([w_OI - d.dense() for w_OI, d in pairs]))
        else:
            rests = (d.rest(w_OI, largest) for w_OI, d in pairs)
            deltas, _ = residuals(rests, quantized, len(weights[0]), ROOM * largest)
        return self.squared_norms(deltas, len(found), share_O)

    @cached_property
    def rotated(self) -> Curvature:
        """Of rotated inputs: V H Vᵀ."""
        return Curvature.of(turned(turned(self.hessian_II).T))

    def deflated(self, rights: Sequence[Tensor]) -> Iterator[Factor | None]:
        """For each R (r, I), all of one rank: the factor of H − HRᵀ(RHRᵀ)⁻¹RH, which an error that a multiple of R
        can make good does not feel.

        None where R takes less than `LEAST_ABSORBED` of the trace, or leaves nothing that can be factored. One at a
        time, since each is as large as H.
        """
        basis_PIr = self._orthonormal(rights)
        reach_IR = product(self.root.values, Operand.of(torch.cat(tuple(basis_PIr), dim=1), 1.0))
        taken_P = reach_IR.square_().sum(dim=0).unflatten(0, (len(rights), -1)).sum(dim=1)
        is_enough_P = taken_P >= LEAST_ABSORBED * self.hessian_II.diagonal().sum()
        for basis_Ir, is_enough in zip(basis_PIr, is_enough_P.tolist(), strict=True):
            yield self._without(basis_Ir) if is_enough else None

    def _without(self, basis_Ir: Tensor) -> Factor | None:
        """The factor of H without what it holds along S times these orthonormal directions, if there is one."""
        reach_Ir = self.root_II @ basis_Ir
        hessian_II = self.hessian_II - reach_Ir @ reach_Ir.T
        hessian_II.diagonal().clamp_(min=0)
        with suppress(SingularHessianError):
            return Factor(strict_inverse_factor(hessian_II))
        return None

    def _orthonormal(self, rights: Sequence[Tensor]) -> Tensor:
        """(P, I, r): bases of the columns of (RS)ᵀ."""
        weighted = through(Operand.of(torch.cat(tuple(rights))), self.root)
        return orthonormal(weighted.dense().unflatten(0, (len(rights), -1)).mT)


def row_errors(w_OI: Tensor, approximation_OI: Tensor, hessian_II: Tensor) -> Tensor:
    """diag(ΔW H ΔWᵀ), float32 (O,): the squared output error of every row, per token."""
    delta_OI = w_OI - approximation_OI
    with tensor_cores():
        return ((delta_OI @ hessian_II) * delta_OI).sum(dim=1).clamp_(min=0)


def squared_error(w_OI: Tensor, approximation_OI: Tensor, hessian_II: Tensor) -> float:
    """tr(ΔW H ΔWᵀ): the squared output error of all rows, per token."""
    return row_errors(w_OI, approximation_OI, hessian_II).sum().item()
