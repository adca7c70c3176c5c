"""The kernel for a CPU rounds as the column loop does, however many threads share its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from compressor.grid import Quantized
from compressor.lowrank.hessian import squared_error
from compressor.quantize.gptq import LEAF, Factor, _Leaf, _State, gptq, in_halves, inverse_factor

MakeTensor = Callable[..., Tensor]
BITS, GROUP_SIZES = [2, 4, 3, 8], [32, 64, 128, 64]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def problem(normal: MakeTensor, correlated: MakeTensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Zeros, constants and outliers among normal weights, under correlated inputs."""
    w_POI = normal(len(BITS), rows, columns)
    w_POI[0, :, 7], w_POI[1, 3], w_POI[2, 5, columns // 2 :] = 0, 0, 20
    return w_POI, correlated(columns)


def by_the_loop(w_POI: Tensor, factor_II: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    state = _State.of(torch.cat(list(w_POI.mT), dim=1), 0.0, Factor(factor_II), BITS, GROUP_SIZES)
    in_halves(_Leaf(state), state.spread, LEAF, 0, len(state.w_IR))
    return state.code_IR, state.scale_SR, state.zero_SR


@pytest.mark.parametrize("rows", [9, 64, 130])
@pytest.mark.parametrize("columns", [31, 128, 140, 290])
def test_it_finds_the_loop_s_codes_and_grids(
    normal: MakeTensor, correlated: MakeTensor, rows: int, columns: int
) -> None:
    w_POI, hessian_II = problem(normal, correlated, rows, columns)
    factor_II = inverse_factor(hessian_II)
    code_IR, scale_SR, zero_SR = by_the_loop(w_POI, factor_II)
    for p, found in enumerate(gptq(w_POI, factor_II, BITS, GROUP_SIZES)):
        of_problem, slots = slice(rows * p, rows * p + rows), slice(None, None, GROUP_SIZES[p] // LEAF)
        peer = Quantized(
            code_IR[:, of_problem].T,
            scale_SR[slots, of_problem].T.bfloat16(),
            zero_SR[slots, of_problem].T.to(torch.uint8),
            BITS[p],
            GROUP_SIZES[p],
        )
        assert (found.code_OI != peer.code_OI).float().mean() < 0.01
        assert (found.scale_OG != peer.scale_OG).float().mean() < 0.01
        assert (found.zero_OG != peer.zero_OG).float().mean() < 0.01
        error = squared_error(w_POI[p], found.dequantize(), hessian_II)
        assert error == pytest.approx(squared_error(w_POI[p], peer.dequantize(), hessian_II), rel=0.01)


def test_two_threads_find_what_one_finds_to_the_bit(
    normal: MakeTensor, correlated: MakeTensor, threads: Callable[[int], None]
) -> None:
    w_POI, hessian_II = problem(normal, correlated, 130, 128)
    factor_II = inverse_factor(hessian_II)
    threads(1)
    alone = gptq(w_POI, factor_II, BITS, GROUP_SIZES)
    threads(2)
    for one, two in zip(alone, gptq(w_POI, factor_II, BITS, GROUP_SIZES), strict=True):
        assert torch.equal(one.code_OI, two.code_OI)
        assert torch.equal(one.scale_OG, two.scale_OG)
        assert torch.equal(one.zero_OG, two.zero_OG)
