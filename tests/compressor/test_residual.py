"""W − Q and distances: plain torch and the kernels, on a card and by coroutines that play its lanes, find the same."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import replace

import lanes
import pytest
import torch
from torch import Tensor

from compressor.cuda import residual as residuals
from compressor.cuda.residual import put_columns, squared_distances
from compressor.cuda.residual import residuals as residuals_of
from compressor.cuda.scaled_half import ROOM, Operand, largest_of
from compressor.grid import Quantized

MakeTensor = Callable[..., Tensor]
SHAPES = [(9, 31), (300, 140), (260, 256)]
on_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def matrices(normal: MakeTensor, rows: int, columns: int, group_size: int = 64) -> tuple[Tensor, Quantized]:
    """W, and a Q near it whose columns lie among those of another matrix, as those of a batch do."""
    groups = math.ceil(columns / group_size)
    code_IR = (normal(columns, 2 * rows).abs() * 100).clamp(max=255).to(torch.uint8)
    scale_GR = normal(groups, 2 * rows, seed=1).abs().bfloat16()
    zero_GR = (normal(groups, 2 * rows, seed=2).abs() * 50).to(torch.uint8)
    quantized = Quantized(code_IR[:, rows:].T, scale_GR[:, rows:].T, zero_GR[:, rows:].T, 8, group_size)
    return (normal(columns, rows, seed=3).T + quantized.dequantize()).T.contiguous().T, quantized


def played(name: str, types: list[str], folder: object, *arguments: Tensor | int) -> Callable[..., None]:
    run = lanes.built(residuals.source(), name, types, folder)  # type: ignore[arg-type]
    given = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in arguments]
    return lambda wide, high: run(*given, wide, high, residuals.THREADS)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_by_coroutines_what_quantizing_leaves(
    normal: MakeTensor, tmp_path: object, rows: int, columns: int, group_size: int
) -> None:
    w_OI, q = matrices(normal, rows, columns, group_size)
    found_IO = torch.zeros(columns, rows + 4, dtype=torch.float16)
    types = [
        "float*",
        "unsigned char*",
        "unsigned short*",
        "unsigned char*",
        "unsigned short*",
        *["int"] * 11,
    ]
    tensors = w_OI, q.code_OI, q.scale_OG, q.zero_OG, found_IO
    strides = q.code_OI.stride(1), rows + 4, *q.scale_OG.stride(), *q.zero_OG.stride()
    numbers = 4, rows % 4 == 0, rows, columns, group_size, *strides
    played("subtract_quantized", types, tmp_path, *tensors, *numbers)(*residuals._grid(rows, columns))
    exact_IO = (w_OI - q.dequantize()).T
    assert torch.allclose(found_IO[:, :rows].float() / 16, exact_IO, rtol=2**-11, atol=1e-4)
    assert not found_IO[:, rows:].any()


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_by_coroutines_a_matrix_beside_others(
    normal: MakeTensor, tmp_path: object, rows: int, columns: int
) -> None:
    w_IO, found_IO = normal(columns, rows), torch.zeros(columns, rows + 4)
    types, numbers = ["float*", "float*", *["int"] * 4], (rows % 4 == 0, rows, columns, rows + 4)
    played("put_columns", types, tmp_path, w_IO, found_IO, *numbers)(*residuals._grid(rows, columns))
    assert torch.equal(found_IO[:, :rows], w_IO) and not found_IO[:, rows:].any()


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_by_coroutines_how_far_matrices_are_apart(
    normal: MakeTensor, tmp_path: object, rows: int, columns: int
) -> None:
    a_IO, b_IO = normal(columns, rows + 4).half(), normal(columns, rows, seed=1)
    grid = residuals._grid(rows, columns)
    part_B = torch.zeros(grid[0] * grid[1])
    types = ["unsigned short*", "float*", "float*", *["int"] * 5]
    numbers = 2, rows % 4 == 0, rows, columns, rows + 4
    played("squared_distance", types, tmp_path, a_IO, b_IO, part_B, *numbers)(*grid)
    exact = (4 * a_IO[:, :rows].float() - b_IO).square().sum().item()
    assert part_B.sum().item() == pytest.approx(exact, rel=1e-5)


def test_on_a_cpu_both_are_exact(normal: MakeTensor) -> None:
    w_OI, quantized = matrices(normal, 20, 96)
    whole, (found,) = residuals_of([w_OI], [quantized], 20, largest_of(w_OI))
    assert torch.equal(whole.dense(), found.dense())
    assert torch.equal(found.dense(), w_OI - quantized.dequantize())
    other_OI = normal(20, 96, seed=4)
    apart = (found.dense() - other_OI).square().sum()
    assert torch.allclose(squared_distances([(found.T, other_OI.T.contiguous())]), apart, rtol=1e-5)


@on_card
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_on_cuda_what_quantizing_leaves(normal: MakeTensor, rows: int, columns: int) -> None:
    w_OI, q = matrices(normal, rows, columns)
    code_OI, scale_OG, zero_OG = q.code_OI.T.cuda().T, q.scale_OG.cuda(), q.zero_OG.cuda()
    moved = replace(q, code_OI=code_OI, scale_OG=scale_OG, zero_OG=zero_OG)
    pair = [w_OI.T.cuda().T, w_OI.T.cuda().T * 2]
    _, (found, other) = residuals_of(pair, [moved, moved], rows, 2 * largest_of(w_OI) * ROOM)
    exact_OI = w_OI - q.dequantize()
    assert torch.allclose(other.dense().cpu(), exact_OI + w_OI, rtol=2**-10, atol=1e-3)
    assert found.values.dtype == torch.float16 and found.values.stride(0) == 1
    assert torch.allclose(found.dense().cpu(), exact_OI, rtol=2**-10, atol=1e-3)


@on_card
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_on_cuda_a_matrix_beside_others(normal: MakeTensor, rows: int, columns: int) -> None:
    w_IO, found_IO = normal(columns, rows).cuda(), torch.zeros(columns, 2 * rows).cuda()
    put_columns(found_IO[:, rows:], w_IO)
    assert torch.equal(found_IO[:, rows:], w_IO) and not found_IO[:, :rows].any()


@on_card
def test_on_cuda_how_far_matrices_are_apart(normal: MakeTensor) -> None:
    a_IO, b_IO = normal(1000, 3000), normal(1000, 1500, seed=1)
    a = Operand.of(a_IO.cuda())[:, 1500:]
    found = squared_distances([(a, b_IO.cuda())])
    exact = (a_IO[:, 1500:].double() - b_IO).square().sum().item()
    assert found.item() == pytest.approx(exact, rel=1e-3)
