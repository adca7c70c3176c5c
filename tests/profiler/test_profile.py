"""The profile directory: reproducible, resumable layer by layer, and never mistaken for another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from allocator.storage import KEEP
from api.services.usecases import compress_plan, plan_budget
from profiler.documents.profile import Profile, ProfileError, load_profile
from profiler.model.checkpoint import find_model, tensor_bytes
from profiler.statistics.calibration import silent
from profiler.sweep.run import ProfileSettings, build_profile

SMALL = ProfileSettings(
    tokens=320, bits=(2, 3, 4), ranks=(0, 4), group_sizes=(64,), factor_bits=(8,), rounds=1
)
BUDGETS = ("2.5bpw", "3.0bpw", "3.3bpw", "4.3bpw", "45%")


@pytest.fixture(scope="module")
def llama(model_directory: Callable[[str], Path]) -> Path:
    return model_directory("llama")


@pytest.fixture(scope="module")
def profiled(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("profile") / "profile"
    build_profile(find_model(str(llama)), output, SMALL, silent)
    return output


def digests(folder: Path) -> dict[str, str]:
    return {file.name: sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def carried_out(profile: Path, folder: Path, budget: str = "3.3bpw") -> Path:
    """The folder with the plan and its checkpoint."""
    folder.mkdir()
    plan_budget(load_profile(profile), budget).save(folder / "plan.json")
    compress_plan(folder / "plan.json", folder / "checkpoint", silent, profile)
    return folder


@pytest.mark.parametrize("budget", BUDGETS)
def test_checkpoint_takes_the_plan_s_bytes_at_every_budget(
    profiled: Path, tmp_path: Path, budget: str
) -> None:
    plan = plan_budget(load_profile(profiled), budget)
    folder = carried_out(profiled, tmp_path / "out", budget)
    assert tensor_bytes(folder / "checkpoint") == plan.total_bytes <= plan.budget.bytes


def test_a_bfloat16_model_keeps_its_dtype_its_bytes_and_its_logits(llama: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(llama).bfloat16().save_pretrained(tmp_path / "model")
    build_profile(find_model(str(tmp_path / "model")), tmp_path / "profile", SMALL, silent)
    plan = plan_budget(load_profile(tmp_path / "profile"), "2.5bpw")
    folder = carried_out(tmp_path / "profile", tmp_path / "out", "2.5bpw")
    assert tensor_bytes(folder / "checkpoint") == plan.total_bytes
    assert sum(plan.kept.values()) * 2 == sum(
        t.numel() * 4
        for n, t in AutoModelForCausalLM.from_pretrained(llama).state_dict().items()
        if n in plan.kept
    )
    loaded = AutoModelForCausalLM.from_pretrained(folder / "checkpoint")
    wide = AutoModelForCausalLM.from_pretrained(folder / "checkpoint", dtype=torch.float32)
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        narrow_logits, wide_logits = loaded(tokens).logits, wide(tokens).logits
    assert narrow_logits.dtype == torch.bfloat16
    assert (narrow_logits.float() - wide_logits).norm() < 0.05 * wide_logits.norm()


def test_two_runs_from_nothing_give_the_same_bytes(llama: Path, profiled: Path, tmp_path: Path) -> None:
    """Profile, plan and checkpoint: every file."""
    build_profile(find_model(str(llama)), tmp_path / "profile", SMALL, silent)
    assert digests(tmp_path / "profile") == digests(profiled)
    first, second = carried_out(profiled, tmp_path / "1"), carried_out(tmp_path / "profile", tmp_path / "2")
    assert (first / "plan.json").read_bytes() == (second / "plan.json").read_bytes()
    assert digests(first / "checkpoint") == digests(second / "checkpoint")
    assert len(digests(first / "checkpoint")) >= 5


def test_another_seed_measures_on_other_tokens(llama: Path, profiled: Path, tmp_path: Path) -> None:
    other = build_profile(find_model(str(llama)), tmp_path / "profile", replace(SMALL, seed=1), silent)
    assert other.document.calibration.sha256 != load_profile(profiled).document.calibration.sha256


@pytest.mark.parametrize("stage", ["sampling calibration text", "gradients", "sweep", "measuring probes"])
def test_an_interrupted_run_resumes_to_the_same_profile(
    llama: Path, profiled: Path, tmp_path: Path, stage: str
) -> None:
    def interrupt(current: str, done: int, total: int) -> None:
        if current == stage and done >= total // 2 and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_profile(find_model(str(llama)), tmp_path / "profile", SMALL, interrupt)
    with pytest.raises(ProfileError, match="unfinished"):
        load_profile(tmp_path / "profile")
    build_profile(find_model(str(llama)), tmp_path / "profile", SMALL, silent)
    assert digests(tmp_path / "profile") == digests(profiled)


def test_resuming_measures_only_what_is_missing(llama: Path, tmp_path: Path) -> None:
    reached: list[int] = []

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "sweep":
            reached.append(done)
            if done >= 9:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_profile(find_model(str(llama)), tmp_path / "profile", SMALL, interrupt)
    reached.clear()
    kept = list((tmp_path / "profile" / ".work" / "layers").iterdir())
    assert 9 <= len(kept) < 14
    build_profile(
        find_model(str(llama)),
        tmp_path / "profile",
        SMALL,
        lambda stage, done, total: reached.append(done) if stage == "sweep" else None,
    )
    assert reached[0] == len(kept)
    assert reached[-1] == 14


def test_a_finished_profile_of_the_same_request_is_returned_untouched(llama: Path, profiled: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in profiled.iterdir()}
    again = build_profile(find_model(str(llama)), profiled, SMALL, silent)
    assert again.sha256 == load_profile(profiled).sha256
    assert {file: file.stat().st_mtime_ns for file in profiled.iterdir()} == before


def test_a_finished_profile_of_another_request_is_not_overwritten(llama: Path, profiled: Path) -> None:
    with pytest.raises(ProfileError, match="already holds another profile"):
        build_profile(find_model(str(llama)), profiled, replace(SMALL, seed=9), silent)


def test_an_unfinished_profile_of_another_request_is_started_over(
    llama: Path, profiled: Path, tmp_path: Path
) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "sweep" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_profile(find_model(str(llama)), tmp_path / "profile", replace(SMALL, seed=4), interrupt)
    build_profile(find_model(str(llama)), tmp_path / "profile", SMALL, silent)
    assert digests(tmp_path / "profile") == digests(profiled)


def test_foreign_files_are_left_alone(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ProfileError, match="not empty"):
        build_profile(find_model(str(llama)), tmp_path, SMALL, silent)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_finished_profile_has_no_work_left_in_it(profiled: Path) -> None:
    assert sorted(file.name for file in profiled.iterdir()) == [
        "calibration.safetensors",
        "fidelity.json",
        "measurements.parquet",
        "profile.json",
        "request.json",
        "spectrum.json",
        "tables.json",
        "token_weights.safetensors",
    ]


def test_a_menu_offers_every_measured_option_and_keeping_and_adds_up_to_the_original(
    llama: Path, profiled: Path
) -> None:
    menu = load_profile(profiled).menu
    assert menu.original_bytes == tensor_bytes(llama)
    assert all(layer.options[-1] == KEEP for layer in menu.layers)
    assert all(len(layer.options) == 3 + 3 + 1 for layer in menu.layers)


def test_windows_held_back_for_probes_are_not_calibrated_on(profiled: Path) -> None:
    profile: Profile = load_profile(profiled)
    record = profile.document.calibration
    assert profile.calibration_tokens().shape == (record.windows, record.window_tokens)
    assert record.probe_windows >= 1
    assert (record.windows + record.probe_windows) * record.window_tokens == SMALL.tokens


def test_a_profile_keeps_what_every_token_weighs_for_every_layer(profiled: Path) -> None:
    profile = load_profile(profiled)
    tokens_NT, weights = profile.calibration()
    assert torch.equal(tokens_NT, profile.calibration_tokens())
    assert weights is not None
    assert weights.tokens == tokens_NT.numel()
    assert set(weights.by_layer) == set(profile.document.layers)


def test_a_profile_of_an_earlier_version_weighs_tokens_evenly_and_says_so(
    profiled: Path, tmp_path: Path
) -> None:
    shutil.copytree(profiled, tmp_path / "profile")
    (tmp_path / "profile" / "token_weights.safetensors").unlink()
    profile = load_profile(tmp_path / "profile")
    assert profile.calibration()[1] is None
    assert any("made by an earlier version" in warning for warning in profile.warnings)
    folder = carried_out(tmp_path / "profile", tmp_path / "out")
    plan = plan_budget(profile, "3.3bpw")
    assert tensor_bytes(folder / "checkpoint") == plan.total_bytes


def test_a_damaged_measurement_table_is_noticed(profiled: Path, tmp_path: Path) -> None:
    shutil.copytree(profiled, tmp_path / "profile")
    table = tmp_path / "profile" / "measurements.parquet"
    table.write_bytes(table.read_bytes()[:-20])
    with pytest.raises(ProfileError, match="does not match profile.json"):
        load_profile(tmp_path / "profile")


def test_a_newer_schema_asks_for_an_upgrade(profiled: Path, tmp_path: Path) -> None:
    shutil.copytree(profiled, tmp_path / "profile")
    file = tmp_path / "profile" / "profile.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema_version": 99, "novelty": []}))
    with pytest.raises(ProfileError, match="profile schema 99, this version reads up to 1; upgrade bitrank"):
        load_profile(tmp_path / "profile")


def test_a_matrix_of_zeros_goes_the_whole_road(llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.model.layers[1].mlp.up_proj.weight.data.zero_()
    model.save_pretrained(tmp_path / "model")
    profile = build_profile(find_model(str(tmp_path / "model")), tmp_path / "profile", SMALL, silent)
    assert profile.document.layers["model.layers.1.mlp.up_proj"].signal == 0
    folder = carried_out(tmp_path / "profile", tmp_path / "out", "3.0bpw")
    loaded = AutoModelForCausalLM.from_pretrained(folder / "checkpoint")
    assert loaded.model.layers[1].mlp.up_proj.dense_weight().abs().max() < 1e-20
