"""The kernels for CUDA round and settle as the loops on a CPU do: on a card, and by coroutines that play its lanes."""

from __future__ import annotations

import ctypes
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import lanes
import pytest
import torch
from torch import Tensor

from compressor.cuda import gptq_cuda
from compressor.grid import Quantized
from compressor.lowrank.hessian import squared_error
from compressor.quantize import descent
from compressor.quantize import gptq as rounding
from compressor.quantize.descent import descended
from compressor.quantize.gptq import gptq, inverse_factor

MakeTensor = Callable[..., Tensor]
Work = Callable[[int, int], None]
BITS, GROUP_SIZES, ROWS = [2, 4, 3, 8], [32, 64, 128, 64], 73

on_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def problem(
    normal: MakeTensor, correlated: MakeTensor, columns: int, rows: int = ROWS
) -> tuple[Tensor, Tensor]:
    w_POI = normal(len(BITS), rows, columns)
    w_POI[0, :, 7], w_POI[1, 3], w_POI[2, 5, 64:] = 0, 0, 20
    return w_POI, correlated(columns)


TYPES = [
    "float*",
    "unsigned short*",
    "unsigned char*",
    *["float*"] * 4,
    "int*",
    *["int"] * 7,
]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[..., None]]:
    """Both kernels, compiled for this machine."""
    folder = tmp_path_factory.mktemp("lanes")
    return {name: lanes.built(gptq_cuda.source(name), name, TYPES, folder) for name in gptq_cuda.KERNELS}


