"""When a measured difference counts."""

from __future__ import annotations

import pytest

from allocator.measured_outcome import verdict


@pytest.mark.parametrize(
    ("difference", "error", "expected"),
    [
        (-0.10, 0.01, "better"),
        (0.10, 0.01, "worse"),
        (0.015, 0.01, "equal"),
        (-0.015, 0.01, "equal"),
        (0.0, 0.0, "equal"),
        (None, None, "nothing to compare"),
    ],
)
def test_a_difference_counts_where_it_exceeds_the_measurement_s_own_error(
    difference: float | None, error: float | None, expected: str
) -> None:
    assert verdict(difference, error) == expected
