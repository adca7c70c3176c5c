"""A block of 128 columns of GPTQ or of descent on CUDA: `gptq.cu` compiled and launched.

What lives here: what they are given. The products that spread a block's changes over other columns, and everything
that holds on any device, are in `gptq.py` and `descent.py`; what the kernels do is said in `gptq.cu`.

Letters: P problems, O rows of each, R = P·O, I columns, S slots of 32 columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from math import log2
from pathlib import Path

import torch
from torch import Tensor

from allocator.storage import ceil_div
from compressor.cuda.nvrtc import Kernel, compiled, compiling
from compressor.cuda.scaled_half import Operand
from compressor.grid import REFITS, SHRINKS

KERNELS = ("round_block", "settle")
THREADS, ROWS = 128, 32
"""Threads of a thread block, and the rows that it works on at a time, as in `gptq.cu`."""
SHARED_BYTES = {"round_block": 66560, "settle": 57344}
RESIDENT = {"round_block": 3, "settle": 4}
"""Shared memory of a thread block, and how many of them a multiprocessor holds."""


def block_kernel(
    name: str,
    values_IR: Tensor,
    changes_IR: Operand,
    code_IR: Tensor,
    scale_SR: Tensor,
    zero_SR: Tensor,
    matrix_II: Tensor,
    maximum_P: Tensor,
    group_sizes: Sequence[int],
) -> Callable[[int, int], None] | None:
    """What works on the columns from the first number to the second, at most 128, in place; None where torch cannot.

    round_block: values are weights, changes receives the errors and matrix is the factor, as `gptq._compiled` says.
    settle: values are G, changes receives what is added to Q and matrix is the damped H, as for `descent.settle`.
    """
    with compiling:
        kernel = _compiled(values_IR.device.index).get(name)
    if kernel is None:
        return None
    rows, all_rows = values_IR.shape[1] // len(group_sizes), values_IR.shape[1]
    tensors = values_IR, changes_IR.values, code_IR, scale_SR, zero_SR, matrix_II, maximum_P
    leaves_P = _leaves(tuple(group_sizes), values_IR.device)
    numbers = -round(log2(changes_IR.unit)), rows, all_rows, *matrix_II.stride()
    problems, properties = len(group_sizes), torch.cuda.get_device_properties(values_IR.device)
    resident = max(1, RESIDENT[name] * properties.multi_processor_count // problems)
    turns = ceil_div(ceil_div(rows, ROWS), resident)
    grid = ceil_div(rows, ROWS * turns), problems
    launch = kernel.prepared(grid, THREADS, (*tensors, leaves_P, *numbers), later=2)

    def work(start: int, end: int) -> None:
        launch(start, end - start)

    return work


@cache
def _leaves(group_sizes: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([size // 32 for size in group_sizes], dtype=torch.int32, device=device)


@cache
def _compiled(index: int) -> dict[str, Kernel]:
    return compiled({name: source(name) for name in KERNELS}, SHARED_BYTES, index, "compressing")


def source(name: str) -> str:
    """What is compiled for one kernel."""
    shrinks = ", ".join(f"{shrink!r}f" for shrink in SHRINKS)
    defined = {
        "SHRINKS": shrinks,
        "REFITS": REFITS,
        "SHARED_BYTES": SHARED_BYTES[name],
        "RESIDENT": RESIDENT[name],
    }
    head = f"#define {name.upper()}\n" + "".join(f"#define {key} {value}\n" for key, value in defined.items())
    return head + (Path(__file__).parent / "gptq.cu").read_text()
