"""A block of 128 columns in one Triton kernel: rounded by GPTQ, grids searched first, or its codes moved by descent.

What lives here: two kernels and their launches. The products that spread a block's changes over the columns to come,
and everything that holds on any device, are in `gptq.py` and `descent.py`; the search repeats `grid.search_grid`.

Letters: P problems, O rows of each, R = P·O, I columns, C columns of the block, S = I / 32 slots, L = 32 columns of a
leaf, g of a group. A row never depends on another row, so one warp takes 32 rows through the whole block. What bounds
it is latency, not arithmetic: a group is searched in registers, a column's inputs are loaded while the column before is
rounded, and a leaf's errors are spread over the leaves to come by the tensor core, in three TF32 products that make up
one of float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from compressor.grid import REFITS, SHRINKS

_LEAF = tl.constexpr(32)
_TRIALS = tl.constexpr(2 * len(SHRINKS))
_REFITS = tl.constexpr(REFITS)
_TINY = tl.constexpr(1e-30)
_SMALLEST = tl.constexpr(torch.finfo(torch.bfloat16).tiny)
_ROUNDER = tl.constexpr(1.5 * 2**23)
_INFINITY = tl.constexpr(float("inf"))


def round_block(
    w_CR: Tensor,
    error_CR: Tensor,
    code_CR: Tensor,
    scale_SR: Tensor,
    zero_SR: Tensor,
    factor_CC: Tensor,
    maximum_P: Tensor,
    group_sizes: Sequence[int],
) -> None:
    """Round one block of at most 128 columns in place; all tensors float32 but the codes, uint8.

    w holds the weights, every earlier block's errors already spread over them, and is used up; error receives each
    column's error over the factor's diagonal, code the codes, scale and zero the grid of the group that starts at
    each 32 columns. factor (C, C) is the block's part of `gptq.inverse_factor`; maximum is 2^bits − 1;
    group sizes divide 128.
    """
    problems, columns = len(maximum_P), len(w_CR)
    rows = w_CR.shape[1] // problems
    for group_size in sorted(set(group_sizes)):
        members = tuple(p for p, size in enumerate(group_sizes) if size == group_size)
        _round_block[(triton.cdiv(rows, 32), len(members))](
            w_CR,
            error_CR,
            code_CR,
            scale_SR,
            zero_SR,
            factor_CC,
            maximum_P,
            _member_numbers(members, w_CR.device),
            _shrinks(w_CR.device),
            rows,
            w_CR.shape[1],
            *factor_CC.stride(),
            columns,
            group_size,
            num_warps=1,
            num_stages=1,
        )


def descend_block(
    pull_CR: Tensor,
    change_CR: Tensor,
    code_CR: Tensor,
    scale_SR: Tensor,
    hessian_CC: Tensor,
    diagonal_C: Tensor,
    maximum_P: Tensor,
) -> None:
    """Move the codes of one block in place; shapes and contents as for `descent.descend_by_column`."""
    problems, columns = len(maximum_P), len(code_CR)
    rows = code_CR.shape[1] // problems
    _descend_block[(triton.cdiv(rows, 32), problems)](
        pull_CR,
        change_CR,
        code_CR,
        scale_SR,
        hessian_CC,
        diagonal_C,
        maximum_P,
        rows,
        code_CR.shape[1],
        *hessian_CC.stride(),
        columns,
        num_warps=1,
        num_stages=1,
    )


@cache
def _member_numbers(members: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(members, dtype=torch.int32, device=device)


@cache
def _shrinks(device: torch.device) -> Tensor:
    return torch.tensor(SHRINKS, device=device)


@triton.jit
def _nearest(x):
    """The nearest whole number, ties to even; only for what is clamped to ±2^22 afterwards."""
    return (x + _ROUNDER) - _ROUNDER


@triton.jit
def _storable(scale):
    """The nearest bfloat16, in float32; in integers, because the interpreter's cast truncates."""
    bit = scale.to(tl.int32, bitcast=True)
    bit = (bit + 0x7FFF + ((bit >> 16) & 1)) & -65536
    return tl.maximum(bit.to(tl.float32, bitcast=True), _SMALLEST)


