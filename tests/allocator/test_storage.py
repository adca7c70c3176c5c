"""The planner's byte counts are the bytes of the tensors that the compressor writes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allocator.storage import KEEP, Option, factor_bytes, grid_bytes, head_rank, layer_bytes, packed_bytes
from compressor.lowrank.decompose import decompose
from compressor.lowrank.hessian import Curvature
from compressor.nn.linear import layer_tensors

WIDTHS = (2, 3, 4, 5, 6, 8)


@st.composite
def shapes_and_options(draw: st.DrawFn) -> tuple[int, int, Option]:
    height, columns = draw(st.integers(1, 70)), draw(st.integers(1, 300))
    bits = draw(st.sampled_from((0, *WIDTHS)))
    heads = 1 if bits else draw(st.integers(1, 4))
    rank = draw(st.integers(0 if bits else 1, min(height, columns, 12)))
    group_size = draw(st.sampled_from((32, 64, 128))) if bits else 0
    factor_bits = draw(st.sampled_from((4, 8, 16))) if rank else 0
    return heads * height, columns, Option(bits, rank, group_size, factor_bits, heads)


@given(shapes_and_options())
@settings(max_examples=60, deadline=None)
def test_layer_bytes_are_those_of_the_tensors_written(case: tuple[int, int, Option]) -> None:
    rows, columns, option = case
    w_OI = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    ((_, found),) = decompose([w_OI], Curvature.of(torch.eye(columns)), [option], rounds=1)
    written = sum(t.numel() * t.element_size() for t in layer_tensors(found).values())
    assert layer_bytes(rows, columns, option, original_bytes=0) == written


def test_a_kept_layer_takes_its_original_bytes() -> None:
    assert layer_bytes(10, 20, KEEP, original_bytes=321) == 321


def test_bytes_by_hand() -> None:
    """4 × 96 at 3 bits, groups of 64: 12 words of codes a row, 8 scales, 8 zero points in one run of 32."""
    assert packed_bytes(4, 96, 3) == 4 * 96 * 3 // 8 == 144
    assert grid_bytes(4, 96, 3, 64) == 144 + 8 * 2 + 12
    assert factor_bytes(4, 96, 2, 16) == 2 * 2 * (4 + 96)
    assert factor_bytes(4, 96, 2, 8) == (2 * 32 + 2 * 2 + 32) + (2 * 96 + 4 * 2 + 32)
    assert layer_bytes(4, 96, Option(3, 2, 64, 16), 0) == 172 + 400


def test_bytes_of_heads_by_hand() -> None:
    """Two heads of rank 3 in 8 × 96: six vectors of 4 and six of 96, the dense L of 8 × 6 nowhere."""
    assert factor_bytes(8, 96, 3, 16, heads=2) == 2 * 6 * (4 + 96)
    assert factor_bytes(8, 96, 3, 8, heads=2) == (6 * 32 + 6 * 2 + 32) + (6 * 96 + 12 * 2 + 32)


@pytest.mark.parametrize(("ratio", "rank"), [(1.0, 64), (0.9, 58), (0.5, 32), (0.001, 1)])
def test_a_head_ratio_is_a_share_of_a_head_s_full_rank_and_one_at_least(ratio: float, rank: int) -> None:
    assert head_rank(ratio, 6 * 64, 384, heads=6) == rank


def test_a_head_wider_than_its_input_has_the_input_s_rank() -> None:
    assert head_rank(1.0, 2 * 64, 48, heads=2) == 48


@given(
    rows=st.integers(1, 500),
    columns=st.integers(1, 5000),
    group_size=st.sampled_from((32, 64, 128)),
    bits=st.sampled_from(WIDTHS),
)
def test_overhead_is_a_scale_and_a_zero_per_group_and_less_than_a_run_of_padding_per_row(
    rows: int, columns: int, group_size: int, bits: int
) -> None:
    groups = rows * -(-columns // group_size)
    needed_bits = rows * columns * bits + groups * (16 + bits)
    padding_bits = 8 * grid_bytes(rows, columns, bits, group_size) - needed_bits
    assert 0 <= padding_bits < (rows + 1) * 32 * bits


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_more_bits_more_rank_and_wider_factors_always_cost_more(group_size: int) -> None:
    def size(bits: int, rank: int, factor_bits: int) -> int:
        return layer_bytes(200, 300, Option(bits, rank, group_size, factor_bits), 0)

    by_bits = [size(bits, 0, 0) for bits in WIDTHS]
    by_rank = [size(3, rank, 4) for rank in (0, 1, 2, 8, 64)]
    by_factor = [size(3, 8, factor_bits) for factor_bits in (4, 8, 16)]
    for sizes in (by_bits, by_rank, by_factor):
        assert sizes == sorted(set(sizes))
