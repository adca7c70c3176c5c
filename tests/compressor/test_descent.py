"""Coordinate descent: never a worse row, and at rest where no single code or scale could be better."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from compressor.grid import Quantized
from compressor.quantize import descent
from compressor.quantize.descent import descended, move_codes, move_scales, settle
from compressor.quantize.gptq import damped_diagonal, gptq, inverse_factor, round_to_nearest

MakeTensor = Callable[..., Tensor]
BITS, GROUP_SIZES = [2, 3, 4, 8], [32, 64, 128, 64]


def damped(hessian_II: Tensor) -> Tensor:
    hessian_II = hessian_II.double()
    return hessian_II + torch.diag(damped_diagonal(hessian_II) - hessian_II.diagonal())


def row_errors(w_OI: Tensor, found: Quantized, hessian_II: Tensor) -> Tensor:
    delta_OI = (found.dequantize() - w_OI).double()
    return ((delta_OI @ damped(hessian_II)) * delta_OI).sum(dim=1)


def problems(
    normal: MakeTensor, correlated: MakeTensor, columns: int
) -> tuple[Tensor, list[Quantized], Tensor]:
    w_POI, hessian_II = normal(len(BITS), 24, columns), correlated(columns)
    w_POI[0, :, 7], w_POI[1, 3] = 0, 0
    return w_POI, gptq(w_POI, inverse_factor(hessian_II), BITS, GROUP_SIZES), hessian_II


@pytest.mark.parametrize("columns", [31, 128, 300])
@pytest.mark.parametrize("passes", [1, 2, 3])
def test_no_row_is_worse_and_the_zeros_are_as_they_were(
    normal: MakeTensor, correlated: MakeTensor, columns: int, passes: int
) -> None:
    w_POI, first, hessian_II = problems(normal, correlated, columns)
    for w_OI, before, after in zip(w_POI, first, descended(w_POI, first, hessian_II, passes), strict=True):
        worst, found_O = row_errors(w_OI, before, hessian_II), row_errors(w_OI, after, hessian_II)
        assert (found_O <= worst * (1 + 1e-5) + 1e-9).all()
        assert torch.equal(before.zero_OG, after.zero_OG)
        if after.bits < 8:
            assert not torch.equal(before.scale_OG, after.scale_OG)
        assert after.scale_OG.shape == before.scale_OG.shape and (after.scale_OG > 0).all()
        assert int(after.code_OI.max()) < 2**after.bits


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_after_gptq_it_takes_several_percent_off(
    normal: MakeTensor, correlated: MakeTensor, bits: int
) -> None:
    w_OI, hessian_II = normal(48, 256), correlated(256)
    first = gptq(w_OI[None], inverse_factor(hessian_II), [bits], [64])
    (after,) = descended(w_OI[None], first, hessian_II)
    gained = row_errors(w_OI, after, hessian_II).sum() / row_errors(w_OI, first[0], hessian_II).sum()
    assert gained < 0.9


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_where_it_comes_to_rest_no_single_code_or_scale_could_be_better(
    normal: MakeTensor, correlated: MakeTensor, group_size: int
) -> None:
    w_OI, hessian_II = normal(4, 128), correlated(128)
    first = gptq(w_OI[None], inverse_factor(hessian_II), [3], [group_size])
    (found,) = descended(w_OI[None], first, hessian_II, passes=60)
    least_O = row_errors(w_OI, found, hessian_II)
    for column in range(128):
        for step in (-1, 1):
            code_OI = found.code_OI.clone()
            code_OI[:, column] = (code_OI[:, column].int() + step).clamp(0, 7)
            moved_O = row_errors(w_OI, replace(found, code_OI=code_OI), hessian_II)
            assert (moved_O >= least_O * (1 - 1e-5)).all()
    for group in range(128 // group_size):
        for factor in (1 - 2**-7, 1 + 2**-7):
            scale_OG = found.scale_OG.clone()
            scale_OG[:, group] *= factor
            moved_O = row_errors(w_OI, replace(found, scale_OG=scale_OG), hessian_II)
            assert (moved_O >= least_O * (1 - 1e-4)).all()


def test_one_group_gets_the_scale_of_least_squares(normal: MakeTensor, correlated: MakeTensor) -> None:
    w_OI, damped_II = normal(6, 64), damped(correlated(64)).float()
    first = round_to_nearest(w_OI, 3, 64)
    scale_SO = first.scale_OG.T.float().repeat(2, 1)
    level_OI = (first.code_OI.int() - first.zero_OG.int()).double()
    pull_IO, change_IO = damped_II @ (w_OI - first.dequantize()).T, torch.zeros(64, 6)
    zero_SO = first.zero_OG.T.float().repeat(2, 1)
    move_scales(pull_IO, change_IO, first.code_OI.T, scale_SO, zero_SO, damped_II, 64)
    pulled_OI = level_OI @ damped_II.double()
    best_O = (pulled_OI * w_OI.double()).sum(1) / (pulled_OI * level_OI).sum(1)
    assert torch.allclose(scale_SO.double(), best_O.expand(2, 6), rtol=2**-8)
    moved_IO = (scale_SO[0].double() - first.scale_OG[:, 0].double()) * level_OI.T
    assert torch.allclose(change_IO.double(), moved_IO, atol=1e-6)
    left_IO = damped_II.double() @ ((w_OI - first.dequantize()).T - moved_IO)
    assert torch.allclose(pull_IO.double(), left_IO, atol=1e-4 * float(left_IO.abs().max()))


def test_under_a_diagonal_hessian_nearest_codes_stay(normal: MakeTensor) -> None:
    w_OI = normal(8, 100)
    first = round_to_nearest(w_OI, 4, 32)
    hessian_II = torch.diag(torch.linspace(0.1, 3, 100))
    pull_IO, code_IO = hessian_II @ (w_OI - first.dequantize()).T, first.code_OI.T.clone()
    maximum_P, change_IO = torch.tensor([15.0]), torch.zeros(100, 8)
    move_codes(pull_IO, change_IO, code_IO, first.scale_OG.T.float(), hessian_II, maximum_P)
    assert torch.equal(code_IO, first.code_OI.T) and not change_IO.any()


@pytest.mark.parametrize("hessian_II", [torch.zeros(64, 64), torch.ones(64, 64)], ids=["zeros", "rank one"])
def test_a_hessian_without_rank_is_survived(normal: MakeTensor, hessian_II: Tensor) -> None:
    w_OI = normal(8, 64)
    first = gptq(w_OI[None], inverse_factor(hessian_II), [3], [32])
    (found,) = descended(w_OI[None], first, hessian_II)
    assert (row_errors(w_OI, found, hessian_II) <= row_errors(w_OI, first[0], hessian_II) * (1 + 1e-4)).all()


def test_weights_that_need_no_rounding_stay(correlated: MakeTensor) -> None:
    code_OI = torch.randint(16, (4, 64), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    exact = Quantized(code_OI, torch.full((4, 2), 0.125).bfloat16(), torch.full((4, 2), 8).byte(), 4, 32)
    (found,) = descended(exact.dequantize()[None], [exact], correlated(64))
    assert torch.equal(found.code_OI, code_OI)


@pytest.mark.parametrize("columns", [31, 140, 290])
def test_the_compiled_loop_finds_what_the_plain_one_finds(
    normal: MakeTensor, correlated: MakeTensor, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    w_POI, first, hessian_II = problems(normal, correlated, columns)
    compiled = descended(w_POI, first, hessian_II)
    monkeypatch.setattr(descent, "_settler", lambda state: partial(settle, move_codes, state))
    for ours, peer in zip(compiled, descended(w_POI, first, hessian_II), strict=True):
        assert (ours.code_OI != peer.code_OI).float().mean() < 0.01
