"""The innermost parts of GPTQ and of descent for the CPU: 128 columns of a few rows that stay in cache.

What lives here: searching the grid of every group that starts in those columns and rounding them one by one, as
`gptq.py` and `grid.py` describe, or moving their codes, as `descent.py` does. Sums run in another order than in torch,
so codes agree with it up to rounding.

Letters: b columns of a block, t rows of a tile, R rows of all problems, S slots of 32 columns, g columns of a group,
T trials. A row never depends on another row, so tiles run on as many threads as torch has, with the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from compressor.cuda.scaled_half import Operand
from compressor.grid import REFITS, SHRINKS

SHRINKS_T = np.array(SHRINKS, np.float32)
LEAF = 32
TILE = 64
"""Rows that one thread holds at a time: 128 × 64 numbers are 32 KiB."""
ROUNDER = np.float32(1.5 * 2**23)
"""Added and taken away, it rounds a float32 below 2²² to the nearest whole number, ties to even."""
TINY = np.float32(1e-30)
SMALLEST = np.float32(torch.finfo(torch.bfloat16).tiny)

Floats = NDArray[np.float32]


def round_block(
    w_IR: Tensor,
    error_IR: Operand,
    code_IR: Tensor,
    scale_SR: Tensor,
    zero_SR: Tensor,
    factor_II: Tensor,
    maximum_P: Tensor,
    group_sizes: Sequence[int],
    start: int,
    end: int,
) -> None:
    """Round columns start to end, at most 128, in place, as `gptq._compiled` says."""
    block, slots = slice(start, end), slice(start // LEAF, None)
    rows = w_IR.shape[1] // len(group_sizes)
    arrays = (
        w_IR[block].numpy(),
        error_IR[block].values.numpy(),
        code_IR[block].numpy(),
        scale_SR[slots].numpy(),
        zero_SR[slots].numpy(),
        factor_II[block, block].contiguous().numpy(),
    )
    maximum = maximum_P.tolist()

    def round_tiles(tiles: Sequence[tuple[int, int, int]]) -> None:
        for problem, first, last in tiles:
            _round_tile(*arrays, np.float32(maximum[problem]), group_sizes[problem], first, last)

    _share(round_tiles, list(_tiles(len(group_sizes), rows)))


def move_codes(
    pull_bR: Tensor,
    change_bR: Tensor,
    code_bR: Tensor,
    scale_SR: Tensor,
    damped_bb: Tensor,
    maximum_P: Tensor,
) -> None:
    """Move the codes of one block in place; shapes and contents as for `descent.move_codes`."""
    rows = pull_bR.shape[1] // len(maximum_P)
    moved_bR = torch.empty_like(pull_bR)
    arrays = (
        pull_bR.numpy(),
        moved_bR.numpy(),
        code_bR.numpy(),
        scale_SR.numpy(),
        damped_bb.contiguous().numpy(),
    )
    maximum = maximum_P.tolist()

    def move_tiles(tiles: Sequence[tuple[int, int, int]]) -> None:
        for problem, first, last in tiles:
            _move_tile(*arrays, np.float32(maximum[problem]), first, last)

    _share(move_tiles, list(_tiles(len(maximum), rows)))
    pull_bR.addmm_(damped_bb, moved_bR, alpha=-1)
    change_bR += moved_bR


def _share(
    work: Callable[[Sequence[tuple[int, int, int]]], None], tiles: Sequence[tuple[int, int, int]]
) -> None:
    """Tiles dealt out to as many threads as torch has."""
    threads = min(torch.get_num_threads(), len(tiles))
    shares = [tiles[thread::threads] for thread in range(threads)]
    others = [_pool().submit(work, share) for share in shares[1:]]
    work(shares[0])
    for other in others:
        other.result()


def _tiles(problems: int, rows: int) -> Iterator[tuple[int, int, int]]:
    """Problem, first and last row of every tile; a tile has rows of one problem."""
    for problem in range(problems):
        for first in range(problem * rows, (problem + 1) * rows, TILE):
            yield problem, first, min(first + TILE, (problem + 1) * rows)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="gptq")


@njit(cache=True, nogil=True, error_model="numpy")
def _round_tile(
    w_bR: Floats,
    error_bR: Floats,
    code_bR: NDArray[np.uint8],
    scale_SR: Floats,
    zero_SR: Floats,
    factor_bb: Floats,
    maximum: np.float32,
    group_size: int,
    first: int,
    last: int,
) -> None:
    columns, count = w_bR.shape[0], last - first
    w_bt = np.zeros((columns, TILE), np.float32)
    w_bt[:, :count] = w_bR[:, first:last]
    scale_t, zero_t, error_t = (
        np.ones(TILE, np.float32),
        np.zeros(TILE, np.float32),
        np.empty(TILE, np.float32),
    )
    for column in range(columns):
        if column % group_size == 0:
            end = min(column + group_size, columns)
            _search(w_bt[column:end], np.diag(factor_bb)[column:end], maximum, scale_t, zero_t)
        if column % LEAF == 0:
            scale_SR[column // LEAF, first:last] = scale_t[:count]
            zero_SR[column // LEAF, first:last] = zero_t[:count]
        diagonal = factor_bb[column, column]
        for t in range(TILE):
            w = w_bt[column, t]
            code = (w / scale_t[t] + ROUNDER) - ROUNDER + zero_t[t]
            code = min(max(code, np.float32(0)), maximum)
            error_t[t] = (w - (code - zero_t[t]) * scale_t[t]) / diagonal
            w_bt[column, t] = code
        for later in range(column + 1, columns):
            spread = factor_bb[column, later]
            for t in range(TILE):
                w_bt[later, t] -= spread * error_t[t]
        error_bR[column, first:last] = error_t[:count]
    for column in range(columns):
        for t in range(count):
            code_bR[column, first + t] = np.uint8(w_bt[column, t])


@njit(cache=True, nogil=True, error_model="numpy")
def _move_tile(
    pull_bR: Floats,
    moved_bR: Floats,
    code_bR: NDArray[np.uint8],
    scale_SR: Floats,
    damped_bb: Floats,
    maximum: np.float32,
    first: int,
    last: int,
) -> None:
    columns, count = pull_bR.shape[0], last - first
    pull_bt, scale_t = np.zeros((columns, TILE), np.float32), np.ones(TILE, np.float32)
    before_t, moved_t = np.zeros(TILE, np.float32), np.zeros(TILE, np.float32)
    pull_bt[:, :count] = pull_bR[:, first:last]
    for column in range(columns):
        scale_t[:count] = scale_SR[column // LEAF, first:last]
        before_t[:count] = code_bR[column, first:last]
        diagonal = damped_bb[column, column]
        for t in range(TILE):
            wanted = before_t[t] + pull_bt[column, t] / diagonal / scale_t[t]
            code = min(max((wanted + ROUNDER) - ROUNDER, np.float32(0)), maximum)
            moved_t[t] = (code - before_t[t]) * scale_t[t]
            before_t[t] = code
        for later in range(column + 1, columns):
            spread = damped_bb[column, later]
            for t in range(TILE):
                pull_bt[later, t] -= spread * moved_t[t]
        moved_bR[column, first:last] = moved_t[:count]
        for t in range(count):
            code_bR[column, first + t] = np.uint8(before_t[t])


@njit(cache=True, nogil=True, error_model="numpy")
def _search(w_gt: Floats, diagonal_g: Floats, maximum: np.float32, scale_t: Floats, zero_t: Floats) -> None:
    """`grid.search_grid` of one tile, importance 1 / diagonal², into scale_t and zero_t."""
    low_t, span_t, best_t = np.zeros(TILE, np.float32), np.zeros(TILE, np.float32), np.empty(TILE, np.float32)
    trial_t, offset_t, loss_t = (
        np.empty(TILE, np.float32),
        np.empty(TILE, np.float32),
        np.empty(TILE, np.float32),
    )
    for g in range(len(w_gt)):
        for t in range(TILE):
            low_t[t] = min(low_t[t], w_gt[g, t])
            span_t[t] = max(span_t[t], w_gt[g, t])
    for t in range(TILE):
        span_t[t] = max(span_t[t] - low_t[t], TINY)
        scale_t[t] = span_t[t] / maximum
        best_t[t] = np.inf
    _to_bfloat16(scale_t)
    for t in range(TILE):
        zero_t[t] = min((-low_t[t] / scale_t[t] + ROUNDER) - ROUNDER, maximum)
    for shrink in SHRINKS_T:
        for t in range(TILE):
            trial_t[t] = span_t[t] * shrink / maximum
        _to_bfloat16(trial_t)
        for above in range(2):
            for t in range(TILE):
                offset = np.floor(-low_t[t] * shrink / trial_t[t]) + np.float32(above)
                offset_t[t] = min(max(offset, np.float32(0)), maximum)
            _losses(w_gt, diagonal_g, maximum, trial_t, offset_t, loss_t)
            for t in range(TILE):
                if loss_t[t] < best_t[t]:
                    best_t[t], scale_t[t], zero_t[t] = loss_t[t], trial_t[t], offset_t[t]
    for _ in range(REFITS):
        _refit(w_gt, diagonal_g, maximum, scale_t, zero_t, trial_t)
        _losses(w_gt, diagonal_g, maximum, trial_t, zero_t, loss_t)
        for t in range(TILE):
            if loss_t[t] < best_t[t]:
                best_t[t], scale_t[t] = loss_t[t], trial_t[t]


@njit(cache=True, nogil=True, error_model="numpy")
def _losses(
    w_gt: Floats, diagonal_g: Floats, maximum: np.float32, scale_t: Floats, zero_t: Floats, loss_t: Floats
) -> None:
    inverse_t = np.float32(1) / scale_t
    loss_t[:] = 0
    for g in range(len(w_gt)):
        importance = np.float32(1) / (diagonal_g[g] * diagonal_g[g])
        for t in range(TILE):
            level = (w_gt[g, t] * inverse_t[t] + ROUNDER) - ROUNDER
            level = min(max(level, -zero_t[t]), maximum - zero_t[t])
            error = level * scale_t[t] - w_gt[g, t]
            loss_t[t] += importance * (error * error)


@njit(cache=True, nogil=True, error_model="numpy")
def _refit(
    w_gt: Floats, diagonal_g: Floats, maximum: np.float32, scale_t: Floats, zero_t: Floats, trial_t: Floats
) -> None:
    """The scale of least weighted squares with the codes fixed, or the present one where there is none."""
    inverse_t = np.float32(1) / scale_t
    norm_t, product_t = np.zeros(TILE, np.float32), np.zeros(TILE, np.float32)
    for g in range(len(w_gt)):
        importance = np.float32(1) / (diagonal_g[g] * diagonal_g[g])
        for t in range(TILE):
            level = (w_gt[g, t] * inverse_t[t] + ROUNDER) - ROUNDER
            level = min(max(level, -zero_t[t]), maximum - zero_t[t])
            norm_t[t] += importance * level * level
            product_t[t] += importance * level * w_gt[g, t]
    for t in range(TILE):
        trial_t[t] = max(product_t[t] / max(norm_t[t], TINY), TINY)
    _to_bfloat16(trial_t)
    for t in range(TILE):
        if not (norm_t[t] > 0 and product_t[t] > 0):
            trial_t[t] = scale_t[t]


@njit(cache=True, nogil=True)
def _to_bfloat16(value_t: Floats) -> None:
    """Round positive numbers to the nearest of bfloat16, ties to even, but not below its smallest normal one."""
    bits_t = value_t.view(np.uint32)
    for t in range(TILE):
        odd = (bits_t[t] >> np.uint32(16)) & np.uint32(1)
        bits_t[t] = (bits_t[t] + np.uint32(0x7FFF) + odd) & np.uint32(0xFFFF0000)
    for t in range(TILE):
        value_t[t] = max(value_t[t], SMALLEST)
