"""Codes survive packing and cost exactly their bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from allocator.storage import packed_bytes
from compressor.packing import PLANES, pack, unpack, unpack_at

WIDTHS = (2, 3, 4, 5, 6, 8)


def random_codes(rows: int, columns: int, bits: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2**bits, (rows, columns), generator=generator, dtype=torch.uint8)


@given(
    bits=st.sampled_from(WIDTHS), rows=st.integers(1, 9), columns=st.integers(1, 200), seed=st.integers(0, 99)
)
def test_unpacking_gives_back_what_was_packed(bits: int, rows: int, columns: int, seed: int) -> None:
    code_OI = random_codes(rows, columns, bits, seed)
    assert torch.equal(unpack(pack(code_OI, bits), bits, columns), code_OI)


@given(bits=st.sampled_from(WIDTHS), columns=st.integers(1, 200), seed=st.integers(0, 99))
def test_codes_at_some_places_are_those_of_the_whole_row(bits: int, columns: int, seed: int) -> None:
    code_1I = random_codes(1, columns, bits, seed)
    place = torch.randint(columns, (3, 5), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(unpack_at(pack(code_1I, bits)[0], bits, place), code_1I[0, place])


@pytest.mark.parametrize("bits", WIDTHS)
def test_largest_codes_survive(bits: int) -> None:
    code_OI = torch.full((2, 65), 2**bits - 1, dtype=torch.uint8)
    assert torch.equal(unpack(pack(code_OI, bits), bits, 65), code_OI)


@given(bits=st.sampled_from(WIDTHS), rows=st.integers(1, 9), columns=st.integers(1, 200))
def test_packed_size_is_what_the_planner_counts(bits: int, rows: int, columns: int) -> None:
    packed = pack(random_codes(rows, columns, bits, 0), bits)
    assert packed.numel() * packed.element_size() == packed_bytes(rows, columns, bits)


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_width_costs_exactly_that_many_bits_when_runs_are_whole(bits: int) -> None:
    assert packed_bytes(7, 96, bits) * 8 == 7 * 96 * bits


@pytest.mark.parametrize("bits", WIDTHS)
def test_no_code_straddles_two_words(bits: int) -> None:
    assert sum(PLANES[bits]) == bits
    assert all(32 % width == 0 for width in PLANES[bits])


def test_layout_of_three_bits_is_a_plane_of_two_low_bits_then_one_of_the_high_bit() -> None:
    code_OI = torch.zeros(1, 32, dtype=torch.uint8)
    code_OI[0, 0], code_OI[0, 17], code_OI[0, 31] = 0b001, 0b110, 0b100
    assert pack(code_OI, 3).tolist() == [[0b01, 0b10 << 2, -(2**31) + 2**17]]


def test_rows_are_packed_independently() -> None:
    code_OI = random_codes(5, 40, 5, 1)
    together = pack(code_OI, 5)
    assert all(torch.equal(together[i : i + 1], pack(code_OI[i : i + 1], 5)) for i in range(5))