def by_lanes(run: Callable[..., None], values: str, changes: str, matrix: str, state: object) -> Work:
    """What `gptq_cuda.block_kernel` gives, on a CPU: errors come in float16, 16 times as large."""
    parts = values, changes, "code_IR", "scale_SR", "zero_SR", matrix
    values_IR, changes_IR, code_IR, scale_SR, zero_SR, matrix_II = (getattr(state, part) for part in parts)
    maximum_P, group_sizes = state.maximum_P, state.group_sizes  # type: ignore[attr-defined]
    half_IR = torch.empty_like(code_IR, dtype=torch.float16)
    leaves_P = torch.tensor([size // 32 for size in group_sizes], dtype=torch.int32)
    rows, all_rows = code_IR.shape[1] // len(group_sizes), code_IR.shape[1]

    def work(start: int, end: int) -> None:
        tensors = values_IR, half_IR, code_IR, scale_SR, zero_SR, matrix_II, maximum_P, leaves_P
        numbers = 4, rows, all_rows, *matrix_II.stride(), start, end - start
        wide = math.ceil(rows / gptq_cuda.ROWS)
        run(
            *(ctypes.c_void_p(t.data_ptr()) for t in tensors),
            *numbers,
            wide,
            len(group_sizes),
            gptq_cuda.THREADS,
        )
        changes_IR[start:end].put(half_IR[start:end].float() / 16)

    return work


@pytest.mark.parametrize(("columns", "rows"), [(31, 9), (140, 9), (256, 68)])
def test_by_coroutines_gptq_finds_the_loop_s_codes_and_grids(
    normal: MakeTensor,
    correlated: MakeTensor,
    kernels: dict[str, Callable[..., None]],
    monkeypatch: pytest.MonkeyPatch,
    columns: int,
    rows: int,
) -> None:
    w_POI, hessian_II = problem(normal, correlated, columns, rows)
    factor_II = inverse_factor(hessian_II)
    peers = gptq(w_POI, factor_II, BITS, GROUP_SIZES)
    played = partial(by_lanes, kernels["round_block"], "w_IR", "error_IR", "factor_II")
    monkeypatch.setattr(rounding, "_compiled", played)
    for ours, peer in zip(gptq(w_POI, factor_II, BITS, GROUP_SIZES), peers, strict=True):
        assert (peer.code_OI != ours.code_OI).float().mean() < 0.02
        assert (peer.scale_OG != ours.scale_OG).float().mean() < 0.02
        assert (peer.zero_OG != ours.zero_OG).float().mean() < 0.02


@pytest.mark.parametrize(("columns", "rows"), [(31, 9), (140, 9), (256, 68)])
def test_by_coroutines_descent_finds_the_loop_s_codes_and_scales(
    normal: MakeTensor,
    correlated: MakeTensor,
    kernels: dict[str, Callable[..., None]],
    monkeypatch: pytest.MonkeyPatch,
    columns: int,
    rows: int,
) -> None:
    w_POI, hessian_II = problem(normal, correlated, columns, rows)
    first = gptq(w_POI, inverse_factor(hessian_II), BITS, GROUP_SIZES)
    peers = descended(w_POI, first, hessian_II)
    played = partial(by_lanes, kernels["settle"], "pull_IR", "change_IR", "damped_II")
    monkeypatch.setattr(descent, "_settler", played)
    for ours, peer, before in zip(descended(w_POI, first, hessian_II), peers, first, strict=True):
        assert (peer.code_OI != ours.code_OI).float().mean() < 0.02
        assert (before.code_OI != ours.code_OI).float().mean() > 0.01
        assert (peer.scale_OG != ours.scale_OG).float().mean() < 0.04
        assert torch.equal(peer.zero_OG, ours.zero_OG)


@pytest.fixture
def no_fallback() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def moved(quantized: Quantized) -> Quantized:
    return replace(
        quantized,
        code_OI=quantized.code_OI.cuda(),
        scale_OG=quantized.scale_OG.cuda(),
        zero_OG=quantized.zero_OG.cuda(),
    )


@on_card
@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("columns", [31, 96, 290, 1024])
def test_on_cuda_gptq_leaves_the_cpu_s_error(
    normal: MakeTensor, correlated: MakeTensor, columns: int
) -> None:
    w_POI, hessian_II = problem(normal, correlated, columns)
    factor_II = inverse_factor(hessian_II)
    found = gptq(w_POI.cuda(), factor_II.cuda(), BITS, GROUP_SIZES)
    for w_OI, ours, peer in zip(w_POI, found, gptq(w_POI, factor_II, BITS, GROUP_SIZES), strict=True):
        error = squared_error(w_OI, ours.dequantize().cpu(), hessian_II)
        assert error == pytest.approx(squared_error(w_OI, peer.dequantize(), hessian_II), rel=0.01)
        assert (ours.code_OI.cpu() != peer.code_OI).float().mean() < 0.02


@on_card
@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("columns", [31, 96, 290, 1024])
def test_on_cuda_descent_leaves_the_cpu_s_error(
    normal: MakeTensor, correlated: MakeTensor, columns: int
) -> None:
    w_POI, hessian_II = problem(normal, correlated, columns)
    first = gptq(w_POI, inverse_factor(hessian_II), BITS, GROUP_SIZES)
    ours = descended(w_POI.cuda(), [moved(q) for q in first], hessian_II.cuda())
    for w_OI, found, peer in zip(w_POI, ours, descended(w_POI, first, hessian_II), strict=True):
        error = squared_error(w_OI, found.dequantize().cpu(), hessian_II)
        assert error == pytest.approx(squared_error(w_OI, peer.dequantize(), hessian_II), rel=0.01)


@on_card
@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("apart", [1e-3, 1e3])
def test_on_cuda_columns_of_unlike_size_lose_nothing_to_float16(
    normal: MakeTensor, correlated: MakeTensor, apart: float
) -> None:
    w_POI, hessian_II = problem(normal, correlated, 512)
    size_I = torch.ones(512)
    size_I[::50] = apart
    hessian_II = hessian_II * size_I[:, None] * size_I
    factor_II = inverse_factor(hessian_II)
    found = gptq(w_POI.cuda(), factor_II.cuda(), BITS, GROUP_SIZES)
    ours = descended(w_POI.cuda(), found, hessian_II.cuda())
    peers = descended(w_POI, gptq(w_POI, factor_II, BITS, GROUP_SIZES), hessian_II)
    for w_OI, one, peer in zip(w_POI, ours, peers, strict=True):
        error = squared_error(w_OI, one.dequantize().cpu(), hessian_II)
        assert error == pytest.approx(squared_error(w_OI, peer.dequantize(), hessian_II), rel=0.02)
