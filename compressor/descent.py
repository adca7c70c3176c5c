"""Coordinate descent: after GPTQ, every code and scale moved to where the others, as they now stand, would have it.

What lives here: the passes over the columns. The compiled innermost parts of those that move codes are in
`gptq_numba.py` for a CPU and in `gptq_triton.py` for CUDA; grids and first codes come from `gptq.py`.

GPTQ rounds a column trusting that later columns will make its error good; when the last is rounded, earlier ones would
often choose otherwise. With H damped as for GPTQ, E = W − Q and G = E H, the best value of column i, all else fixed,
is q_i + g_i / h_ii, and rounding it to the grid can only lower tr(E H Eᵀ), row by row (Behdin et al., QuantEase, arXiv
2309.01885). So it is with the scale of a group whose levels, code − zero, are l: the best adds (g l) / (lᵀ H l) to it.
Zero points stay, and so do the bytes.

Letters as in `gptq.py`: P problems, O rows, I columns, R = P·O, S slots of 32 columns, C columns of a block. G is taken
anew for every pass; within a pass a change is spread over later columns only, in halves, as GPTQ spreads its errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
import torch.nn.functional as F
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
    """Better codes and scales: no row's error under the damped H grows.

    w (P, O, I) and H (I, I) float32; every quantized matrix (O, I), in groups of 32, 64 or 128.
    """
    problems, rows, columns = w_POI.shape
    state = _State.of(w_POI, quantized, hessian_II)
    for later in range(passes):
        if later:
            _rescale(state)
        _descend(state)
    code_POI = state.code_IR.T.reshape(problems, rows, columns)
    scale_PSO = state.scale_SR.view(-1, problems, rows).transpose(0, 1)
    return [
        replace(q, code_OI=code_OI, scale_OG=scale_SO[:: q.group_size // LEAF].T.bfloat16().contiguous())
        for q, code_OI, scale_SO in zip(quantized, code_POI, scale_PSO, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class _State:
    """error E, pull G, what a pass changed of Q, the codes, and of each 32 columns the scales and zeros.

    span is the number of slots in a group; damping is diag H's."""

    error_IR: Tensor
    pull_IR: Tensor
    change_IR: Tensor
    code_IR: Tensor
    scale_SR: Tensor
    zero_SR: Tensor
    span_R: Tensor
    hessian_II: Tensor
    diagonal_I: Tensor
    damping_I: Tensor
    maximum_P: Tensor

    @classmethod
    def of(cls, w_POI: Tensor, quantized: Sequence[Quantized], hessian_II: Tensor) -> _State:
        error_IR = torch.cat(
            [(w_OI - q.dequantize()).T for w_OI, q in zip(w_POI, quantized, strict=True)], dim=1
        )
        slots = ceil_div(len(error_IR), LEAF)
        diagonal_I = damped_diagonal(hessian_II)
        return cls(
            error_IR,
            torch.empty_like(error_IR),
            torch.empty_like(error_IR),
            torch.cat([q.code_OI.T for q in quantized], dim=1),
            torch.cat([_by_slot(q.scale_OG, q.group_size, slots) for q in quantized], dim=1),
            torch.cat([_by_slot(q.zero_OG, q.group_size, slots) for q in quantized], dim=1),
            torch.tensor([q.group_size // LEAF for q in quantized], device=error_IR.device).repeat_interleave(
                w_POI.shape[1]
            ),
            hessian_II,
            diagonal_I.float(),
            (diagonal_I - hessian_II.diagonal()).float(),
            maximum_codes(tuple(q.bits for q in quantized), error_IR.device),
        )


def _by_slot(value_OG: Tensor, group_size: int, slots: int) -> Tensor:
    """(S, O): scales or zeros, float32, repeated for every 32 columns."""
    return value_OG.T.float().repeat_interleave(group_size // LEAF, dim=0)[:slots]


def _descend(state: _State) -> None:
    """One pass over all codes."""
    descend_block = _kernel(state.error_IR.device.type)

    def visit(start: int, end: int) -> None:
        block, slots = slice(start, end), slice(start // LEAF, ceil_div(end, LEAF))
        descend_block(
            state.pull_IR[block],
            state.change_IR[block],
            state.code_IR[block],
            state.scale_SR[slots],
            state.hessian_II[block, block],
            state.diagonal_I[block],
            state.maximum_P,
        )

    _pass_over(state, visit)


def _rescale(state: _State) -> None:
    """One pass over all scales."""
    _pass_over(state, lambda start, end: _rescale_block(state, start, end))


def _pass_over(state: _State, visit: Callable[[int, int], None]) -> None:
    """Visit all columns, a block at a time, with G as it stands there; a visit says what it changed of Q."""

    def spread(start: int, middle: int, end: int) -> None:
        with tensor_cores():
            state.pull_IR[middle:end].addmm_(
                state.hessian_II[middle:end, start:middle], state.change_IR[start:middle], alpha=-1
            )

    with tensor_cores():
        torch.mm(state.hessian_II, state.error_IR, out=state.pull_IR)
    state.pull_IR.addcmul_(state.error_IR, state.damping_I[:, None])
    in_halves(visit, spread, FUSED, 0, len(state.error_IR))
    state.error_IR.sub_(state.change_IR)


def _rescale_block(state: _State, start: int, end: int) -> None:
    """Move the scales of a block's groups where that lowers the error of the row."""
    block, slots = slice(start, end), slice(start // LEAF, ceil_div(end, LEAF))
    hessian_CC = state.hessian_II[block, block] + torch.diag(state.damping_I[block])
    level_CR = state.code_IR[block] - _by_column(state.zero_SR[slots], end - start)
    pull_SR = _slot_sums(state.pull_IR[block] * level_CR)
    scale_SR = rescaled(state.scale_SR[slots], pull_SR, _crossed(level_CR, hessian_CC), state.span_R)
    grown_CR = _by_column(scale_SR - state.scale_SR[slots], end - start)
    torch.mul(level_CR, grown_CR, out=state.change_IR[block])
    state.scale_SR[slots] = scale_SR


def _crossed(level_CR: Tensor, hessian_CC: Tensor) -> Tensor:
    """m (S, S, R): l_sᵀ H l_t, l_s the levels in slot s."""
    slots = ceil_div(len(level_CR), LEAF)
    cross_SSR = level_CR.new_empty(slots, slots, level_CR.shape[1])
    for slot in range(slots):
        columns, later = slice(LEAF * slot, LEAF * (slot + 1)), slice(LEAF * slot, None)
        onto_SR = _slot_sums((hessian_CC[later, columns] @ level_CR[columns]).mul_(level_CR[later]))
        cross_SSR[slot, slot:] = cross_SSR[slot:, slot] = onto_SR
    return cross_SSR


def rescaled(scale_SR: Tensor, pull_SR: Tensor, cross_SSR: Tensor, span_R: Tensor) -> Tensor:
    """Better scales of groups of `span` slots, one group of a row after the other, all that begin at a slot at once.

    pull: g_s = G · l_s, cross: m_st = l_sᵀ H l_t. A scale that grows by δ gains δ (2 g − δ m), sums over its slots.
    """
    scale_SR, pull_SR = scale_SR.clone(), pull_SR.clone()
    place_S1 = torch.arange(len(scale_SR), device=scale_SR.device)[:, None]
    for first in range(len(scale_SR)):
        begins_R = first % span_R == 0
        weight_SR = ((place_S1 // span_R == first // span_R) & begins_R).float()
        onto_SR = torch.einsum("sr,str->tr", weight_SR, cross_SSR)
        curve_R, slope_R = (onto_SR * weight_SR).sum(dim=0), (pull_SR * weight_SR).sum(dim=0)
        wanted_R = scale_SR[first] + slope_R / curve_R.clamp(min=TINY)
        step_R = wanted_R.bfloat16().float() - scale_SR[first]
        better_R = (step_R * (2 * slope_R - step_R * curve_R) > 0) & (wanted_R > TINY)
        step_R = torch.where(better_R, step_R, 0.0)
        scale_SR += step_R * weight_SR
        pull_SR -= step_R * onto_SR
    return scale_SR


def _by_column(value_SR: Tensor, columns: int) -> Tensor:
    return value_SR.repeat_interleave(LEAF, dim=0)[:columns]


def _slot_sums(value_CR: Tensor) -> Tensor:
    """(S, R)."""
    return F.pad(value_CR, (0, 0, 0, -len(value_CR) % LEAF)).view(-1, LEAF, value_CR.shape[1]).sum(dim=1)


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
