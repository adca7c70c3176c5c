"""A profile that measured rotations: twins beside plain options, planned, carried out, kept from other runtimes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import torch
from transformers import AutoModelForCausalLM

from allocator.errors import ExportError
from allocator.plan import Plan
from allocator.storage import Option
from api.services.usecases import compress_plan, curve_points, plan_budget
from compressor.export import export
from compressor.nn.linear import CompressedLinear
from profiler.documents.profile import Profile, load_profile
from profiler.model.checkpoint import find_model, tensor_bytes
from profiler.model.layers import Layer
from profiler.prediction.measurement import GridSettings
from profiler.recovery.recovery import TrainableLinear
from profiler.statistics.calibration import silent
from profiler.sweep.closed_form import first_measured, predictable
from profiler.sweep.run import ProfileSettings, build_profile

SETTINGS = ProfileSettings(
    tokens=320, bits=(2, 3), ranks=(0, 4), group_sizes=(64,), factor_bits=(8,), rounds=1, rotations=True
)


@pytest.fixture(scope="module")
def profiles(
    model_directory: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Profile, Profile]:
    """With rotations and without."""
    folder, ref = tmp_path_factory.mktemp("rotations"), find_model(str(model_directory("llama")))
    return (
        build_profile(ref, folder / "rotated", SETTINGS, silent),
        build_profile(ref, folder / "plain", replace(SETTINGS, rotations=False), silent),
    )


@pytest.fixture(scope="module")
def carried_out(
    profiles: tuple[Profile, Profile], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Plan, Path]:
    """A plan with every input rotated, and its checkpoint."""
    folder, plan = tmp_path_factory.mktemp("rotated"), plan_budget(profiles[0], None, "uniform:3:rotated")
    plan.save(folder / "plan.json")
    compress_plan(folder / "plan.json", folder / "checkpoint", silent, profiles[0].path)
    return plan, folder / "checkpoint"


def test_every_option_without_rank_has_a_twin_and_all_else_is_as_without_the_flag(
    profiles: tuple[Profile, Profile],
) -> None:
    rotated, plain = profiles
    for name, measurements in rotated.measurements.items():
        beside = {m for m in measurements if m.option.rotated}
        assert {m.option for m in beside} == {
            replace(m.option, rotated=True) for m in plain.measurements[name] if not m.option.rank
        }
        assert {m for m in measurements if m not in beside} == set(plain.measurements[name])
        assert rotated.document.layers[name] == plain.document.layers[name]


def test_a_profile_without_the_flag_does_not_speak_of_rotations(profiles: tuple[Profile, Profile]) -> None:
    rotated, plain = profiles
    for profile, said in ((rotated, True), (plain, False)):
        assert ("rotat" in (profile.path / "profile.json").read_text()) == said
        assert ("rotat" in (profile.path / "request.json").read_text()) == said
        assert ("rotated" in parquet.read_schema(profile.path / "measurements.parquet").names) == said
        assert load_profile(profile.path).measurements == profile.measurements


def test_curves_compare_no_rotated_point_with_the_fit_of_plain_ones(
    profiles: tuple[Profile, Profile],
) -> None:
    points = curve_points(profiles[0])
    assert any(p.rotated for p in points)
    assert all((p.fitted_error is None) == p.rotated for p in points)


def test_the_closed_form_leaves_rotated_options_to_be_measured(tiny_layer_options: list[Option]) -> None:
    turned = {option for option in tiny_layer_options if option.rotated}
    assert turned and turned <= set(first_measured(tiny_layer_options))
    assert not turned & set(predictable(tiny_layer_options))


@pytest.fixture
def tiny_layer_options(profiles: tuple[Profile, Profile]) -> list[Option]:
    return [m.option for m in next(iter(profiles[0].measurements.values()))]


def test_the_checkpoint_takes_the_plan_s_bytes_and_loses_what_its_weights_lose(
    carried_out: tuple[Plan, Path], profiles: tuple[Profile, Profile]
) -> None:
    plan, checkpoint = carried_out
    assert all(layer.rotated for layer in plan.layers.values())
    assert tensor_bytes(checkpoint) == plan.total_bytes
    assert plan.total_bytes == plan_budget(profiles[0], None, "uniform:3").total_bytes
    compressed = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    folded = AutoModelForCausalLM.from_pretrained(plan.model.id, dtype=torch.float32)
    for name in plan.layers:
        folded.get_submodule(name).weight.data = compressed.get_submodule(name).dense_weight()
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert torch.allclose(compressed(ids).logits, folded(ids).logits, atol=1e-3)


def test_recovery_trains_the_layer_that_is_served(carried_out: tuple[Plan, Path]) -> None:
    compressed = AutoModelForCausalLM.from_pretrained(carried_out[1], dtype=torch.float32)
    layer = next(m for m in compressed.modules() if isinstance(m, CompressedLinear))
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(TrainableLinear(layer)(x), layer(x), atol=1e-4)


def test_no_target_but_this_product_plans_rotations(profiles: tuple[Profile, Profile]) -> None:
    for target, rotates in (("transformers", True), ("gptqmodel", False)):
        plan = plan_budget(profiles[0], "50%", target=target)
        assert any(layer.rotated for layer in plan.layers.values()) == rotates


def test_exporting_the_weights_is_refused_before_anything_is_written(
    carried_out: tuple[Plan, Path], tmp_path: Path
) -> None:
    plan, checkpoint = carried_out
    with pytest.raises(ExportError, match="rotates the inputs of 14 layers"):
        export(plan, checkpoint, tmp_path / "served", silent)
    assert not any(tmp_path.iterdir())


def test_layers_without_a_rotation_have_no_twins() -> None:
    grid = GridSettings((3,), (0,), (64,), (64,), (4,), rotations=True)
    assert not any(o.rotated for o in grid.options(Layer("odd", 0, "odd", 64, 99, False)))
    assert any(o.rotated for o in grid.options(Layer("even", 0, "even", 64, 96, False)))
