"""The fitted error: known parameters come back, and it never rises with bits or rank."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocator.storage import Option
from profiler.prediction.error_model import ErrorModel, fit_error_model
from profiler.prediction.measurement import Measurement

N = 256
BITS, RANKS, SIZES = (2, 3, 4, 5, 6, 8), (4, 8, 16, 32, 64, 128), (32, 64, 128)


def true_model(c: float, beta: float, r0: float, delta: float, eta: float) -> ErrorModel:
    return ErrorModel(c, beta, r0, delta, eta, N, {32: 0.8, 64: 1.0, 128: 1.3}, 1.0, 1.0)


def grid() -> list[Option]:
    plain = [Option(bits, 0, size, 0) for bits in BITS for size in SIZES]
    return plain + [Option(bits, rank, 64, 4) for bits in BITS for rank in RANKS]


def measure(model: ErrorModel, noise: float = 0.0, seed: int = 0) -> list[Measurement]:
    """The model's own errors on the grid, with log-normal noise."""
    generator = np.random.default_rng(seed)
    return [
        Measurement(o, model.error(o.bits, o.rank, o.group_size) * math.exp(noise * generator.normal()))
        for o in grid()
    ]


@pytest.mark.parametrize("beta", [1.5, 2.0, 2.6])
@pytest.mark.parametrize(("r0", "delta", "eta"), [(8.0, 0.5, 1.0), (60.0, 1.5, 0.3), (30.0, 0.2, 2.0)])
def test_known_parameters_come_back(beta: float, r0: float, delta: float, eta: float) -> None:
    model = true_model(1.7, beta, r0, delta, eta)
    fit = fit_error_model(measure(model), N)
    assert fit.r_squared > 0.9999
    assert fit.c == pytest.approx(1.7, rel=0.01)
    assert fit.beta == pytest.approx(beta, rel=0.01)
    assert fit.group_factors == pytest.approx(model.group_factors, rel=0.01)
    assert (fit.delta, fit.eta) == pytest.approx((delta, eta), rel=0.1)
    for option in (Option(3, 24, 64), Option(7, 100, 64), Option(2, 2, 128)):
        expected = model.error(option.bits, option.rank, option.group_size)
        assert fit.error(option.bits, option.rank, option.group_size) == pytest.approx(expected, rel=0.01)


def test_noise_of_three_percent_leaves_an_r_squared_above_0_999() -> None:
    fit = fit_error_model(measure(true_model(1.0, 2.0, 20.0, 0.6, 1.0), noise=0.03), N)
    assert fit.r_squared > 0.999
    assert fit.beta == pytest.approx(2.0, rel=0.02)
    assert 1 < fit.worst_ratio < 1.2


def test_one_wild_measurement_does_not_move_the_fit() -> None:
    measured = measure(true_model(1.0, 2.0, 20.0, 0.6, 1.0))
    measured[5] = Measurement(measured[5].option, measured[5].error * 20)
    fit = fit_error_model(measured, N)
    assert fit.beta == pytest.approx(2.0, rel=0.02)
    assert fit.worst_ratio > 10


@given(noise=st.floats(0, 1.5), seed=st.integers(0, 50))
@settings(max_examples=25, deadline=None)
def test_the_fit_never_rises_with_bits_or_rank_however_noisy_the_measurements(
    noise: float, seed: int
) -> None:
    fit = fit_error_model(measure(true_model(1.0, 1.0, 20.0, 0.1, 0.1), noise, seed), N)
    for bits in (2, 3, 4, 6, 8):
        along_rank = [fit.error(bits, rank, 64) for rank in (0, 1, 2, 8, 32, 128, 200, N)]
        assert along_rank == sorted(along_rank, reverse=True)
        assert fit.error(bits + 1, 0, 64) <= fit.error(bits, 0, 64)


def test_full_rank_leaves_no_error_where_the_spectrum_ends() -> None:
    assert true_model(1.0, 2.0, 20.0, 0.6, 1.0).error(2, N, 64) == 0


def test_a_group_size_never_measured_counts_as_the_nearest() -> None:
    model = true_model(1.0, 2.0, 20.0, 0.6, 1.0)
    assert model.error(3, 0, 256) == model.error(3, 0, 128)
    assert model.error(3, 0, 16) == model.error(3, 0, 32)


def test_without_ranks_the_bits_alone_are_fitted() -> None:
    measured = [m for m in measure(true_model(1.0, 2.0, 20.0, 0.6, 1.0)) if m.option.rank == 0]
    fit = fit_error_model(measured, N)
    assert fit.r_squared > 0.9999
    assert fit.beta == pytest.approx(2.0, rel=0.01)


def test_one_width_alone_is_fitted_through_its_point() -> None:
    fit = fit_error_model([Measurement(Option(3, 0, 64, 0), 0.02)], N)
    assert fit.error(3, 0, 64) == pytest.approx(0.02, rel=0.01)


def test_a_layer_without_error_has_a_model_without_error() -> None:
    """A matrix of zeros, which some checkpoints have, is exact under every option."""
    fit = fit_error_model([Measurement(option, 0.0) for option in grid()], N)
    assert fit.error(2, 0, 64) == 0
    assert fit.r_squared == 1
