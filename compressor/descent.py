"""Coordinate descent on codes: after GPTQ, every code moved to where the others, as they now stand, would have it.

What lives here: the passes over the columns. Their compiled innermost parts are in `gptq_numba.py` for a CPU and in
`gptq_triton.py` for CUDA; grids and first codes come from `gptq.py`.

GPTQ rounds a column trusting that later columns will make its error good; when the last is rounded, earlier ones would
often choose otherwise. With H damped as for GPTQ, E = W − Q and G = E H, the best value of column i, all else fixed,
is q_i + g_i / h_ii, and rounding it to the grid can only lower tr(E H Eᵀ), row by row (Behdin et al., QuantEase, arXiv
2309.01885). Grids stay, and so do the bytes.

Letters as in `gptq.py`: P problems, O rows, I columns, R = P·O, S slots of 32 columns, C columns of a block. G is taken
anew for every pass; within a pass a change is spread over later columns only, in halves, as GPTQ spreads its errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import Tensor

from allocator.storage import ceil_div
from compressor.gptq import FUSED, LEAF, damped_diagonal, in_halves, maximum_codes
from compressor.grid import Quantized
from compressor.precision import tensor_cores

PASSES = 2


def descended(
    w_POI: Tensor, quantized: Sequence[Quantized], hessian_II: Tensor, passes: int = PASSES
) -> list[Quantized]:
    """The same grids with better codes: no row's error under the damped H grows.

    w (P, O, I) and H (I, I) float32; every quantized matrix (O, I), its group size a multiple of 32.
    """
    problems, rows, columns = w_POI.shape
    state = _State.of(w_POI, quantized, hessian_II)
    for _ in range(passes):
        _descend(state)
    code_POI = state.code_IR.T.reshape(problems, rows, columns)
    return [replace(q, code_OI=code_OI) for q, code_OI in zip(quantized, code_POI, strict=True)]


@dataclass(frozen=True, slots=True)
class _State:
    """error E, pull G, what a pass changed of Q, the codes, and the scales of each 32 columns; damping is diag H's."""

    error_IR: Tensor
    pull_IR: Tensor
    change_IR: Tensor
    code_IR: Tensor
    scale_SR: Tensor
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
            hessian_II,
            diagonal_I.float(),
            (diagonal_I - hessian_II.diagonal()).float(),
            maximum_codes(tuple(q.bits for q in quantized), error_IR.device),
        )


def _by_slot(scale_OG: Tensor, group_size: int, slots: int) -> Tensor:
    """(S, O): scales, float32, repeated for every 32 columns."""
    return scale_OG.T.float().repeat_interleave(group_size // LEAF, dim=0)[:slots]


def _descend(state: _State) -> None:
    """One pass over all columns."""
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
