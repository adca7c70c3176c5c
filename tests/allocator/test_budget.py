"""The budget grammar: what may be written, what it means in bytes, and what a mistake is answered with."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.budget import parse_budget
from allocator.errors import BudgetSyntaxError

ORIGINAL, KEPT, WEIGHTS = 1_000_003, 200_001, 400_001


def total(text: str) -> int:
    return parse_budget(text).total_bytes(ORIGINAL, KEPT, WEIGHTS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("700MiB", 700 * 2**20),
        ("1.5GB", 1_500_000_000),
        ("12KiB", 12_288),
        ("3TB", 3 * 10**12),
        ("0.5TiB", 2**39),
        ("123456B", 123_456),
        ("9kb", 9_000),
        ("25%", 250_000),
        ("100%", ORIGINAL),
        ("3.25bpw", KEPT + 162_500),
        ("2BPW", KEPT + 100_000),
        (".5MB", 500_000),
        ("7.MB", 7_000_000),
        ("  45 %  ", 450_001),
    ],
)
def test_meaning_in_bytes(text: str, expected: int) -> None:
    assert total(text) == expected


def test_a_budget_remembers_how_it_was_written() -> None:
    assert parse_budget(" 3.25 bpw ").text == "3.25 bpw"


def test_decimals_are_exact() -> None:
    assert parse_budget("0.1GB").amount == Decimal("0.1")
    assert total("0.1GB") == 100_000_000


@given(st.decimals(min_value="0.01", max_value="99.99", places=2))
def test_percentages_are_rounded_down(percent: Decimal) -> None:
    assert 0 <= percent * ORIGINAL / 100 - total(f"{percent}%") < 1


@given(st.decimals(min_value="0.01", max_value="16", places=2))
def test_bits_per_weight_are_over_compressible_weights_and_leave_the_kept_tensors_out(bits: Decimal) -> None:
    assert 0 <= bits * WEIGHTS / 8 - (total(f"{bits}bpw") - KEPT) < 1


@pytest.mark.parametrize(
    "text", ["", "  ", "700", "MiB", "-3MiB", "3..2GB", "1e3MB", "three bpw", "3 4 MB", "%25"]
)
def test_what_is_not_a_number_with_a_unit_is_refused_with_advice(text: str) -> None:
    with pytest.raises(BudgetSyntaxError, match="not a number with a unit; write it like 700MiB"):
        parse_budget(text)


@pytest.mark.parametrize("text", ["700mibs", "3parsec", "1Gib2", "5bits", "2M"])
def test_an_unknown_unit_is_named(text: str) -> None:
    with pytest.raises(BudgetSyntaxError):
        parse_budget(text)
    with pytest.raises(BudgetSyntaxError, match="unknown unit 'parsec'"):
        parse_budget("3parsec")


@pytest.mark.parametrize("text", ["0MiB", "0%", "0.0bpw", "1000000000000000000TB"])
def test_nothing_and_too_much_are_out_of_range(text: str) -> None:
    with pytest.raises(BudgetSyntaxError, match="out of range"):
        parse_budget(text)


@given(st.text(max_size=12))
def test_any_text_is_read_or_refused_by_name(text: str) -> None:
    try:
        budget = parse_budget(text)
    except BudgetSyntaxError:
        return
    assert budget.total_bytes(ORIGINAL, KEPT, WEIGHTS) >= 0
