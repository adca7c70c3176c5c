"""The closed form: what it predicts unfitted, what few measurements make of it, and when it is not trusted."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from allocator.storage import Option
from api.services.usecases import plan_budget
from compressor.cuda.scaled_half import Operand
from compressor.lowrank.decompose import decompose
from compressor.lowrank.hessian import Curvature, row_errors
from profiler.documents.profile import Profile
from profiler.model.checkpoint import find_model
from profiler.model.layers import Layer, LoadedModel
from profiler.prediction.measurement import GridSettings, Measurement
from profiler.statistics.calibration import silent
from profiler.statistics.moments import InputMoment
from profiler.sweep.closed_form import (
    PRIOR_MEAN,
    ClosedForm,
    Corrected,
    corrected,
    first_measured,
    grid_constant,
    predictable,
    spectrum_option,
)
from profiler.sweep.run import ProfileSettings, build_profile
from profiler.sweep.sweep import WIDE, RowPrice, sweep_layer

GRID = GridSettings((2, 3, 4, 5, 6, 8), (0, 8, 16, 32), (32, 64, 128), (64,), (4,))
LAYER = Layer("q", 0, "q", 192, 192, False)
OPTIONS = GRID.options(LAYER)


def gaussian_layer(seed: int = 0) -> tuple[Tensor, Curvature]:
    """Normal weights and inputs whose energy falls over directions."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(192, 192, generator=generator)
    basis_II = torch.linalg.qr(torch.randn(192, 192, generator=generator)).Q
    hessian_II = (basis_II * torch.logspace(0, -2, 192)) @ basis_II.T
    return weight_OI, Curvature.of(hessian_II)


EVEN_O = torch.ones(192)
UNEVEN_O = torch.linspace(0.2, 1.8, 192)
"""What an error of each row counts."""


def errors_of(
    weight_OI: Tensor, curvature: Curvature, share_O: Tensor = EVEN_O
) -> tuple[ClosedForm, dict[Option, float]]:
    """The closed form of a layer, and the error of every option as truly measured."""
    signal = (share_O @ row_errors(weight_OI, weight_OI * 0, curvature.hessian_II)).item()
    found, form = {}, None
    for p, decomposition in decompose([weight_OI] * len(OPTIONS), curvature, OPTIONS, rounds=4):
        dense_OI = decomposition.dense()
        error_O = row_errors(weight_OI, dense_OI, curvature.hessian_II)
        found[OPTIONS[p]] = (share_O @ error_O).item() / signal
        if OPTIONS[p] == spectrum_option(OPTIONS):
            delta = Operand.of(weight_OI - dense_OI)
            form = ClosedForm.of(weight_OI, share_O, delta, curvature, signal, [8, 16, 32])
    assert form is not None
    return form, found


@pytest.fixture(scope="module", params=[EVEN_O, UNEVEN_O], ids=["even rows", "uneven rows"])
def measured(request: pytest.FixtureRequest) -> tuple[ClosedForm, dict[Option, float]]:
    return errors_of(*gaussian_layer(), request.param)


def log_ratios(predicted: Corrected, found: dict[Option, float]) -> dict[Option, float]:
    return {o: math.log(predicted.estimate(o).error / error) for o, error in found.items()}


def test_the_grid_constant_is_near_the_lloyd_max_bound_and_falls_four_times_a_bit() -> None:
    """A uniform grid of 2 bits on the normal distribution leaves 0.1188 at best; small groups fit themselves."""
    assert 0.1188 < grid_constant(2, 128) < 0.14
    assert grid_constant(2, 32) < grid_constant(2, 64) < grid_constant(2, 128)
    assert 3 < grid_constant(5, 64) / grid_constant(6, 64) < 4.5


def test_plain_errors_of_normal_weights_are_known_within_a_tenth_before_any_is_measured(
    measured: tuple[ClosedForm, dict[Option, float]],
) -> None:
    form, found = measured
    for option, error in found.items():
        if not option.rank and option.bits >= 3:
            expected = form.log_error(option) + form.features(option) @ PRIOR_MEAN
            assert abs(expected - math.log(error)) < 0.1


def test_five_measurements_predict_the_others() -> None:
    first, ratios, inside = first_measured(OPTIONS), [], []
    for seed in range(4):
        form, found = errors_of(*gaussian_layer(seed))
        predicted = corrected(form, [Measurement(o, found[o]) for o in first])
        for option, ratio in log_ratios(predicted, found).items():
            if option not in first:
                ratios.append(ratio)
                inside.append(abs(ratio) <= predicted.estimate(option).half_width)
    assert len(first) == 5
    assert np.sqrt(np.mean(np.square(ratios))) < 0.05
    assert 0.8 < np.mean(inside) < 1


def test_a_measured_option_is_predicted_as_it_was_measured(
    measured: tuple[ClosedForm, dict[Option, float]],
) -> None:
    form, found = measured
    predicted = corrected(form, [Measurement(o, found[o]) for o in first_measured(OPTIONS)])
    for option in first_measured(OPTIONS):
        assert abs(math.log(predicted.estimate(option).error / found[option])) < 0.03


