"""GPTQ: rounding errors made good under a Hessian, whatever the Hessian."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from compressor.grid import Quantized
from compressor.quantize.gptq import SingularHessianError, gptq, inverse_factor, round_to_nearest

MakeTensor = Callable[..., Tensor]


def output_error(w_OI: Tensor, found: Quantized, hessian_II: Tensor) -> float:
    delta_OI = (found.dequantize() - w_OI).double()
    return float(((delta_OI @ hessian_II.double()) * delta_OI).sum())


def alone(w_OI: Tensor, hessian_II: Tensor, bits: int, group_size: int) -> Quantized:
    return gptq(w_OI[None], inverse_factor(hessian_II), [bits], [group_size])[0]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_under_the_identity_it_is_nearest_rounding(normal: MakeTensor, bits: int) -> None:
    w_OI = normal(16, 160)
    found, nearest = alone(w_OI, torch.eye(160), bits, 64), round_to_nearest(w_OI, bits, 64)
    assert torch.allclose(found.dequantize(), nearest.dequantize(), atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("columns", [128, 200])
def test_it_beats_nearest_rounding_under_correlated_inputs(
    normal: MakeTensor, correlated: MakeTensor, bits: int, columns: int
) -> None:
    w_OI, hessian_II = normal(48, columns), correlated(columns)
    ours = output_error(w_OI, alone(w_OI, hessian_II, bits, 64), hessian_II)
    assert ours < 0.7 * output_error(w_OI, round_to_nearest(w_OI, bits, 64), hessian_II)


def test_the_column_loop_is_the_textbook_recursion(normal: MakeTensor, correlated: MakeTensor) -> None:
    """Given the grids found, rounding each column and spreading its error by hand gives the same codes."""
    w_OI, factor_II = normal(8, 100).double(), inverse_factor(correlated(100)).double()
    found = gptq(w_OI.float()[None], factor_II.float(), [3], [32])[0]
    scale_OI = found.scale_OG.double().repeat_interleave(32, dim=1)
    zero_OI = found.zero_OG.double().repeat_interleave(32, dim=1)
    left_OI = w_OI.clone()
    for column in range(100):
        scale_O, zero_O = scale_OI[:, column], zero_OI[:, column]
        code_O = ((left_OI[:, column] / scale_O).round() + zero_O).clamp(0, 7)
        assert torch.equal(code_O.to(torch.uint8), found.code_OI[:, column])
        error_O = (left_OI[:, column] - (code_O - zero_O) * scale_O) / factor_II[column, column]
        left_OI -= error_O[:, None] * torch.triu(factor_II)[column][None]


def test_factor_is_upper_and_squares_to_the_inverse_of_the_damped_hessian(correlated: MakeTensor) -> None:
    hessian_II = correlated(40)
    factor_II = inverse_factor(hessian_II, damping=0.05).double()
    damped_II = hessian_II.double() + 0.05 * hessian_II.diagonal().double().mean() * torch.eye(40)
    assert torch.equal(factor_II, factor_II.triu())
    assert torch.allclose(factor_II.T @ factor_II @ damped_II, torch.eye(40).double(), atol=1e-4)


def test_a_dead_column_counts_as_an_average_one(correlated: MakeTensor) -> None:
    """Else its weights would be free, and the next text may excite it."""
    hessian_II = correlated(40)
    hessian_II[7], hessian_II[:, 7] = 0, 0
    others_I = torch.arange(40) != 7
    average = 1.01 * hessian_II.diagonal()[others_I].mean()
    assert inverse_factor(hessian_II)[7, 7] ** -2 == pytest.approx(average.item(), rel=1e-3)


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e12])
def test_damping_is_relative_so_the_scale_of_the_hessian_changes_nothing(
    normal: MakeTensor, correlated: MakeTensor, scale: float
) -> None:
    w_OI, hessian_II = normal(16, 96), correlated(96)
    error = output_error(w_OI, alone(w_OI, hessian_II, 3, 32), hessian_II)
    scaled = output_error(w_OI, alone(w_OI, hessian_II * scale, 3, 32), hessian_II)
    assert scaled == pytest.approx(error, rel=0.01)


def test_every_problem_of_a_batch_gets_what_it_would_get_alone(
    normal: MakeTensor, correlated: MakeTensor
) -> None:
    w_POI, hessian_II = normal(6, 12, 160), correlated(160)
    bits, group_sizes = [2, 3, 4, 5, 6, 8], [32, 64, 128, 32, 64, 128]
    batch = gptq(w_POI, inverse_factor(hessian_II), bits, group_sizes)
    for w_OI, together, width, size in zip(w_POI, batch, bits, group_sizes, strict=True):
        single = alone(w_OI, hessian_II, width, size)
        assert (together.bits, together.group_size) == (width, size)
        assert (together.code_OI != single.code_OI).float().mean() < 0.01
        ratio = output_error(w_OI, together, hessian_II) / output_error(w_OI, single, hessian_II)
        assert ratio == pytest.approx(1, abs=0.01)


def test_rows_do_not_affect_each_other(normal: MakeTensor, correlated: MakeTensor) -> None:
    w_OI, hessian_II = normal(24, 96), correlated(96)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    found, shuffled = alone(w_OI, hessian_II, 3, 32), alone(w_OI[order], hessian_II, 3, 32)
    assert torch.equal(found.code_OI[order], shuffled.code_OI)
    assert torch.equal(found.scale_OG[order], shuffled.scale_OG)


def test_a_dead_column_costs_nothing_and_spreads_nothing(normal: MakeTensor, correlated: MakeTensor) -> None:
    w_OI, hessian_II = normal(16, 96), correlated(96)
    hessian_II[40], hessian_II[:, 40] = 0, 0
    outlier_OI = w_OI.clone()
    outlier_OI[:, 40] += 0.5
    found, other = alone(w_OI, hessian_II, 4, 32), alone(outlier_OI, hessian_II, 4, 32)
    assert torch.isfinite(found.dequantize()).all()
    assert torch.equal(found.code_OI[:, :32], other.code_OI[:, :32])
    assert (found.dequantize()[:, 40] - w_OI[:, 40]).abs().max() < 1
    assert output_error(w_OI, found, hessian_II) < output_error(
        w_OI, round_to_nearest(w_OI, 4, 32), hessian_II
    )


def test_a_hessian_of_zeros_means_nearest_rounding(normal: MakeTensor) -> None:
    w_OI = normal(8, 64)
    found = alone(w_OI, torch.zeros(64, 64), 3, 32)
    assert torch.allclose(found.dequantize(), round_to_nearest(w_OI, 3, 32).dequantize(), atol=1e-6)


def test_a_hessian_of_rank_one_passes_and_its_one_direction_is_nearly_exact(normal: MakeTensor) -> None:
    w_OI, x_I = normal(16, 96), normal(96, seed=1)
    hessian_II = torch.outer(x_I, x_I)
    found = alone(w_OI, hessian_II, 3, 32)
    nearest = round_to_nearest(w_OI, 3, 32)
    assert output_error(w_OI, found, hessian_II) < 0.1 * output_error(w_OI, nearest, hessian_II)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_hessian_that_is_not_finite_is_refused(value: float) -> None:
    hessian_II = torch.eye(32)
    hessian_II[3, 4] = value
    with pytest.raises(SingularHessianError, match="NaN or infinite"):
        inverse_factor(hessian_II)


def test_an_indefinite_hessian_is_refused() -> None:
    hessian_II = torch.eye(32)
    hessian_II[0, 1] = hessian_II[1, 0] = 5
    with pytest.raises(SingularHessianError, match="not positive definite"):
        inverse_factor(hessian_II)


@pytest.mark.parametrize("columns", [1, 31, 33, 100, 130, 257])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_the_last_group_of_a_row_may_be_short(
    normal: MakeTensor, correlated: MakeTensor, columns: int, group_size: int
) -> None:
    w_OI, hessian_II = normal(6, columns), correlated(columns)
    found = alone(w_OI, hessian_II, 4, group_size)
    assert found.code_OI.shape == w_OI.shape
    assert found.scale_OG.shape == found.zero_OG.shape == (6, -(-columns // group_size))
    assert output_error(w_OI, found, hessian_II) < 0.05 * output_error(
        w_OI, Quantized(found.code_OI * 0, found.scale_OG, found.zero_OG * 0, 4, group_size), hessian_II
    )
