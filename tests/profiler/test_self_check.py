"""The profile's check of itself: corrections sum to what was measured, and the gain covers what plans scatter."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiler.documents.profile import CheckedPlan, PartProbe
from profiler.model.layers import Layer
from profiler.sweep.self_check import LARGEST_CORRECTION, WIDEST, checked_gain, class_of, corrections

PROJECTIONS = ("q_proj", "up_proj", "down_proj")
BLOCKS = 3
LAYERS = [
    Layer(f"model.layers.{block}.{projection}", block, projection, 64, 64, False)
    for block in range(BLOCKS)
    for projection in PROJECTIONS
]
factors = st.lists(st.floats(0.5, 2.0), min_size=3, max_size=3)


def parts_of(cost: dict[str, float], raw: dict[str, float], error: float = 0.0) -> list[PartProbe]:
    """What every class and block costs, were these the costs of layers."""
    kinds = [("class", name) for name in PROJECTIONS] + [("block", str(block)) for block in range(BLOCKS)]

    def sum_of(values: dict[str, float], kind: str, name: str) -> float:
        return sum(
            values[layer.name]
            for layer in LAYERS
            if name == (layer.projection if kind == "class" else str(layer.block))
        )

    return [
        PartProbe(
            kind=kind,
            name=name,
            predicted_kl=sum_of(raw, kind, name),
            measured_kl=sum_of(cost, kind, name),
            standard_error=error,
        )
        for kind, name in kinds
    ]


def plan(measured: float, predicted: float, error: float = 0.0) -> CheckedPlan:
    return CheckedPlan(
        total_bytes=1000,
        bits_per_weight=3.0,
        predicted_kl=predicted,
        measured_kl=measured,
        standard_error=error,
        uniform_kl=None,
        difference=None,
        difference_error=None,
    )


@given(raw=st.lists(st.floats(0.01, 1.0), min_size=9, max_size=9), by_class=factors, by_block=factors)
def test_corrected_prices_have_the_shares_that_were_measured(
    raw: list[float], by_class: list[float], by_block: list[float]
) -> None:
    price = {layer.name: cost for layer, cost in zip(LAYERS, raw, strict=True)}
    truth = {
        layer.name: price[layer.name] * by_class[PROJECTIONS.index(layer.projection)] * by_block[layer.block]
        for layer in LAYERS
    }
    factor = corrections(LAYERS, price, parts_of(truth, price))
    gain = sum(truth.values()) / sum(price.values())
    corrected = {name: factor[name] * gain * cost for name, cost in price.items()}
    for measured, found in zip(parts_of(truth, price), parts_of(corrected, price), strict=True):
        assert found.measured_kl == pytest.approx(measured.measured_kl, rel=0.01)


def test_what_was_measured_within_its_error_corrects_nothing() -> None:
    price = {layer.name: 0.1 for layer in LAYERS}
    truth = {layer.name: 0.1 * (2.0 if layer.block else 0.5) for layer in LAYERS}
    factor = corrections(LAYERS, price, parts_of(truth, price, error=1.0))
    assert set(factor.values()) == {1.0}


def test_no_correction_is_larger_than_its_bound() -> None:
    price = {layer.name: 0.1 for layer in LAYERS}
    truth = {layer.name: 100.0 if layer.projection == "q_proj" else 1e-3 for layer in LAYERS}
    found = corrections(LAYERS, price, parts_of(truth, price)).values()
    assert min(found) >= 1 / LARGEST_CORRECTION
    assert max(found) <= LARGEST_CORRECTION


def test_experts_of_one_place_are_one_class() -> None:
    layers = [Layer("", 0, f"mlp.experts.{k}.up_proj", 8, 8, False) for k in (0, 17)]
    assert len({class_of(layer) for layer in layers}) == 1


@given(ratios=st.lists(st.floats(0.2, 5.0), min_size=2, max_size=4))
def test_the_interval_covers_its_plans_or_says_that_they_disagree(ratios: list[float]) -> None:
    gain, agree = checked_gain([plan(ratio, 1.0) for ratio in ratios])
    assert gain.high / gain.low <= WIDEST * (1 + 1e-9)
    assert gain.mean == pytest.approx(math.exp(sum(map(math.log, ratios)) / len(ratios)))
    if agree:
        assert all(gain.low * (1 - 1e-9) <= ratio <= gain.high * (1 + 1e-9) for ratio in ratios)


def test_plans_that_scatter_by_ten_do_not_agree() -> None:
    _, agree = checked_gain([plan(1.0, 1.0), plan(10.0, 1.0)])
    assert not agree


def test_what_a_measurement_does_not_know_widens_the_interval() -> None:
    sure, _ = checked_gain([plan(1.0, 1.0), plan(1.1, 1.0), plan(1.05, 1.0)])
    unsure, _ = checked_gain([plan(1.0, 1.0, 0.1), plan(1.1, 1.0, 0.1), plan(1.05, 1.0, 0.1)])
    assert unsure.high / unsure.low > sure.high / sure.low