def test_leave_one_out_is_the_error_of_a_fit_to_the_others(
    measured: tuple[ClosedForm, dict[Option, float]],
) -> None:
    form, found = measured
    known = [Measurement(o, found[o]) for o in first_measured(OPTIONS)]
    by_hand = []
    for left_out in known:
        without = corrected(form, [m for m in known if m is not left_out])
        by_hand.append(math.log(without.estimate(left_out.option).error / left_out.error))
    assert corrected(form, known).leave_one_out == pytest.approx(math.sqrt(np.mean(np.square(by_hand))))


def test_measurements_that_contradict_the_form_widen_its_intervals(
    measured: tuple[ClosedForm, dict[Option, float]],
) -> None:
    form, found = measured
    first = first_measured(OPTIONS)
    good = corrected(form, [Measurement(o, found[o]) for o in first])
    odd = corrected(form, [Measurement(o, found[o] * (4 if o.bits == 2 else 1)) for o in first])
    for option in set(OPTIONS) - set(first):
        assert odd.estimate(option).half_width > 2 * good.estimate(option).half_width


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        (
            GRID,
            [(2, 0, 64, 0), (3, 0, 64, 0), (4, 0, 64, 0), (3, 8, 64, 4), (3, 32, 64, 4)],
        ),
        (
            GridSettings((4, 8), (0, 16), (128,), (128,), (4,)),
            [(4, 0, 128, 0), (8, 0, 128, 0), (4, 16, 128, 4)],
        ),
        (GridSettings((2, 4), (0,), (32, 64), (64,), (4,)), [(2, 0, 64, 0), (4, 0, 64, 0)]),
        (
            GridSettings((2, 4), (0, 8), (64,), (64,), (4, 8)),
            [(2, 0, 64, 0), (4, 0, 64, 0), (2, 8, 64, 4), (2, 8, 64, 8), (4, 8, 64, 8)],
        ),
    ],
)
def test_what_is_measured_first(grid: GridSettings, expected: list[tuple[int, int, int, int]]) -> None:
    assert first_measured(grid.options(LAYER)) == [Option(*option) for option in expected]


def test_factors_of_more_bits_are_not_predicted() -> None:
    options = GridSettings((2, 4), (0, 8), (64,), (64,), (4, 8)).options(LAYER)
    assert {o.factor_bits for o in predictable(options)} == {0, 4}


def test_an_adaptive_sweep_measures_what_it_cannot_predict(tiny_llama: LoadedModel) -> None:
    """Every option has an error; what was not measured has an interval no wider than allowed."""
    (member,) = (m for m in tiny_llama.layers_of(0) if m.projection == "o_proj")
    x_nI = torch.randn(80, 64, generator=torch.Generator().manual_seed(1))
    moment, price = InputMoment(member, x_nI.T @ x_nI / 80, 80), RowPrice(1.0, torch.ones(member.rows))
    grid = GridSettings((2, 3, 4, 5), (0, 4, 8), (32, 64), (64,), (4,))
    sweeps = {
        adaptive: sweep_layer(tiny_llama, moment, price, grid, lambda *_: None, 1, adaptive)
        for adaptive in (False, True)
    }
    full = {m.option: m for m in sweeps[False].measurements}
    assert not any(m.half_width for m in full.values())
    assert [m.option for m in sweeps[True].measurements] == sorted(full)
    for m in sweeps[True].measurements:
        assert m.half_width <= WIDE
        if not m.half_width:
            assert m.error == pytest.approx(full[m.option].error, rel=0.03)


def test_a_layer_of_zeros_is_measured_in_full(tiny_llama: LoadedModel) -> None:
    (member,) = (m for m in tiny_llama.layers_of(0) if m.projection == "o_proj")
    tiny_llama.model.get_submodule(member.name).weight.data.zero_()
    moment, price = InputMoment(member, torch.eye(64), 80), RowPrice(1.0, torch.ones(member.rows))
    sweep = sweep_layer(tiny_llama, moment, price, GRID, lambda *_: None, 1, adaptive=True)
    assert sorted(m.option for m in sweep.measurements) == sorted(GRID.options(member))
    assert not any(m.half_width for m in sweep.measurements)
    assert sweep.leave_one_out is None


@pytest.fixture(scope="module")
def adaptive_profile(
    model_directory: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Profile:
    settings = ProfileSettings(
        tokens=640, ranks=(0, 4), group_sizes=(32, 64), factor_bits=(8,), rounds=1, adaptive=True
    )
    ref = find_model(str(model_directory("llama")))
    return build_profile(ref, tmp_path_factory.mktemp("adaptive") / "profile", settings, silent)


def test_an_adaptive_profile_plans_from_predictions_too(adaptive_profile: Profile) -> None:
    known = [m for found in adaptive_profile.measurements.values() for m in found]
    assert any(m.half_width for m in known)
    assert any(not m.half_width for m in known)
    for layer in adaptive_profile.menu.layers:
        assert len(layer.options) == len(adaptive_profile.measurements[layer.name]) + 1
    plan = plan_budget(adaptive_profile, "4.5bpw")
    assert plan.total_bytes <= plan.budget.bytes


def test_the_leave_one_out_error_of_every_layer_is_kept(
    adaptive_profile: Profile, tiny_profile: Callable[[str], Profile]
) -> None:
    for profile in (adaptive_profile, tiny_profile("llama")):
        for record in profile.document.layers.values():
            assert record.leave_one_out is not None
            assert 0 < record.leave_one_out < 0.5
