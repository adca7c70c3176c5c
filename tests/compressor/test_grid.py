"""Grids: never worse than plain min/max rounding, exact where they can be, finite everywhere."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressor.quantize.gptq import round_to_nearest

WIDTHS = (2, 3, 4, 5, 6, 8)


def plain_min_max(w_OI: Tensor, bits: int, group_size: int) -> Tensor:
    """Asymmetric rounding between each group's extremes, with a bfloat16 scale and an integer zero point."""
    rows, columns = w_OI.shape
    w_gR = w_OI.reshape(rows, columns // group_size, group_size)
    low = w_gR.amin(-1, keepdim=True).clamp(max=0)
    high = w_gR.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).bfloat16().float().clamp(min=1e-30)
    zero = (-low / scale).round().clamp(0, 2**bits - 1)
    code = ((w_gR / scale).round() + zero).clamp(0, 2**bits - 1)
    return ((code - zero) * scale).reshape(rows, columns)


@given(
    bits=st.sampled_from(WIDTHS),
    group_size=st.sampled_from((32, 64, 128)),
    shift=st.floats(-3, 3),
    heaviness=st.sampled_from((1, 3)),
    magnitude=st.sampled_from((1e-4, 0.02, 1.0, 300.0)),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=150, deadline=None)
def test_searched_grid_is_never_worse_than_plain_min_max(
    bits: int, group_size: int, shift: float, heaviness: int, magnitude: float, seed: int
) -> None:
    w_OI = torch.randn(3, 256, generator=torch.Generator().manual_seed(seed)) ** heaviness
    w_OI = (w_OI + shift) * magnitude
    searched = round_to_nearest(w_OI, bits, group_size).dequantize()
    error = (searched - w_OI).reshape(-1, group_size).square().sum(-1)
    plain = (plain_min_max(w_OI, bits, group_size) - w_OI).reshape(-1, group_size).square().sum(-1)
    assert (error <= plain * (1 + 1e-4) + 1e-12 * magnitude**2).all()


@given(bits=st.sampled_from(WIDTHS), columns=st.integers(1, 200), seed=st.integers(0, 1000))
@settings(deadline=None)
def test_a_value_within_the_grid_s_range_moves_by_at_most_half_a_step(
    bits: int, columns: int, seed: int
) -> None:
    w_OI = torch.randn(4, columns, generator=torch.Generator().manual_seed(seed))
    found = round_to_nearest(w_OI, bits, 64)
    scale_OI = found.scale_OG.float().repeat_interleave(64, dim=1)[:, :columns]
    zero_OI = found.zero_OG.float().repeat_interleave(64, dim=1)[:, :columns]
    low_OI, high_OI = -zero_OI * scale_OI, (2**bits - 1 - zero_OI) * scale_OI
    inside = (w_OI >= low_OI) & (w_OI <= high_OI)
    assert columns < 32 or inside.float().mean() > 0.5
    assert ((found.dequantize() - w_OI).abs() <= scale_OI * (0.5 + 1e-4))[inside].all()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("value", [0.0, 0.37, -5.0, 1e-9, -1e9])
def test_a_constant_group_is_kept_to_the_precision_of_its_scale(bits: int, value: float) -> None:
    found = round_to_nearest(torch.full((2, 64), value), bits, 64).dequantize()
    assert ((found - value).abs() <= abs(value) * 2**-8).all()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("value", [1e-30, -1e-30, 1e30, -1e30])
def test_a_constant_group_whose_squares_leave_float32_is_kept_to_a_step(bits: int, value: float) -> None:
    found = round_to_nearest(torch.full((2, 64), value), bits, 64).dequantize()
    assert ((found - value).abs() <= abs(value) * (2**-8 + 1 / (2**bits - 1))).all()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("magnitude", [1e-38, 1e-30, 1e-20, 1e20, 1e30])
def test_groups_of_extreme_magnitude_stay_finite(bits: int, magnitude: float) -> None:
    w_OI = torch.randn(4, 128, generator=torch.Generator().manual_seed(0)) * magnitude
    found = round_to_nearest(w_OI, bits, 64)
    assert torch.isfinite(found.dequantize()).all()
    assert torch.isfinite(found.scale_OG.float()).all()


@pytest.mark.parametrize("bits", WIDTHS)
def test_weights_that_lie_on_a_grid_come_back_exactly(bits: int) -> None:
    code_OI = torch.randint(2**bits, (4, 64), generator=torch.Generator().manual_seed(1)).float()
    code_OI[:, 0], code_OI[:, 1] = 0, 2**bits - 1
    w_OI = (code_OI - 2 ** (bits - 1)) * 0.125
    assert torch.equal(round_to_nearest(w_OI, bits, 64).dequantize(), w_OI)


def test_short_last_group_is_not_bent_by_its_padding() -> None:
    w_OI = torch.randn(3, 100, generator=torch.Generator().manual_seed(2)) + 5
    found = round_to_nearest(w_OI, 4, 64)
    alone = round_to_nearest(w_OI[:, 64:], 4, 36)
    assert found.scale_OG.shape == (3, 2)
    assert torch.equal(found.dequantize()[:, 64:], alone.dequantize())


def test_at_two_bits_the_search_takes_a_third_off_plain_min_max_on_normal_weights() -> None:
    w_OI = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    error = (round_to_nearest(w_OI, 2, 64).dequantize() - w_OI).square().sum()
    assert error < 2 / 3 * (plain_min_max(w_OI, 2, 64) - w_OI).square().sum()
