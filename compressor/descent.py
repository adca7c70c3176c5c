"""Coordinate descent: after GPTQ, every code and scale moved to where the others, as they now stand, would have it.

What lives here: the passes over the columns. The compiled innermost parts, which move codes, are in `gptq_numba.py` for
a CPU and in `gptq_triton.py` for CUDA; grids and first codes come from `gptq.py`.

GPTQ rounds a column trusting that later columns will make its error good; when the last is rounded, earlier ones would
often choose otherwise. With H damped as for GPTQ, E = W − Q and G = E H, the best value of column i, all else fixed,
is q_i + g_i / h_ii, and rounding it to the grid can only lower tr(E H Eᵀ), row by row (Behdin et al., QuantEase, arXiv
2309.01885). So it is with the scale of a group whose levels, code − zero, are l: the best adds (g l) / (lᵀ H l) to it.
Zero points stay, and so do the bytes.

Letters as in `gptq.py`: P problems, O rows, I columns, R = P·O, S slots of 32 columns, C columns of a block, g of a
group. A change is spread over G in halves, as GPTQ spreads its errors: over later columns within a pass, and over
earlier ones for the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import groupby

import torch
from torch import Tensor

from allocator.storage import ceil_div
from compressor.gptq import FUSED, LEAF, damped_diagonal, in_halves, maximum_codes
from compressor.grid import Quantized
from compressor.precision import tensor_cores

PASSES = 3
TINY = 1e-30


def descended(
    w_POI: Tensor, quantized: Sequence[Quantized], hessian_II: Tensor, passes: int = PASSES
) -> list[Quantized]:
    """Better codes and, from the second pass on, scales: no row's error under the damped H grows.

    w (P, O, I) and H (I, I) float32; every quantized matrix (O, I), in groups of 32, 64 or 128.
    """
    problems, rows, columns = w_POI.shape
    order = sorted(range(problems), key=lambda p: quantized[p].group_size)
    state = _State.of([w_POI[p] for p in order], [quantized[p] for p in order], hessian_II)
    for later in range(passes):
        _pass_over(state, later > 0, later + 1 < passes)
    code_POI = state.code_IR.T.reshape(problems, rows, columns)
    scale_PSO = state.scale_SR.view(-1, problems, rows).transpose(0, 1)
    better = {
        p: replace(
            quantized[p],
            code_OI=code_OI,
            scale_OG=scale_SO[:: quantized[p].group_size // LEAF].T.bfloat16().contiguous(),
        )
        for p, code_OI, scale_SO in zip(order, code_POI, scale_PSO, strict=True)
    }
    return [better[p] for p in range(problems)]


@dataclass(frozen=True, slots=True)
class _State:
    """Pull G, what a pass changed of Q, the codes, and of each 32 columns the scales and zeros.

    runs: the group sizes, ascending, and the rows that have them."""

    pull_IR: Tensor
    change_IR: Tensor
    code_IR: Tensor
    scale_SR: Tensor
    zero_SR: Tensor
    runs: tuple[tuple[int, slice], ...]
    hessian_II: Tensor
    diagonal_I: Tensor
    damping_I: Tensor
    maximum_P: Tensor

    @classmethod
    def of(cls, weights: Sequence[Tensor], quantized: Sequence[Quantized], hessian_II: Tensor) -> _State:
        pairs = zip(weights, quantized, strict=True)
        error_IR = torch.cat([(w_OI - q.dequantize()).T for w_OI, q in pairs], dim=1)
        slots = ceil_div(len(error_IR), LEAF)
        diagonal_I = damped_diagonal(hessian_II)
        damping_I = (diagonal_I - hessian_II.diagonal()).float()
        with tensor_cores():
            pull_IR = hessian_II @ error_IR
        pull_IR.addcmul_(error_IR, damping_I[:, None])
        return cls(
            pull_IR,
            error_IR,
            torch.cat([q.code_OI.T for q in quantized], dim=1),
            torch.cat([_by_slot(q.scale_OG, q.group_size, slots) for q in quantized], dim=1),
            torch.cat([_by_slot(q.zero_OG, q.group_size, slots) for q in quantized], dim=1),
            tuple(_runs([q.group_size for q in quantized], len(weights[0]))),
            hessian_II,
            diagonal_I.float(),
            damping_I,
            maximum_codes(tuple(q.bits for q in quantized), error_IR.device),
        )

    def spread(self, onto: slice, source: slice) -> None:
        """What changed in the columns `source`, taken off G of others."""
        with tensor_cores():
            self.pull_IR[onto].addmm_(self.hessian_II[onto, source], self.change_IR[source], alpha=-1)


def _by_slot(value_OG: Tensor, group_size: int, slots: int) -> Tensor:
    """(S, O): scales or zeros, float32, repeated for every 32 columns."""
    return value_OG.T.float().repeat_interleave(group_size // LEAF, dim=0)[:slots]


def _runs(group_sizes: Sequence[int], rows: int) -> Iterator[tuple[int, slice]]:
    first = 0
    for group_size, members in groupby(group_sizes):
        last = first + rows * len(list(members))
        yield group_size, slice(first, last)
        first = last


def _pass_over(state: _State, scales: bool, again: bool) -> None:
    """Move codes, and scales before them, a block at a time; G is as it should be for another pass if there is one."""
    descend_block = _kernel(state.pull_IR.device.type)

    def visit(start: int, end: int) -> None:
        block, slots = slice(start, end), slice(start // LEAF, ceil_div(end, LEAF))
        hessian_CC = state.hessian_II[block, block]
        damped_CC = hessian_CC + torch.diag(state.damping_I[block])
        grown_CR = _rescale(state, start, end, damped_CC) if scales else None
        pull_CR = state.pull_IR[block]
        descend_block(
            pull_CR.clone() if again else pull_CR,
            state.change_IR[block],
            state.code_IR[block],
            state.scale_SR[slots],
            hessian_CC,
            state.diagonal_I[block],
            state.maximum_P,
        )
        if again:
            with tensor_cores():
                pull_CR.addmm_(damped_CC, state.change_IR[block], alpha=-1)
        if grown_CR is not None:
            state.change_IR[block] += grown_CR

    def spread(start: int, middle: int, end: int) -> None:
        state.spread(slice(middle, end), slice(start, middle))

    def spread_back(start: int, middle: int, end: int) -> None:
        state.spread(slice(start, middle), slice(middle, end))

    in_halves(visit, spread, FUSED, 0, len(state.pull_IR), spread_back if again else None)


def _rescale(state: _State, start: int, end: int, damped_CC: Tensor) -> Tensor:
    """Move the scales of a block's groups where that lowers the error of the row; what that adds to Q, (C, R).

    One group of a row after the other: with levels l, a scale that grows by δ gains δ (2 g·l − δ lᵀHl).
    """
    grown_CR = torch.empty_like(state.pull_IR[start:end])
    for group_size, rows in state.runs:
        pull_CR = state.pull_IR[start:end, rows]
        for first in range(start, end, group_size):
            group, inside = (
                slice(first, min(first + group_size, end)),
                slice(first - start, first - start + group_size),
            )
            slots = slice(first // LEAF, ceil_div(group.stop, LEAF))
            scale_R = state.scale_SR[slots.start, rows]
            level_gR = state.code_IR[group, rows] - state.zero_SR[slots.start, rows]
            with tensor_cores():
                onto_CR = damped_CC[:, inside] @ level_gR
            step_R = _best_step(
                scale_R, (pull_CR[inside] * level_gR).sum(dim=0), (onto_CR[inside] * level_gR).sum(dim=0)
            )
            pull_CR.addcmul_(onto_CR, step_R, value=-1)
            torch.mul(level_gR, step_R, out=grown_CR[inside, rows])
            state.scale_SR[slots, rows] = scale_R + step_R
    return grown_CR


def _best_step(scale_R: Tensor, slope_R: Tensor, curve_R: Tensor) -> Tensor:
    """δ to the bfloat16 number nearest to the best scale; 0 where that gains nothing or leaves no positive scale."""
    wanted_R = scale_R + slope_R / curve_R.clamp(min=TINY)
    step_R = wanted_R.bfloat16().float() - scale_R
    better_R = (step_R * (2 * slope_R - step_R * curve_R) > 0) & (wanted_R > TINY)
    return torch.where(better_R, step_R, 0.0)


def _kernel(device: str) -> Callable[..., None]:
    if device == "cpu" and find_spec("numba"):
        from compressor.gptq_numba import descend_block
    elif device == "cuda" and find_spec("triton"):
        from compressor.gptq_triton import descend_block
    else:
        descend_block = descend_by_column
    return descend_block


def descend_by_column(
    pull_CR: Tensor,
    change_CR: Tensor,
    code_CR: Tensor,
    scale_SR: Tensor,
    hessian_CC: Tensor,
    diagonal_C: Tensor,
    maximum_P: Tensor,
) -> None:
    """Move the codes of a block in place, column by column, on any device; all float32 but the codes, uint8.

    pull is G for the block and is used up, change receives what is added to Q, scale is that of each 32 columns,
    hessian (C, C) the block's part of H, diagonal that of the damped H, maximum 2^bits − 1.
    """
    maximum_R = maximum_P.repeat_interleave(code_CR.shape[1] // len(maximum_P))
    for column, diagonal in enumerate(diagonal_C.tolist()):
        before_R, scale_R = code_CR[column].float(), scale_SR[column // LEAF]
        wanted_R = before_R + (pull_CR[column] / diagonal / scale_R)
        code_R = torch.minimum(wanted_R.round_().clamp_(min=0), maximum_R)
        change_CR[column] = (code_R - before_R) * scale_R
        code_CR[column] = code_R
        pull_CR[column + 1 :].addr_(hessian_CC[column, column + 1 :], change_CR[column], alpha=-1)
