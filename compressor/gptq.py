"""GPTQ: rounding column by column, each rounding error made good by the columns still to come.

What lives here: the damped inverse factor of a Hessian and the column loop. Grids are in `grid.py`.

Letters: P problems of one shape under one Hessian (bit widths, group sizes, layers), O rows, I columns, R = P·O.
The loop works on the transpose, (I, R), so that a column of every problem is one contiguous run of memory.

Frantar et al., GPTQ (arXiv 2210.17323); the same recursion is LDLQ in QuIP (arXiv 2307.13304). Columns are split in
halves recursively: when a node of the recursion starts, every column before it has been rounded and its error
spread over the node, so a group of 32, 64 or 128 columns, which is a node, always sees up-to-date weights when its
grid is searched.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from allocator.errors import BitrankError
from compressor.grid import Grid, Quantized, search_grid

LEAF = 32
"""Columns rounded one by one between two matrix products; every group size is a multiple."""
DAMPING = 0.01


class SingularHessianError(BitrankError):
    """The Hessian stays singular, or is not finite, even when damped."""


def inverse_factor(hessian_II: Tensor, damping: float = DAMPING) -> Tensor:
    """Upper U with UᵀU = (H + damping·mean(diag H)·I)⁻¹, float32; columns that no token excites count as average.

    With J the reversal of columns and J H J = LLᵀ, V = J L J is upper and H = VVᵀ, so U = V⁻¹: one factorization in
    float64 and one triangular inverse. Raises `SingularHessianError` when H is not finite or stays indefinite: the
    damping is relative, so a Hessian of any scale, or of rank one, passes.
    """
    lower_II = cholesky(hessian_II.flip(0, 1), damping)
    return torch.linalg.solve_triangular(
        lower_II.flip(0, 1), torch.eye(len(lower_II), device=lower_II.device), upper=True
    )


def cholesky(hessian_II: Tensor, damping: float) -> Tensor:
    """Lower L with LLᵀ = H + damping·mean(diag H)·I, factored in float64, returned in float32.

    Raises `SingularHessianError` when H is not finite or stays indefinite.
    """
    if not torch.isfinite(hessian_II).all():
        raise SingularHessianError(
            "the Hessian has NaN or infinite entries; check the calibration activations"
        )
    h_II = hessian_II.to(torch.float64, copy=True)
    diagonal_I = h_II.diagonal()
    mean = diagonal_I[diagonal_I > 0].mean() if (diagonal_I > 0).any() else diagonal_I.new_ones(())
    diagonal_I[diagonal_I <= 0] = mean
    diagonal_I += damping * mean
    try:
        return torch.linalg.cholesky(h_II, out=h_II).float()
    except torch.linalg.LinAlgError as error:
        raise SingularHessianError(
            f"the Hessian is not positive definite ({error}); raise the damping"
        ) from error


def gptq(
    w_POI: Tensor, factor_II: Tensor, bits: Sequence[int], group_sizes: Sequence[int]
) -> list[Quantized]:
    """Quantize P matrices of one shape in one column loop.

    w (P, O, I) float32; factor from `inverse_factor`; bits and group_sizes of length P. Group sizes are multiples
    of 32; the last group of a row may be short.
    """
    problems, rows, columns = w_POI.shape
    loop = _ColumnLoop(w_POI, factor_II, bits, group_sizes)
    loop.round_columns(0, columns)
    code_POI = loop.code_IR.T.reshape(problems, rows, columns)
    return [
        Quantized(
            code_OI=code_POI[p].contiguous(),
            scale_OG=torch.stack([grid.scale_R for grid in loop.grids[p]], dim=1).bfloat16(),
            zero_OG=torch.stack([grid.zero_R for grid in loop.grids[p]], dim=1).to(torch.uint8),
            bits=bits[p],
            group_size=group_sizes[p],
        )
        for p in range(problems)
    ]


class _ColumnLoop:
    """The state of one run: the weights still to round, the errors made, and every problem's grids so far."""

    def __init__(
        self, w_POI: Tensor, factor_II: Tensor, bits: Sequence[int], group_sizes: Sequence[int]
    ) -> None:
        problems, rows, columns = w_POI.shape
        self.rows, self.group_sizes = rows, group_sizes
        self.w_IR = w_POI.reshape(problems * rows, columns).T.contiguous()
        self.error_IR = torch.empty_like(self.w_IR)
        self.code_IR = torch.empty_like(self.w_IR, dtype=torch.uint8)
        self.factor_II = factor_II
        self.diagonal = factor_II.diagonal().tolist()
        self.importance_I = factor_II.diagonal().square().reciprocal()
        maximum_P = torch.tensor([2.0**b - 1 for b in bits], device=w_POI.device)
        maximum_R = maximum_P.repeat_interleave(rows)
        self.now = Grid(torch.ones_like(maximum_R), torch.zeros_like(maximum_R), maximum_R)
        self.grids: list[list[Grid]] = [[] for _ in group_sizes]

    def round_columns(self, start: int, end: int) -> None:
        if end - start <= LEAF:
            self._round_leaf(start, end)
            return
        middle = start + LEAF
        while 2 * (middle - start) < end - start:
            middle = start + 2 * (middle - start)
        self.round_columns(start, middle)
        spread_II = self.factor_II[start:middle, middle:end].T
        self.w_IR[middle:end].addmm_(spread_II, self.error_IR[start:middle], alpha=-1)
        self.round_columns(middle, end)

    def _round_leaf(self, start: int, end: int) -> None:
        for group_size in sorted(set(self.group_sizes)):
            if start % group_size == 0:
                self._search(start, group_size)
        for column in range(start, end):
            w_R = self.w_IR[column]
            code_R = self.now.encode(w_R)
            self.code_IR[column] = code_R
            error_R = torch.sub(w_R, self.now.decode(code_R), out=self.error_IR[column])
            error_R.div_(self.diagonal[column])
            if column + 1 < end:
                self.w_IR[column + 1 : end].addr_(self.factor_II[column, column + 1 : end], error_R, alpha=-1)

    def _search(self, start: int, group_size: int) -> None:
        """Refit the grids of every problem that starts a group here."""
        w_gR = self.w_IR[start : start + group_size]
        importance_g1 = self.importance_I[start : start + group_size, None]
        for p in [p for p, size in enumerate(self.group_sizes) if size == group_size]:
            rows = slice(p * self.rows, (p + 1) * self.rows)
            grid = search_grid(w_gR[:, rows], importance_g1, self.now.maximum_R[rows])
            self.now.scale_R[rows], self.now.zero_R[rows] = grid.scale_R, grid.zero_R
            self.grids[p].append(grid)
