"""Q and L·R of one matrix, and what they leave of it.

What lives here: the pair that decomposing ends with. How it is found is in `decompose.py` and `alternating.py`, how it
is stored in `linear.py`. Letters: O rows, I columns, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from allocator.storage import Option
from compressor.cuda.scaled_half import Operand, subtract_product
from compressor.grid import Quantized
from compressor.hadamard import restored, rotation
from compressor.lowrank.factorize import WIDEST_LEFT, Factors, dense


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
        return rest_of(w_OI, left, right)

    def _whole(self) -> Tensor:
        if self.quantized is None:
            assert self.factors is not None
            return self.factors.product()
        q_OI = self.quantized.dequantize()
        if self.factors is None:
            return q_OI
        return torch.addmm(q_OI.T, dense(self.factors.right_rI).T, dense(self.factors.left_rO)).T


def rest_of(w_OI: Tensor, left: Operand, right: Operand) -> Tensor:
    """W − LR (O, I), in memory column by column."""
    rest_IO = w_OI.T.clone(memory_format=torch.contiguous_format)
    subtract_product(rest_IO, right.T, left)
    return rest_IO.T


def by_column(w_OI: Tensor) -> Tensor:
    """W in memory column by column."""
    return w_OI.T.contiguous().T
