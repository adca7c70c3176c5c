"""What quantizing leaves: W − Q as a factor of products, and its distance from a low-rank part.

What lives here: passes over whole matrices between products. On CUDA each is one kernel (`residual.cu`) that reads what
it needs once; on a CPU, and where kernels cannot be had, plain torch does the same.

Letters: O rows, I columns; what is named IO lies in memory column by column.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from math import log2
from pathlib import Path

import torch
from torch import Tensor

from allocator.storage import ceil_div
from compressor.cuda.nvrtc import Kernel, compiled, compiling
from compressor.cuda.scaled_half import Operand
from compressor.grid import Quantized

KERNELS = ("subtract_quantized", "put_columns", "squared_distance")
SLOT, THREADS, HEIGHT = 32, 128, 4
"""Columns and threads of a thread block and rows of a thread, as in `residual.cu`."""


def residuals(
    weights: Iterable[Tensor], quantized: Sequence[Quantized], rows: int, largest: float
) -> tuple[Operand, list[Operand]]:
    """W − Q of P matrices (O, I) of so many rows, which lie in memory column by column, with room up to `largest`.

    All as one matrix (P·O, I), in memory column by column, and each as its part of that.
    """
    columns, device = quantized[0].code_OI.shape[1], quantized[0].code_OI.device
    whole_IR = Operand.empty(columns, rows * len(quantized), device, largest)
    parts = whole_IR.T.split([rows] * len(quantized))
    for part, w_OI, q in zip(parts, weights, quantized, strict=True):
        put_residual(part.T, w_OI, q)
    return whole_IR.T, parts


def put_residual(onto_IO: Operand, weight_OI: Tensor, quantized: Quantized) -> None:
    """Take up W − Q, column by column; the kernel leaves what exceeds float16's range at its end."""
    kernel = _kernel("subtract_quantized", weight_OI)
    if kernel is None or not _are_columns_whole(weight_OI, quantized.code_OI, onto_IO.values.T):
        onto_IO.put((weight_OI - quantized.dequantize()).T)
        return
    rows, columns = weight_OI.shape
    code_OI, scale_OG, zero_OG = quantized.code_OI, quantized.scale_OG, quantized.zero_OG
    strides = code_OI.stride(1), onto_IO.values.stride(0), *scale_OG.stride(), *zero_OG.stride()
    aligned = _is_aligned(weight_OI.T, code_OI.T, onto_IO.values)
    tensors = weight_OI, code_OI, scale_OG, zero_OG, onto_IO.values
    numbers = -round(log2(onto_IO.unit)), aligned, rows, columns, quantized.group_size, *strides
    kernel.prepared(_grid(rows, columns), THREADS, (*tensors, *numbers))()


def put_columns(onto_IO: Tensor, weight_IO: Tensor) -> None:
    """Copy W onto columns of a wider matrix; on CUDA in a third of the time that torch takes."""
    kernel = _kernel("put_columns", weight_IO)
    if kernel is None or not weight_IO.is_contiguous():
        onto_IO.copy_(weight_IO)
        return
    columns, rows = weight_IO.shape
    aligned = _is_aligned(weight_IO, onto_IO)
    arguments = weight_IO, onto_IO, aligned, rows, columns, onto_IO.stride(0)
    kernel.prepared(_grid(rows, columns), THREADS, arguments)()


def squared_distances(pairs: Iterable[tuple[Operand, Tensor]]) -> Tensor:
    """‖a − b‖² of pairs of matrices (I, O), float32."""
    return torch.stack([_sums(a, b) for a, b in pairs]).sum(dim=1)


def _sums(a: Operand, b: Tensor) -> Tensor:
    """Parts of Σ (a − b)²."""
    kernel = _kernel("squared_distance", b)
    if kernel is None or not (a.values.stride(1) == 1 and b.is_contiguous()):
        distance: Tensor = torch.linalg.vector_norm(torch.sub(b, a.values, alpha=a.unit))
        return distance.square_()[None]
    columns, rows = b.shape
    grid = _grid(rows, columns)
    part_B = b.new_empty(grid[0] * grid[1])
    numbers = round(log2(a.unit)), _is_aligned(a.values, b), rows, columns, a.values.stride(0)
    kernel.prepared(grid, THREADS, (a.values, b, part_B, *numbers))()
    return part_B


def source() -> str:
    """What is compiled."""
    return (Path(__file__).parent / "residual.cu").read_text()


def _are_columns_whole(weight_OI: Tensor, *others: Tensor) -> bool:
    return weight_OI.T.is_contiguous() and all(other.stride(0) == 1 for other in others)


def _is_aligned(*matrices: Tensor) -> bool:
    """Whether `HEIGHT` rows of every column can be read at once."""
    return all(
        x.shape[1] % HEIGHT == 0
        and x.stride(0) % HEIGHT == 0
        and x.data_ptr() % (HEIGHT * x.element_size()) == 0
        for x in matrices
    )


def _grid(rows: int, columns: int) -> tuple[int, int]:
    return ceil_div(rows, THREADS * HEIGHT), ceil_div(columns, SLOT)


def _kernel(name: str, x: Tensor) -> Kernel | None:
    if x.device.type != "cuda":
        return None
    with compiling:
        return _compiled(x.device.index).get(name)


@cache
def _compiled(index: int) -> dict[str, Kernel]:
    sources, none = dict.fromkeys(KERNELS, source()), dict.fromkeys(KERNELS, 0)
    return compiled(sources, none, index, "measuring what quantizing leaves")
