"""The kernels for CUDA round and settle as the loops on a CPU do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from compressor.decompose import squared_error
from compressor.descent import descended
from compressor.gptq import gptq, inverse_factor
from compressor.gptq_cuda import available

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or not available(), reason="needs a GPU")

MakeTensor = Callable[..., Tensor]
BITS, GROUP_SIZES, ROWS = [2, 4, 3, 8], [32, 64, 128, 64], 73


def problem(normal: MakeTensor, correlated: MakeTensor, columns: int) -> tuple[Tensor, Tensor]:
    w_POI = normal(len(BITS), ROWS, columns)
    w_POI[0, :, 7], w_POI[1, 3], w_POI[2, 5, 64:] = 0, 0, 20
    return w_POI, correlated(columns)


@pytest.mark.parametrize("columns", [31, 96, 290, 1024])
def test_gptq_leaves_the_cpu_s_error(normal: MakeTensor, correlated: MakeTensor, columns: int) -> None:
    w_POI, hessian_II = problem(normal, correlated, columns)
    factor_II = inverse_factor(hessian_II)
    found = gptq(w_POI.cuda(), factor_II.cuda(), BITS, GROUP_SIZES)
    for w_OI, ours, peer in zip(w_POI, found, gptq(w_POI, factor_II, BITS, GROUP_SIZES), strict=True):
        error = squared_error(w_OI, ours.dequantize().cpu(), hessian_II)
        assert error == pytest.approx(squared_error(w_OI, peer.dequantize(), hessian_II), rel=0.01)
        assert (ours.code_OI.cpu() != peer.code_OI).float().mean() < 0.02
        first = slice(0, 4)
        assert (ours.scale_OG.cpu()[:, first] != peer.scale_OG[:, first]).float().mean() < 0.02
        assert (ours.zero_OG.cpu()[:, first] != peer.zero_OG[:, first]).float().mean() < 0.02


@pytest.mark.parametrize("columns", [31, 96, 290, 1024])
def test_descent_leaves_the_cpu_s_error(normal: MakeTensor, correlated: MakeTensor, columns: int) -> None:
    w_POI, hessian_II = problem(normal, correlated, columns)
    first = gptq(w_POI, inverse_factor(hessian_II), BITS, GROUP_SIZES)
    on_card = [
        replace(q, code_OI=q.code_OI.cuda(), scale_OG=q.scale_OG.cuda(), zero_OG=q.zero_OG.cuda())
        for q in first
    ]
    ours = descended(w_POI.cuda(), on_card, hessian_II.cuda())
    for w_OI, found, peer in zip(w_POI, ours, descended(w_POI, first, hessian_II), strict=True):
        error = squared_error(w_OI, found.dequantize().cpu(), hessian_II)
        assert error == pytest.approx(squared_error(w_OI, peer.dequantize(), hessian_II), rel=0.01)


@pytest.mark.parametrize("apart", [1e-3, 1e3])
def test_columns_of_unlike_size_lose_nothing_to_float16(
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
