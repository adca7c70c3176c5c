"""GPTQ of a block of 128 columns in one Triton kernel: grids searched, columns rounded, errors spread inside the block.

What lives here: the kernel and its launch. The products that spread a block's errors over the columns to come, and
everything that holds on any device, are in `gptq.py`; the search repeats `grid.search_grid` step by step.

Letters: P problems, O rows of each, R = P·O, I columns, C columns of the block, S = I / 32 slots. A row never depends
on another row, so a warp takes 32 rows, one to a lane, through the whole block without a barrier. The errors of 32
columns stay in registers; the weights of the block stay in the cache between steps.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    spread_CC = factor_CC.T.contiguous()
    shrink_T = torch.tensor(SHRINKS, device=w_CR.device).repeat_interleave(2)
    for group_size in sorted(set(group_sizes)):
        members = [p for p, size in enumerate(group_sizes) if size == group_size]
        _round_block[(triton.cdiv(rows, 32), len(members))](
            w_CR,
            error_CR,
            code_CR,
            scale_SR,
            zero_SR,
            spread_CC,
            maximum_P,
            torch.tensor(members, dtype=torch.int32, device=w_CR.device),
            shrink_T,
            rows,
            w_CR.shape[1],
            columns,
            group_size,
            num_warps=1,
        )


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
def _fit(w_ptr, spread_ptr, inside, stride, columns: tl.constexpr, first, last, scale, zero, maximum):
    """Loss of a grid on one group, and the sums that refit its scale: Σ m·level², Σ m·level·w."""
    inverse = tl.div_rn(1.0, scale)
    loss = tl.zeros_like(scale)
    norm = tl.zeros_like(scale)
    match = tl.zeros_like(scale)
    for column in range(first, last):
        w = tl.load(w_ptr + column * stride, mask=inside, other=0.0)
        diagonal = tl.load(spread_ptr + column * columns + column)
        importance = tl.div_rn(1.0, diagonal * diagonal)
        level = tl.minimum(tl.maximum(_nearest(w * inverse), -zero), maximum - zero)
        weighted = level * importance
        norm += weighted * level
        match += weighted * w
        error = level * scale - w
        loss += importance * (error * error)
    return loss, norm, match


@triton.jit
def _search(w_ptr, spread_ptr, shrink_ptr, inside, stride, columns: tl.constexpr, first, last, maximum):
    """scale and zero of one group for 32 rows: `grid.search_grid`, all trials side by side."""
    low = tl.zeros_like(maximum)
    high = tl.zeros_like(maximum)
    for column in range(first, last):
        w = tl.load(w_ptr + column * stride, mask=inside, other=0.0)
        low = tl.minimum(low, w)
        high = tl.maximum(high, w)
    span = tl.maximum(high - low, _TINY)

    trial = tl.arange(0, _TRIALS)
    shrink_T1 = tl.load(shrink_ptr + trial)[:, None]
    maximum_1R = maximum[None, :]
    scale_TR = _storable(tl.div_rn(span[None, :] * shrink_T1, tl.broadcast_to(maximum_1R, (_TRIALS, 32))))
    real_TR = tl.div_rn(-low[None, :] * shrink_T1, scale_TR)
    zero_TR = tl.floor(real_TR) + (trial % 2).to(tl.float32)[:, None]
    zero_TR = tl.minimum(tl.maximum(zero_TR, 0.0), maximum_1R)
    inverse_TR = tl.div_rn(1.0, scale_TR)
    loss_TR = tl.zeros_like(scale_TR)
    for column in range(first, last):
        w = tl.load(w_ptr + column * stride, mask=inside, other=0.0)[None, :]
        diagonal = tl.load(spread_ptr + column * columns + column)
        importance = tl.div_rn(1.0, diagonal * diagonal)
        level_TR = tl.minimum(tl.maximum(_nearest(w * inverse_TR), -zero_TR), maximum_1R - zero_TR)
        error_TR = level_TR * scale_TR - w
        loss_TR += importance * (error_TR * error_TR)
    least = tl.argmin(loss_TR, axis=0)
    chosen_TR = trial[:, None] == least[None, :]
    scale = tl.sum(tl.where(chosen_TR, scale_TR, 0.0), axis=0)
    zero = tl.sum(tl.where(chosen_TR, zero_TR, 0.0), axis=0)

    best, norm, match = _fit(w_ptr, spread_ptr, inside, stride, columns, first, last, scale, zero, maximum)
    for _ in range(_REFITS):
        refit = tl.div_rn(match, tl.maximum(norm, _TINY))
        trial_scale = tl.where((norm > 0) & (refit > 0), _storable(tl.maximum(refit, _TINY)), scale)
        loss, trial_norm, trial_match = _fit(
            w_ptr, spread_ptr, inside, stride, columns, first, last, trial_scale, zero, maximum
        )
        better = loss < best
        best = tl.where(better, loss, best)
        scale = tl.where(better, trial_scale, scale)
        norm = tl.where(better, trial_norm, norm)
        match = tl.where(better, trial_match, match)
    return scale, zero


@triton.jit
def _round_block(
    w_ptr,
    error_ptr,
    code_ptr,
    scale_ptr,
    zero_ptr,
    spread_ptr,
    maximum_ptr,
    member_ptr,
    shrink_ptr,
    rows,
    stride: tl.int64,
    columns: tl.constexpr,
    group_size: tl.constexpr,
):
    """`spread` is the transposed factor: spread[c, j] is what column j's error takes from column c."""
    problem = tl.load(member_ptr + tl.program_id(1))
    row = tl.program_id(0) * 32 + tl.arange(0, 32)
    inside = row < rows
    place = (problem * rows + row).to(tl.int64)
    w_ptr, error_ptr, code_ptr = w_ptr + place, error_ptr + place, code_ptr + place
    maximum = tl.load(maximum_ptr + problem) + tl.zeros_like(row).to(tl.float32)
    leaf = tl.arange(0, _LEAF)

    scale = tl.full((32,), 1.0, tl.float32)
    zero = tl.zeros((32,), tl.float32)
    for start in range(0, columns, _LEAF):
        end = min(start + _LEAF, columns)
        if start % group_size == 0:
            last = min(start + group_size, columns)
            scale, zero = _search(
                w_ptr, spread_ptr, shrink_ptr, inside, stride, columns, start, last, maximum
            )
            slot = start // _LEAF * stride + place
            tl.store(scale_ptr + slot, scale, mask=inside)
            tl.store(zero_ptr + slot, zero, mask=inside)
        error_LR = tl.zeros((_LEAF, 32), tl.float32)
        for column in range(start, end):
            offset = column * stride
            spread_L = tl.load(
                spread_ptr + column * columns + start + leaf, mask=start + leaf < column, other=0.0
            )
            w = tl.load(w_ptr + offset, mask=inside, other=0.0) - tl.sum(error_LR * spread_L[:, None], axis=0)
            code = tl.minimum(tl.maximum(_nearest(tl.div_rn(w, scale)) + zero, 0.0), maximum)
            diagonal = tl.load(spread_ptr + column * columns + column)
            error = tl.div_rn(w - (code - zero) * scale, tl.zeros_like(w) + diagonal)
            error_LR = tl.where((start + leaf == column)[:, None], error[None, :], error_LR)
            tl.store(code_ptr + offset, code.to(tl.uint8), mask=inside)
            tl.store(error_ptr + offset, error, mask=inside)
        for column in range(end, columns):
            offset = column * stride
            spread_L = tl.load(spread_ptr + column * columns + start + leaf)
            w = tl.load(w_ptr + offset, mask=inside, other=0.0)
            tl.store(w_ptr + offset, w - tl.sum(error_LR * spread_L[:, None], axis=0), mask=inside)
        tl.debug_barrier()
