"""A block of 128 columns of GPTQ or of descent on CUDA: `gptq.cu` compiled and launched.

What lives here: two launches. The products that spread a block's changes over other columns, and everything that holds
on any device, are in `gptq.py` and `descent.py`; what the kernels do is said in `gptq.cu`.

torch compiles the source when it is first needed, which takes seconds; its way of doing so is not yet public, and where
it is missing plain torch does the work.

Letters: P problems, O rows of each, R = P·O, C columns of the block, S slots of 32 columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from math import log2
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from allocator.storage import ceil_div
from compressor.grid import REFITS, SHRINKS
from compressor.precision import Operand

THREADS, ROWS = 128, 64
"""Of a thread block, as in `gptq.cu`."""
SHARED_BYTES = 128 * 128 * 4


def available() -> bool:
    """Whether torch can compile for the card at hand."""
    return hasattr(torch.cuda, "_compile_kernel") and torch.version.hip is None


def round_block(
    w_CR: Tensor,
    error_CR: Operand,
    code_CR: Tensor,
    scale_SR: Tensor,
    zero_SR: Tensor,
    factor_CC: Tensor,
    maximum_P: Tensor,
    group_sizes: Sequence[int],
) -> None:
    """Round one block of at most 128 columns; shapes and contents as for `gptq._round_fused`."""
    _launch(
        "round_block",
        [w_CR, error_CR.values, code_CR, scale_SR, zero_SR, factor_CC, maximum_P],
        error_CR,
        group_sizes,
    )


def settle(
    pull_CR: Tensor,
    change_CR: Operand,
    code_CR: Tensor,
    scale_SR: Tensor,
    zero_SR: Tensor,
    damped_CC: Tensor,
    maximum_P: Tensor,
    group_sizes: Sequence[int],
) -> None:
    """Move codes, scales and codes of one block in place; shapes and contents as for `descent.settle`."""
    _launch(
        "settle",
        [pull_CR, change_CR.values, code_CR, scale_SR, zero_SR, damped_CC, maximum_P],
        change_CR,
        group_sizes,
    )


def _launch(name: str, tensors: list[Tensor], changes: Operand, group_sizes: Sequence[int]) -> None:
    matrix_CC, (columns, all_rows) = tensors[5], tensors[0].shape
    rows = all_rows // len(group_sizes)
    leaves_P = _leaves(tuple(group_sizes), matrix_CC.device)
    _kernel(name, matrix_CC.device)(
        grid=(ceil_div(rows, ROWS), len(group_sizes), 1),
        block=(THREADS, 1, 1),
        args=[*tensors, leaves_P, -round(log2(changes.unit)), rows, all_rows, *matrix_CC.stride(), columns],
        shared_mem=SHARED_BYTES,
    )


@cache
def _leaves(group_sizes: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([size // 32 for size in group_sizes], dtype=torch.int32, device=device)


@cache
def _kernel(name: str, device: torch.device) -> Callable[..., None]:
    shrinks = ", ".join(f"{shrink!r}f" for shrink in SHRINKS)
    source = (Path(__file__).parent / "gptq.cu").read_text()
    kernel: Any = torch.cuda._compile_kernel(
        f"#define SHRINKS {shrinks}\n#define REFITS {REFITS}\n{source}", name
    )
    kernel.set_shared_memory_config(SHARED_BYTES)
    launch: Callable[..., None] = kernel
    return launch
