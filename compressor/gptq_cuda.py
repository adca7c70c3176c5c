"""A block of 128 columns of GPTQ or of descent on CUDA: `gptq.cu` compiled and launched.

What lives here: compiling and launching. The products that spread a block's changes over other columns, and everything
that holds on any device, are in `gptq.py` and `descent.py`; what the kernels do is said in `gptq.cu`.

torch compiles the source when it is first needed, which takes seconds. Its way of doing so is not yet public; where it
fails, plain torch does the work, after a warning.

Letters: P problems, O rows of each, R = P·O, I columns, S slots of 32 columns.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from math import log2
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from allocator.storage import ceil_div
from compressor.grid import REFITS, SHRINKS
from compressor.precision import Operand

KERNELS = ("round_block", "settle")
THREADS, ROWS = 128, 32
"""Threads of a thread block, and the rows that it works on at a time, as in `gptq.cu`."""
SHARED_BYTES = {"round_block": 66560, "settle": 57344}
RESIDENT = {"round_block": 3, "settle": 4}
"""Shared memory of a thread block, and how many of them a multiprocessor holds."""
_compiling = Lock()


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
    kernel = _kernels(values_IR.device).get(name)
    if kernel is None:
        return None
    rows, all_rows = values_IR.shape[1] // len(group_sizes), values_IR.shape[1]
    tensors = values_IR, changes_IR.values, code_IR, scale_SR, zero_SR, matrix_II, maximum_P
    fixed = [
        *tensors,
        _leaves(tuple(group_sizes), values_IR.device),
        -round(log2(changes_IR.unit)),
        rows,
        all_rows,
        *matrix_II.stride(),
    ]
    problems, properties = len(group_sizes), torch.cuda.get_device_properties(values_IR.device)
    resident = max(1, RESIDENT[name] * properties.multi_processor_count // problems)
    turns = ceil_div(ceil_div(rows, ROWS), resident)
    grid = ceil_div(rows, ROWS * turns), problems, 1

    def work(start: int, end: int) -> None:
        arguments = [*fixed, start, end - start]
        with torch.cuda.device_of(values_IR):
            kernel(grid=grid, block=(THREADS, 1, 1), args=arguments, shared_mem=SHARED_BYTES[name])

    return work


@cache
def _leaves(group_sizes: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([size // 32 for size in group_sizes], dtype=torch.int32, device=device)


def _kernels(device: torch.device) -> dict[str, Callable[..., None]]:
    index = torch.cuda.current_device() if device.index is None else device.index
    with _compiling:
        return _compiled(index)


@cache
def _compiled(index: int) -> dict[str, Callable[..., None]]:
    """The kernels for a card; none where torch, or the card, is too old for them."""
    if torch.version.hip is not None:
        return {}
    try:
        with ThreadPoolExecutor(len(KERNELS)) as pool:
            return dict(zip(KERNELS, pool.map(partial(_compile, index), KERNELS), strict=True))
    except (AttributeError, OSError, RuntimeError) as error:
        warnings.warn(f"compressing without CUDA kernels, which is slow: {error}", stacklevel=2)
        return {}


def source(name: str) -> str:
    """What is compiled for one kernel."""
    shrinks = ", ".join(f"{shrink!r}f" for shrink in SHRINKS)
    defined = {"SHRINKS": shrinks, "REFITS": REFITS, "SHARED_BYTES": SHARED_BYTES[name], "RESIDENT": RESIDENT[name]}
    head = f"#define {name.upper()}\n" + "".join(f"#define {key} {value}\n" for key, value in defined.items())
    return head + (Path(__file__).parent / "gptq.cu").read_text()


def _compile(index: int, name: str) -> Callable[..., None]:
    with torch.cuda.device(index):
        torch.cuda.synchronize()  # a new thread has no context before its first call
        kernel: Any = torch.cuda._compile_kernel(source(name), name)
        kernel.set_shared_memory_config(SHARED_BYTES[name])
    launch: Callable[..., None] = kernel
    return launch
