"""Coordinate descent: after GPTQ, every code and scale moved to where the others, as they now stand, would have it.

What lives here: the passes over the columns. The compiled innermost parts, which move codes, are in `gptq_numba.py` for
a CPU and in `gptq_cuda.py` for CUDA; grids and first codes come from `gptq.py`.

GPTQ rounds a column trusting that later columns will make its error good; when the last is rounded, earlier ones would
often choose otherwise. With H damped as for GPTQ, E = W − Q and G = E H, the best value of column i, all else fixed,
is q_i + g_i / h_ii, and rounding it to the grid can only lower tr(E H Eᵀ), row by row (Behdin et al., QuantEase, arXiv
2309.01885). So it is with the scale of a group whose levels, code − zero, are l: the best adds (g l) / (lᵀ H l) to it.
Zero points stay, and so do the bytes.

A pass visits the columns a block at a time and moves codes, scales and codes again before it goes on: what a block
gains by settling is paid for once, when its change is spread over G. Two passes of that leave what three do that move
codes once.

Letters as in `gptq.py`: P problems, O rows, I columns, R = P·O, S slots of 32 columns, C columns of a block, g of a
group. A change is spread over G in halves, as GPTQ spreads its errors: over later columns within a pass, and over
earlier ones for the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import groupby

import torch
from torch import Tensor

from allocator.storage import ceil_div
from compressor.cuda.residual import put_residual
from compressor.cuda.scaled_half import ROOM, Operand, largest_of, product, subtract_product
from compressor.grid import Quantized
from compressor.quantize.gptq import FUSED, LEAF, damped_diagonal, in_halves, maximum_codes

PASSES = 2
TINY = 1e-30


def descended(
    weights: Sequence[Tensor] | Tensor,
    quantized: Sequence[Quantized],
    hessian_II: Tensor,
    passes: int = PASSES,
    largest: float | None = None,
) -> list[Quantized]:
    """Better codes and scales: no row's error under the damped H grows.

    P weights (O, I) and H (I, I) float32; every quantized matrix (O, I), in groups of 32, 64 or 128. No weight is much
    above `largest` in magnitude; it need not be given.
    """
    problems, rows = len(weights), len(weights[0])
    if largest is None:
        largest = largest_of(*weights) if hessian_II.is_cuda else 0.0
    order = sorted(range(problems), key=lambda p: quantized[p].group_size)
    state = _State.of([weights[p] for p in order], [quantized[p] for p in order], hessian_II, largest)
    for later in range(passes):
        _pass_over(state, later + 1 < passes)
    codes = state.code_IR.split(rows, dim=1)
    scale_PSO = state.scale_SR.view(-1, problems, rows).transpose(0, 1)
    better = {
        p: replace(
            quantized[p],
            code_OI=code_IO.T,
            scale_OG=scale_SO[:: quantized[p].group_size // LEAF].T.bfloat16(),
        )
        for p, code_IO, scale_SO in zip(order, codes, scale_PSO, strict=True)
    }
    return [better[p] for p in range(problems)]


@dataclass(frozen=True, slots=True)
class _State:
    """Pull G, what a pass changed of Q, the codes, and of each 32 columns the scales and zeros."""

    pull_IR: Tensor
    change_IR: Operand
    code_IR: Tensor
    scale_SR: Tensor
    zero_SR: Tensor
    group_sizes: tuple[int, ...]
    hessian_II: Operand
    damped_II: Tensor
    maximum_P: Tensor

    @classmethod
    def of(
        cls, weights: Sequence[Tensor], quantized: Sequence[Quantized], hessian_II: Tensor, largest: float
    ) -> _State:
        rows, columns = weights[0].shape
        change_IR = Operand.empty(columns, rows * len(weights), hessian_II.device, largest * ROOM)
        for p, (w_OI, q) in enumerate(zip(weights, quantized, strict=True)):
            put_residual(change_IR[:, p * rows : (p + 1) * rows], w_OI, q)
        slots = ceil_div(columns, LEAF)
        damped_II = hessian_II.clone()
        damped_II.diagonal().copy_(damped_diagonal(hessian_II))
        operand_II = Operand.of(damped_II)
        return cls(
            product(operand_II, change_IR),
            change_IR,
            torch.cat([q.code_OI.T for q in quantized], dim=1),
            torch.cat([_by_slot(q.scale_OG, q.group_size, slots) for q in quantized], dim=1),
            torch.cat([_by_slot(q.zero_OG, q.group_size, slots) for q in quantized], dim=1),
            tuple(q.group_size for q in quantized),
            operand_II,
            damped_II,
            maximum_codes(tuple(q.bits for q in quantized), hessian_II.device),
        )

    def spread(self, onto: slice, source: slice) -> None:
        """What changed in the columns `source`, taken off G of others."""
        subtract_product(self.pull_IR[onto], self.hessian_II[onto, source], self.change_IR[source])


def _by_slot(value_OG: Tensor, group_size: int, slots: int) -> Tensor:
    """(S, O): scales or zeros, float32, repeated for every 32 columns."""
    return value_OG.T.float().repeat_interleave(group_size // LEAF, dim=0)[:slots]


def _runs(group_sizes: Sequence[int], rows: int) -> Iterator[tuple[int, slice]]:
    first = 0
    for group_size, members in groupby(group_sizes):
        last = first + rows * len(list(members))
        yield group_size, slice(first, last)
        first = last


def _pass_over(state: _State, again: bool) -> None:
    """Settle a block at a time; G is as it should be for another pass if there is one."""

    def spread(start: int, middle: int, end: int) -> None:
        state.spread(slice(middle, end), slice(start, middle))

    def spread_back(start: int, middle: int, end: int) -> None:
        state.spread(slice(start, middle), slice(middle, end))

    in_halves(_settler(state), spread, FUSED, 0, len(state.pull_IR), spread_back if again else None)


def _settler(state: _State) -> Callable[[int, int], None]:
    """What settles the block between two columns: one kernel on CUDA, elsewhere its parts, compiled where numba is."""
    device = state.pull_IR.device.type
    if device == "cuda":
        from compressor.cuda.gptq_cuda import block_kernel

        parts = state.pull_IR, state.change_IR, state.code_IR, state.scale_SR, state.zero_SR
        found = block_kernel("settle", *parts, state.damped_II, state.maximum_P, state.group_sizes)
        if found is not None:
            return found
    if device == "cpu" and find_spec("numba"):
        from compressor.quantize.gptq_numba import move_codes as compiled

        return partial(settle, compiled, state)
    return partial(settle, move_codes, state)


def settle(move_codes: Callable[..., None], state: _State, start: int, end: int) -> None:
    """Codes, scales and codes of one block in place; G is kept up to date within it, and change is what Q gained."""
    block, slots = slice(start, end), slice(start // LEAF, ceil_div(end, LEAF))
    pull_CR, damped_CC = state.pull_IR[block], state.damped_II[block, block]
    moved_CR = torch.zeros_like(pull_CR)
    moving = pull_CR, moved_CR, state.code_IR[block], state.scale_SR[slots]
    move_codes(*moving, damped_CC, state.maximum_P)
    for group_size, rows in _runs(state.group_sizes, pull_CR.shape[1] // len(state.group_sizes)):
        pull, moved, code, scale, zero = (part[:, rows] for part in (*moving, state.zero_SR[slots]))
        move_scales(pull, moved, code, scale, zero, damped_CC, group_size)
    move_codes(*moving, damped_CC, state.maximum_P)
    state.change_IR[block].put(moved_CR)


def move_codes(
    pull_CR: Tensor,
    change_CR: Tensor,
    code_CR: Tensor,
    scale_SR: Tensor,
    damped_CC: Tensor,
    maximum_P: Tensor,
) -> None:
    """Move the codes of a block in place, column by column, on any device; all float32 but the codes, uint8.

    pull is G for the block and is kept up to date, what is added to Q is added to change, scale is that of each 32
    columns, damped (C, C) the block's part of the damped H, maximum 2^bits − 1.
    """
    maximum_R = maximum_P.repeat_interleave(code_CR.shape[1] // len(maximum_P))
    for column, diagonal in enumerate(damped_CC.diagonal().tolist()):
        before_R, scale_R = code_CR[column].float(), scale_SR[column // LEAF]
        wanted_R = before_R + (pull_CR[column] / diagonal / scale_R)
        code_R = torch.minimum(wanted_R.round_().clamp_(min=0), maximum_R)
        moved_R = (code_R - before_R) * scale_R
        change_CR[column] += moved_R
        code_CR[column] = code_R
        pull_CR.addr_(damped_CC[column], moved_R, alpha=-1)


def move_scales(
    pull_CR: Tensor,
    change_CR: Tensor,
    code_CR: Tensor,
    scale_SR: Tensor,
    zero_SR: Tensor,
    damped_CC: Tensor,
    group_size: int,
) -> None:
    """Move the scales of a block's groups where that lowers the error of the row; otherwise as `move_codes`.

    One group of a row after the other: with levels l, a scale that grows by δ gains δ (2 g·l − δ lᵀHl).
    """
    for first in range(0, len(pull_CR), group_size):
        group = slice(first, first + group_size)
        slots = slice(first // LEAF, ceil_div(min(group.stop, len(pull_CR)), LEAF))
        scale_R = scale_SR[slots.start]
        level_gR = code_CR[group] - zero_SR[slots.start]
        onto_CR = damped_CC[:, group] @ level_gR
        slope_R = (pull_CR[group] * level_gR).sum(dim=0)
        step_R = _best_step(scale_R, slope_R, (onto_CR[group] * level_gR).sum(dim=0))
        pull_CR.addcmul_(onto_CR, step_R, value=-1)
        change_CR[group].addcmul_(level_gR, step_R)
        scale_SR[slots] = scale_R + step_R


def _best_step(scale_R: Tensor, slope_R: Tensor, curve_R: Tensor) -> Tensor:
    """δ to the bfloat16 number nearest to the best scale; 0 where that gains nothing or leaves no positive scale."""
    wanted_R = scale_R + slope_R / curve_R.clamp(min=TINY)
    step_R = wanted_R.bfloat16().float() - scale_R
    better_R = (step_R * (2 * slope_R - step_R * curve_R) > 0) & (wanted_R > TINY)
    return torch.where(better_R, step_R, 0.0)
