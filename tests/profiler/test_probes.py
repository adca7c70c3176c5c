"""Probes: the one constant that calibrates the prediction, and the width of its interval."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from allocator.storage import KEEP, Option
from compressor.lowrank.decompose import decompose
from compressor.lowrank.hessian import Curvature
from profiler.documents.profile import Profile
from profiler.evaluation.reference_configs import keeper, measure_probes, read_probe
from profiler.execution.writer import Writer
from profiler.model.checkpoint import find_model
from profiler.model.layers import LoadedModel, open_model
from profiler.prediction.calibration_factor import Gain, Probe, calibrate

CPU = torch.device("cpu")
STUDENT_95_1 = 6.313751514675043
STUDENT_95_2 = 2.919985580355516


def probe(ratio: float, noise: float = 0.0) -> Probe:
    return Probe(Option(3, 0, 64, 0), 0.5, 0.5 * ratio, 0.5 * ratio * noise)


def test_gain_is_the_geometric_mean_of_measured_over_predicted() -> None:
    assert calibrate([probe(1.0), probe(4.0)]).mean == pytest.approx(2.0)


def test_interval_by_hand() -> None:
    """ln ratios 0 and ln 4: mean ln 2, variance 2·ln²2, prediction variance 3·ln²2 at one degree of freedom."""
    width = STUDENT_95_1 * math.log(2) * math.sqrt(3)
    gain = calibrate([probe(1.0), probe(4.0)])
    assert gain.low == pytest.approx(2 * math.exp(-width))
    assert gain.high == pytest.approx(2 * math.exp(width))


def test_measurement_error_widens_the_interval() -> None:
    """Three equal ratios with 10 % noise each: only the noise is left."""
    gain = calibrate([probe(1.2, 0.1)] * 3)
    assert gain.mean == pytest.approx(1.2)
    assert gain.high == pytest.approx(1.2 * math.exp(STUDENT_95_2 * 0.1))


def test_probes_that_agree_and_have_no_noise_leave_no_interval() -> None:
    gain = calibrate([probe(1.3)] * 3)
    assert (gain.low, gain.mean, gain.high) == pytest.approx((1.3, 1.3, 1.3))


def test_without_probes_the_prediction_stands_and_may_be_off_by_two() -> None:
    assert calibrate([]) == Gain(1.0, 0.5, 2.0)


def test_a_probe_without_divergence_says_nothing() -> None:
    assert calibrate([probe(2.0), Probe(Option(8, 0, 64, 0), 1e-9, 0.0, 0.0)]).mean == pytest.approx(2.0)


def test_a_kept_probe_is_read_back_as_it_was(tiny_llama: LoadedModel, tmp_path: Path) -> None:
    layer = tiny_llama.layers[0]
    weight_OI, curvature = tiny_llama.weight(layer), Curvature.of(torch.eye(layer.columns))
    options = [Option(3, 0, 64, 0), Option(3, 0, 32, 0)]
    found = dict(decompose([weight_OI] * 2, curvature, options))
    with Writer() as writer:
        for decomposition in found.values():
            keeper(tmp_path, writer)(layer, decomposition)
    assert len(list(tmp_path.iterdir())) == 1, "only the probes' own options are kept"
    assert torch.equal(read_probe(tmp_path, layer, options[0], CPU), found[0].dense())


def test_exact_weights_measure_no_divergence(model_directory: Callable[[str], Path], tmp_path: Path) -> None:
    """A probe of weights that lie on its grid is the model itself."""
    loaded = open_model(find_model(str(model_directory("llama"))))
    option, tokens_NT = (
        Option(3, 0, 64, 0),
        torch.randint(128, (4, 32), generator=torch.Generator().manual_seed(1)),
    )
    with Writer() as writer:
        for layer in loaded.layers:
            curvature = Curvature.of(torch.eye(layer.columns))
            ((_, found),) = decompose([loaded.weight(layer)], curvature, [option])
            keeper(tmp_path, writer)(layer, found)
    with loaded.replacing(lambda layer: read_probe(tmp_path, layer, option, CPU)):
        (same,), kl_of_same = measure_probes(loaded, tokens_NT, {option: 0.1}, tmp_path, lambda *_: None)
    (other,), kl_of_other = measure_probes(loaded, tokens_NT, {option: 0.1}, tmp_path, lambda *_: None)
    assert same.measured_kl == pytest.approx(0, abs=1e-6)
    assert other.measured_kl > 1e-3
    for probe, kl_of in ((same, kl_of_same), (other, kl_of_other)):
        assert kl_of[option].shape == (4,)
        assert probe.measured_kl == pytest.approx(kl_of[option].mean().item(), rel=1e-9)


def test_a_profile_s_costs_are_error_times_sensitivity_times_correction_times_gain(
    tiny_profile: Callable[[str], Profile],
) -> None:
    profile = tiny_profile("llama")
    for layer in profile.menu.layers:
        record = profile.document.layers[layer.name]
        price = record.sensitivity * record.correction * profile.document.gain.mean
        errors = {m.option: m.error for m in profile.measurements[layer.name]} | {KEEP: 0.0}
        assert layer.options == tuple(errors)
        assert layer.error.tolist() == list(errors.values())
        assert layer.cost.tolist() == pytest.approx([error * price for error in errors.values()])