@triton.jit
def _levels(w_gR, scale, zero, maximum):
    inverse = tl.div_rn(1.0, scale)[None, :]
    return tl.minimum(tl.maximum(_nearest(w_gR * inverse), -zero[None, :]), (maximum - zero)[None, :])


@triton.jit
def _loss(w_gR, level_gR, importance_g1, scale):
    error_gR = level_gR * scale[None, :] - w_gR
    return tl.sum(importance_g1 * (error_gR * error_gR), axis=0)


@triton.jit
def _refit(w_gR, level_gR, importance_g1, scale):
    """The scale that suits these levels best, by least squares; the present one where there is none."""
    weighted_gR = level_gR * importance_g1
    norm = tl.sum(weighted_gR * level_gR, axis=0)
    refit = tl.div_rn(tl.sum(weighted_gR * w_gR, axis=0), tl.maximum(norm, _TINY))
    return tl.where((norm > 0) & (refit > 0), _storable(tl.maximum(refit, _TINY)), scale)


@triton.jit
def _search(w_gR, importance_g1, shrink_ptr, maximum):
    """scale and zero of one group for 32 rows: `grid.search_grid`."""
    low = tl.minimum(tl.min(w_gR, axis=0), 0.0)
    span = tl.maximum(tl.maximum(tl.max(w_gR, axis=0), 0.0) - low, _TINY)
    scale = _storable(tl.div_rn(span, maximum))
    zero = tl.minimum(_nearest(tl.div_rn(-low, scale)), maximum)
    best = tl.full(maximum.shape, _INFINITY, tl.float32)
    for trial in range(_TRIALS):
        shrink = tl.load(shrink_ptr + trial // 2)
        trial_scale = _storable(tl.div_rn(span * shrink, maximum))
        trial_zero = tl.floor(tl.div_rn(-low * shrink, trial_scale)) + trial % 2
        trial_zero = tl.minimum(tl.maximum(trial_zero, 0.0), maximum)
        loss = _loss(w_gR, _levels(w_gR, trial_scale, trial_zero, maximum), importance_g1, trial_scale)
        better = loss < best
        best = tl.where(better, loss, best)
        scale = tl.where(better, trial_scale, scale)
        zero = tl.where(better, trial_zero, zero)
    for _ in range(_REFITS):
        trial_scale = _refit(w_gR, _levels(w_gR, scale, zero, maximum), importance_g1, scale)
        loss = _loss(w_gR, _levels(w_gR, trial_scale, zero, maximum), importance_g1, trial_scale)
        better = loss < best
        best = tl.where(better, loss, best)
        scale = tl.where(better, trial_scale, scale)
    return scale, zero


@triton.jit
def _spread(w_ptr, matrix_ptr, change_LR, inside, start, stride, down, right, columns: tl.constexpr):
    """Spread what a leaf from column `start` on changed over the leaves after it, in the cache."""
    column_L = start + tl.arange(0, _LEAF)
    for later in range(start + _LEAF, columns, _LEAF):
        later_L = later + tl.arange(0, _LEAF)
        spread_LL = tl.load(
            matrix_ptr + column_L[None, :] * down + later_L[:, None] * right,
            mask=(later_L < columns)[:, None],
            other=0.0,
        )
        later_ptr = w_ptr[None, :] + later_L[:, None] * stride
        within_LR = (later_L < columns)[:, None] & inside[None, :]
        w_LR = tl.load(later_ptr, mask=within_LR, other=0.0)
        w_LR -= tl.dot(spread_LL, change_LR, input_precision="tf32x3")
        tl.store(later_ptr, w_LR, mask=within_LR)


@triton.jit
def _round_leaf(w_LR, factor_ptr, down, right, left, scale, zero, maximum):
    """Codes and errors (L, R) of one leaf's first `left` columns, rounded one by one.

    The factor is upper triangular, so that what is spread onto columns already rounded is zero.
    """
    leaf = tl.arange(0, _LEAF)
    error_LR = tl.zeros((_LEAF, 32), tl.float32)
    spread_next_L = tl.load(factor_ptr + leaf * right, mask=leaf < left, other=0.0)
    for column in range(left):
        spread_L = spread_next_L
        later = min(column + 1, left - 1)
        spread_next_L = tl.load(factor_ptr + later * down + leaf * right, mask=leaf < left, other=0.0)
        diagonal = tl.load(factor_ptr + column * (down + right))
        now_L1 = (leaf == column)[:, None]
        w = tl.sum(tl.where(now_L1, w_LR, 0.0), axis=0)
        code = tl.minimum(tl.maximum(_nearest(tl.div_rn(w, scale)) + zero, 0.0), maximum)
        error = tl.div_rn(w - (code - zero) * scale, tl.zeros_like(w) + diagonal)
        w_LR -= spread_L[:, None] * error[None, :]
        w_LR = tl.where(now_L1, code[None, :], w_LR)
        error_LR = tl.where(now_L1, error[None, :], error_LR)
    return w_LR, error_LR


@triton.jit(do_not_specialize_on_alignment=["code_ptr"])
def _round_block(
    w_ptr,
    error_ptr,
    code_ptr,
    scale_ptr,
    zero_ptr,
    factor_ptr,
    maximum_ptr,
    member_ptr,
    shrink_ptr,
    rows,
    stride: tl.int64,
    down: tl.int64,
    right: tl.int64,
    columns: tl.constexpr,
    group_size: tl.constexpr,
):
    """`down` and `right` are the factor's strides.

    Were codes known to be aligned, their sixteen to a store would lay out the whole loop, and cost it half its speed.
    """
    problem = tl.load(member_ptr + tl.program_id(1))
    row = tl.program_id(0) * 32 + tl.arange(0, 32)
    inside = row < rows
    place = (problem * rows + row).to(tl.int64)
    w_ptr, error_ptr, code_ptr = w_ptr + place, error_ptr + place, code_ptr + place
    maximum = tl.load(maximum_ptr + problem) + tl.zeros_like(row).to(tl.float32)
    leaf = tl.arange(0, _LEAF)
    group = tl.arange(0, group_size)

    scale = tl.full((32,), 1.0, tl.float32)
    zero = tl.zeros((32,), tl.float32)
    for start in range(0, columns, _LEAF):
        if start % group_size == 0:
            column_g = start + group
            within_gR = (column_g < columns)[:, None] & inside[None, :]
            w_gR = tl.load(w_ptr[None, :] + column_g[:, None] * stride, mask=within_gR, other=0.0)
            diagonal_g = tl.load(factor_ptr + column_g * (down + right), mask=column_g < columns, other=1.0)
            importance_g1 = tl.div_rn(1.0, diagonal_g * diagonal_g)[:, None]
            scale, zero = _search(w_gR, importance_g1, shrink_ptr, maximum)
            slot = start // _LEAF * stride + place
            tl.store(scale_ptr + slot, scale, mask=inside)
            tl.store(zero_ptr + slot, zero, mask=inside)
        column_L = start + leaf
        offset_LR = column_L[:, None] * stride
        within_LR = (column_L < columns)[:, None] & inside[None, :]
        w_LR = tl.load(w_ptr[None, :] + offset_LR, mask=within_LR, other=0.0)
        leaf_ptr = factor_ptr + start * (down + right)
        left = min(columns - start, _LEAF)
        code_LR, error_LR = _round_leaf(w_LR, leaf_ptr, down, right, left, scale, zero, maximum)
        tl.store(code_ptr[None, :] + offset_LR, code_LR.to(tl.uint8), mask=within_LR)
        tl.store(error_ptr[None, :] + offset_LR, error_LR, mask=within_LR)
        _spread(w_ptr, factor_ptr, error_LR, inside, start, stride, down, right, columns)
        tl.debug_barrier()


@triton.jit
def _row(pointer, inside):
    """32 positive numbers, laid out among the lanes as a leaf's rows are, which a plain load would not do."""
    first_L1 = (tl.arange(0, _LEAF) == 0)[:, None]
    tile_LR = tl.load(
        pointer[None, :] + tl.zeros((_LEAF, 1), tl.int64), mask=first_L1 & inside[None, :], other=0.0
    )
    return tl.maximum(tl.sum(tile_LR, axis=0), _SMALLEST)


@triton.jit
def _descend_leaf(pull_LR, code_LR, hessian_ptr, diagonal_ptr, down, right, left, scale, maximum):
    """Codes and changes (L, R) of one leaf's first `left` columns. What is spread back is not read again."""
    leaf = tl.arange(0, _LEAF)
    change_LR = tl.zeros((_LEAF, 32), tl.float32)
    spread_next_L = tl.load(hessian_ptr + leaf * right, mask=leaf < left, other=0.0)
    for column in range(left):
        spread_L = spread_next_L
        later = min(column + 1, left - 1)
        spread_next_L = tl.load(hessian_ptr + later * down + leaf * right, mask=leaf < left, other=0.0)
        diagonal = tl.load(diagonal_ptr + column)
        now_L1 = (leaf == column)[:, None]
        pull = tl.sum(tl.where(now_L1, pull_LR, 0.0), axis=0)
        before = tl.sum(tl.where(now_L1, code_LR, 0.0), axis=0)
        wanted = before + tl.div_rn(tl.div_rn(pull, tl.zeros_like(pull) + diagonal), scale)
        code = tl.minimum(tl.maximum(_nearest(wanted), 0.0), maximum)
        change = (code - before) * scale
        pull_LR -= spread_L[:, None] * change[None, :]
        code_LR = tl.where(now_L1, code[None, :], code_LR)
        change_LR = tl.where(now_L1, change[None, :], change_LR)
    return code_LR, change_LR


@triton.jit(do_not_specialize_on_alignment=["code_ptr"])
def _descend_block(
    pull_ptr,
    change_ptr,
    code_ptr,
    scale_ptr,
    hessian_ptr,
    diagonal_ptr,
    maximum_ptr,
    rows,
    stride: tl.int64,
    down: tl.int64,
    right: tl.int64,
    columns: tl.constexpr,
):
    """`down` and `right` are the Hessian's strides."""
    row = tl.program_id(0) * 32 + tl.arange(0, 32)
    inside = row < rows
    place = (tl.program_id(1) * rows + row).to(tl.int64)
    pull_ptr, change_ptr, code_ptr = pull_ptr + place, change_ptr + place, code_ptr + place
    maximum = tl.load(maximum_ptr + tl.program_id(1))
    leaf = tl.arange(0, _LEAF)
    for start in range(0, columns, _LEAF):
        column_L = start + leaf
        offset_LR = column_L[:, None] * stride
        within_LR = (column_L < columns)[:, None] & inside[None, :]
        pull_LR = tl.load(pull_ptr[None, :] + offset_LR, mask=within_LR, other=0.0)
        code_LR = tl.load(code_ptr[None, :] + offset_LR, mask=within_LR, other=0).to(tl.float32)
        scale = _row(scale_ptr + start // _LEAF * stride + place, inside)
        leaf_ptr, left = hessian_ptr + start * (down + right), min(columns - start, _LEAF)
        code_LR, change_LR = _descend_leaf(
            pull_LR, code_LR, leaf_ptr, diagonal_ptr + start, down, right, left, scale, maximum
        )
        tl.store(code_ptr[None, :] + offset_LR, code_LR.to(tl.uint8), mask=within_LR)
        tl.store(change_ptr[None, :] + offset_LR, change_LR, mask=within_LR)
        _spread(pull_ptr, hessian_ptr, change_LR, inside, start, stride, down, right, columns)
        tl.debug_barrier()
