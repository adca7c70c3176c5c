"""GPTQ: rounding column by column, each rounding error made good by the columns still to come.

What lives here: the damped inverse factor of a Hessian and the column loop. Grids are in `grid.py`, the loop's
compiled innermost part in `gptq_numba.py` for a CPU and in `gptq_cuda.py` for CUDA.

Letters: P problems of one shape under one Hessian (bit widths, group sizes, layers), O rows, I columns, R = P·O.
The loop works on the transpose, (I, R), so that a column of every problem is one contiguous run of memory.

Frantar et al., GPTQ (arXiv 2210.17323); the same recursion is LDLQ in QuIP (arXiv 2307.13304). Columns are split in
halves recursively: when a node of the recursion starts, every column before it has been rounded and its error
spread over the node, so a group of 32, 64 or 128 columns, which is a node, always sees up-to-date weights when its
grid is searched.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from allocator.errors import BitrankError
from allocator.storage import ceil_div
from compressor.cuda.scaled_half import ROOM, Operand, largest_of, subtract_product
from compressor.grid import Grid, Quantized, grouped, search_grid

LEAF = 32
"""Columns rounded one by one between two matrix products; every group size is a multiple."""
FUSED = 128
"""Columns that one call of a compiled kernel rounds."""
DAMPING = 0.01


class SingularHessianError(BitrankError):
    """The Hessian stays singular, or is not finite, even when damped."""


def inverse_factor(hessian_II: Tensor, damping: float = DAMPING) -> Tensor:
    """Upper U with UᵀU = (H + damping·mean(diag H)·I)⁻¹, float32; columns that no token excites count as average.

    With J the reversal of columns and J H J = LLᵀ, V = J L J is upper and H = VVᵀ, so U = V⁻¹: one factorization in
    float64 and one triangular inverse. Where H stays indefinite, the damping is raised tenfold, twice at most, with a
    warning. Raises `SingularHessianError` when that does not help or H is not finite: the damping is relative, so a
    Hessian of any scale, or of rank one, passes.
    """
    return _inverted(_damped_cholesky(hessian_II.flip(0, 1), damping))


def strict_inverse_factor(hessian_II: Tensor, damping: float = DAMPING) -> Tensor:
    """As `inverse_factor`, but raises `SingularHessianError` where H with that damping is indefinite."""
    return _inverted(cholesky(hessian_II.flip(0, 1), damping))


def _inverted(reversed_II: Tensor) -> Tensor:
    """U from the Cholesky factor of J H J."""
    one_II = torch.eye(len(reversed_II), device=reversed_II.device)
    factor_II: Tensor = torch.linalg.solve_triangular(reversed_II.flip(0, 1), one_II, upper=True)
    return factor_II.contiguous()


def _damped_cholesky(hessian_II: Tensor, damping: float) -> Tensor:
    for raised in (damping, 10 * damping):
        try:
            return cholesky(hessian_II, raised)
        except SingularHessianError:
            if not torch.isfinite(hessian_II).all():
                raise
            warnings.warn(
                f"a Hessian of {len(hessian_II)} columns is not positive definite with damping {raised:g};"
                f" it is damped by {10 * raised:g} of its mean",
                stacklevel=3,
            )
    return cholesky(hessian_II, 100 * damping)


def cholesky(hessian_II: Tensor, damping: float) -> Tensor:
    """Lower L with LLᵀ = H + damping·mean(diag H)·I, factored in float64, returned in float32.

    Raises `SingularHessianError` when H is not finite or stays indefinite.
    """
    h_II = hessian_II.to(torch.float64, copy=True)
    h_II.diagonal().copy_(damped_diagonal(hessian_II, damping))
    failed = torch.zeros((), dtype=torch.int32, device=h_II.device)
    torch.linalg.cholesky_ex(h_II, out=(h_II, failed))
    if (failed == 0) & torch.isfinite(h_II).all():  # cuSOLVER can report success and return NaN
        return h_II.float()
    if not torch.isfinite(hessian_II).all():
        raise SingularHessianError(
            "the Hessian has NaN or infinite entries; check the calibration activations"
        )
    raise SingularHessianError("the Hessian is not positive definite; raise the damping")


def damped_diagonal(hessian_II: Tensor, damping: float = DAMPING) -> Tensor:
    """diag H + damping·mean(diag H), float64 (I,); columns that no token excites count as average."""
    diagonal_I = hessian_II.diagonal().double()
    excited_I = diagonal_I > 0
    count = excited_I.sum()
    mean = torch.where(count > 0, diagonal_I.clamp(min=0).sum() / count, 1.0)
    return torch.add(torch.where(excited_I, diagonal_I, mean), mean, alpha=damping)


def gptq(
    weights: Sequence[Tensor] | Tensor, factor_II: Tensor, bits: Sequence[int], group_sizes: Sequence[int]
) -> list[Quantized]:
    """Quantize P matrices of one shape in one column loop.

    P weights (O, I) float32; factor from `inverse_factor`; bits and group_sizes of length P. Group sizes are multiples
    of 32; the last group of a row may be short. A compiled kernel takes 128 columns at a time, where there is one; its
    sums run in another order, so that codes agree up to rounding.
    """
    w_IR = torch.cat([w_OI.T for w_OI in weights], dim=1)
    largest = largest_of(w_IR) if w_IR.is_cuda else 0.0
    return rounded(w_IR, largest, Factor(factor_II), bits, group_sizes)


@dataclass(frozen=True)
class Factor:
    """U as `inverse_factor` has it, and what spreading errors needs of it, found once."""

    values_II: Tensor

    @cached_property
    def bounds(self) -> tuple[float, float]:
        """Its largest entry, and the least of its diagonal, over which errors are spread."""
        if not self.values_II.is_cuda:
            return 0.0, 1.0
        low, high = self.values_II.aminmax()
        low, high, diagonal = torch.stack([low, high, self.values_II.diagonal().amin()]).tolist()
        return max(-low, high), diagonal

    @cached_property
    def spreading(self) -> Operand:
        """As a factor of products."""
        return Operand.of(self.values_II, self.bounds[0])

    def pivots(self) -> Tensor:
        """d (I,): H = L diag(d) Lᵀ with unit triangular L; what an error costs after later columns made it good."""
        return self.values_II.diagonal().square().reciprocal()


def rounded(
    w_IR: Tensor, largest: float, factor: Factor, bits: Sequence[int], group_sizes: Sequence[int]
) -> list[Quantized]:
    """As `gptq`, of the transposes of weights beside each other, which are used up; none is much above `largest`."""
    problems, rows = len(bits), w_IR.shape[1] // len(bits)
    state = _State.of(w_IR, largest, factor, bits, group_sizes)
    round_block = _compiled(state)
    in_halves(round_block or _Leaf(state), state.spread, FUSED if round_block else LEAF, 0, len(state.w_IR))
    scale_SPO = state.scale_SR.view(-1, problems, rows)
    zero_SPO = state.zero_SR.view(-1, problems, rows)
    return [
        Quantized(
            code_OI=code_IO.T,
            scale_OG=scale_SPO[:: group_sizes[p] // LEAF, p].T.bfloat16(),
            zero_OG=zero_SPO[:: group_sizes[p] // LEAF, p].T.to(torch.uint8),
            bits=bits[p],
            group_size=group_sizes[p],
        )
        for p, code_IO in enumerate(state.code_IR.split(rows, dim=1))
    ]


def round_to_nearest(w_OI: Tensor, bits: int, group_size: int, largest: float | None = None) -> Quantized:
    """Every group by itself, which is GPTQ under H = I; zeros that fill a group up to a whole leaf bend no grid.

    No weight is above `largest`; it need not be given.
    """
    rows, columns = w_OI.shape
    width = ceil_div(group_size, LEAF) * LEAF
    w_Rg = F.pad(grouped(w_OI, group_size).flatten(0, 1), (0, width - group_size))
    largest = largest_of(w_OI) if largest is None else largest
    (found,) = rounded(w_Rg.T.contiguous(), largest, _identity(width, w_OI.device), [bits], [width])
    code_OI = found.code_OI[:, :group_size].reshape(rows, -1)[:, :columns].contiguous()
    return Quantized(code_OI, found.scale_OG.view(rows, -1), found.zero_OG.view(rows, -1), bits, group_size)


@cache
def _identity(width: int, device: torch.device) -> Factor:
    return Factor(torch.eye(width, device=device))


@dataclass(frozen=True, slots=True)
class _State:
    """One run: the weights still to round, the errors made, the codes, and the grid that starts at each 32 columns."""

    w_IR: Tensor
    error_IR: Operand
    code_IR: Tensor
    scale_SR: Tensor
    zero_SR: Tensor
    factor_II: Tensor
    spreading_II: Operand
    maximum_P: Tensor
    group_sizes: tuple[int, ...]

    @classmethod
    def of(
        cls,
        w_IR: Tensor,
        largest: float,
        factor: Factor,
        bits: Sequence[int],
        group_sizes: Sequence[int],
    ) -> _State:
        columns, rows = w_IR.shape
        scale_SR = w_IR.new_empty(ceil_div(columns, LEAF), rows)
        _, diagonal = factor.bounds
        return cls(
            w_IR,
            Operand.empty(columns, rows, w_IR.device, largest / diagonal * ROOM),
            torch.empty_like(w_IR, dtype=torch.uint8),
            scale_SR,
            torch.empty_like(scale_SR),
            factor.values_II,
            factor.spreading,
            maximum_codes(tuple(bits), w_IR.device),
            tuple(group_sizes),
        )

    def spread(self, start: int, middle: int, end: int) -> None:
        """The errors of columns from `start` on, taken off the weights from `middle` on."""
        spread_II = self.spreading_II[start:middle, middle:end].T
        subtract_product(self.w_IR[middle:end], spread_II, self.error_IR[start:middle])


@cache
def maximum_codes(bits: tuple[int, ...], device: torch.device) -> Tensor:
    """2^bits − 1, float32 (P,)."""
    return torch.tensor([2.0**b - 1 for b in bits], device=device)


def in_halves(
    visit: Callable[[int, int], None],
    spread: Callable[[int, int, int], None],
    leaf: int,
    start: int,
    end: int,
    spread_back: Callable[[int, int, int], None] | None = None,
) -> None:
    """Visit columns start to end, `leaf` at a time, and spread what changed: of each half over the other.

    Both ways to spread are given where the first half starts, where the second does, and where that ends.
    """
    if end - start <= leaf:
        visit(start, end)
        return
    middle = start + leaf
    while 2 * (middle - start) < end - start:
        middle = start + 2 * (middle - start)
    in_halves(visit, spread, leaf, start, middle, spread_back)
    spread(start, middle, end)
    in_halves(visit, spread, leaf, middle, end, spread_back)
    if spread_back:
        spread_back(start, middle, end)


class _Leaf:
    """Rounds up to 32 columns one by one, on any device; keeps every row's present grid."""

    def __init__(self, state: _State) -> None:
        self.state = state
        self.rows = state.w_IR.shape[1] // len(state.group_sizes)
        self.diagonal = state.factor_II.diagonal().tolist()
        self.importance_I = state.factor_II.diagonal().square().reciprocal()
        maximum_R = state.maximum_P.repeat_interleave(self.rows)
        self.now = Grid(torch.ones_like(maximum_R), torch.zeros_like(maximum_R), maximum_R)

    def __call__(self, start: int, end: int) -> None:
        state = self.state
        for group_size in sorted(set(state.group_sizes)):
            if start % group_size == 0:
                self._search(start, group_size)
        for column in range(start, end):
            w_R = state.w_IR[column]
            code_R = self.now.encode(w_R)
            state.code_IR[column] = code_R
            error_R = (w_R - self.now.decode(code_R)).div_(self.diagonal[column])
            state.error_IR[column].put(error_R)
            if column + 1 < end:
                spread_I = state.factor_II[column, column + 1 : end]
                state.w_IR[column + 1 : end].addr_(spread_I, error_R, alpha=-1)

    def _search(self, start: int, group_size: int) -> None:
        """Refit the grids of every problem that starts a group here."""
        state = self.state
        w_gR = state.w_IR[start : start + group_size]
        importance_g1 = self.importance_I[start : start + group_size, None]
        for p in [p for p, size in enumerate(state.group_sizes) if size == group_size]:
            rows = slice(p * self.rows, (p + 1) * self.rows)
            grid = search_grid(w_gR[:, rows], importance_g1, self.now.maximum_R[rows])
            self.now.scale_R[rows], self.now.zero_R[rows] = grid.scale_R, grid.zero_R
            state.scale_SR[start // LEAF, rows], state.zero_SR[start // LEAF, rows] = (
                grid.scale_R,
                grid.zero_R,
            )


def _compiled(state: _State) -> Callable[[int, int], None] | None:
    """What rounds a block of 128 columns at once, where it is installed and every group ends within a block.

    It is given where the block starts and ends, every earlier block's errors already spread over its weights. error
    receives each column's error over the factor's diagonal, code the codes, scale and zero the grid of the group that
    starts at each 32 columns.
    """
    if any(FUSED % size for size in state.group_sizes):
        return None
    parts = state.w_IR, state.error_IR, state.code_IR, state.scale_SR, state.zero_SR, state.factor_II
    if state.w_IR.device.type == "cpu" and find_spec("numba"):
        from compressor.quantize.gptq_numba import round_block

        return partial(round_block, *parts, state.maximum_P, state.group_sizes)
    if state.w_IR.device.type == "cuda":
        from compressor.cuda.gptq_cuda import block_kernel

        return block_kernel("round_block", *parts, state.maximum_P, state.group_sizes)
    return None
