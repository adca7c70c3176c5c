"""Heads with factors of their own go the whole road: measured, planned, carried out, served."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import compressor.plugin  # noqa: F401  registers the checkpoint format
from allocator.plan import load_plan
from allocator.storage import Option
from allocator.strategies.policy import Policy, PolicyRule
from api.cli import main as cli
from api.services.curves import curve_rows, layer_curves
from api.services.usecases import compress_plan, curve_points, evaluate_model, plan_budget
from compressor.lowrank.decompose import decompose
from compressor.lowrank.hessian import Curvature, row_errors
from profiler.documents.profile import Profile, load_profile
from profiler.execution.block_pipeline import block_works
from profiler.model.checkpoint import find_model, tensor_bytes
from profiler.model.heads import separable_heads
from profiler.model.layers import Layer, load_model
from profiler.statistics.calibration import silent
from profiler.sweep.closed_form import first_measured, predictable
from profiler.sweep.run import ProfileSettings, build_profile

SETTINGS = ProfileSettings(
    tokens=640,
    bits=(2, 3, 4),
    ranks=(0, 4),
    group_sizes=(64,),
    factor_bits=(8,),
    rounds=1,
    head_ratios=(0.5, 1.0),
)
"""Those of the tiny profiles, and ratios."""
HEADS = {"q_proj": 4, "k_proj": 2, "v_proj": 2}
"""Of the tiny llama, each 16 rows high."""
POLICY = Policy(rules=(PolicyRule(layers=("*.self_attn.*",), bits=0, head_ratio=1.0), PolicyRule(bits=4)))


@pytest.fixture(scope="module")
def llama(model_directory: Callable[[str], Path]) -> Path:
    return model_directory("llama")


@pytest.fixture(scope="module")
def profile(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return build_profile(
        find_model(str(llama)), tmp_path_factory.mktemp("heads") / "profile", SETTINGS, silent
    )


def headed(profile: Profile) -> dict[str, list[Option]]:
    """The options of heads, by projection."""
    found: dict[str, list[Option]] = {}
    for name, measurements in profile.measurements.items():
        options = [m.option for m in measurements if m.option.heads > 1]
        if options:
            assert found.setdefault(name.rpartition(".")[2], options) == options
    return found


def test_every_ratio_is_measured_of_queries_keys_and_values_and_of_nothing_else(profile: Profile) -> None:
    assert headed(profile) == {
        part: [Option(0, rank, 0, 8, heads) for rank in (8, 16)] for part, heads in HEADS.items()
    }


def test_their_errors_are_those_of_the_definition(profile: Profile, tmp_path: Path) -> None:
    loaded = load_model(find_model(profile.document.model.id))
    (work,) = (
        work
        for block in block_works(loaded, *profile.calibration(), tmp_path)
        for work in block.layers()
        if work.name == "model.layers.1.self_attn.k_proj"
    )
    w_OI, h_II = work.weight_OI, work.hessian_II
    (layer,) = (layer for layer in loaded.layers if layer.name == work.name)
    weights = profile.token_weights()
    assert weights is not None
    share_O = weights.row_shares(layer, w_OI.device)
    for measured in (m for m in profile.measurements[work.name] if m.option.heads > 1):
        ((_, found),) = decompose([w_OI], Curvature.of(h_II), [measured.option])
        error, signal = (share_O @ row_errors(w_OI, other, h_II) for other in (found.dense(), w_OI * 0))
        assert measured.error == pytest.approx((error / signal).item(), rel=1e-3)


def test_all_else_is_as_in_a_profile_without_them(
    profile: Profile, tiny_profile: Callable[[str], Profile]
) -> None:
    plain = tiny_profile("llama")
    assert plain.sha256 != profile.sha256
    for name, record in plain.document.layers.items():
        assert profile.document.layers[name].fit == record.fit
        without = [m for m in profile.measurements[name] if m.option.heads == 1]
        assert without == list(plain.measurements[name])


def test_files_of_a_profile_without_them_do_not_know_them(
    profile: Profile, tiny_profile: Callable[[str], Profile]
) -> None:
    plain = tiny_profile("llama")
    for file in ("profile.json", "request.json"):
        text = (plain.path / file).read_text()
        assert not any(word in text for word in ("head_ratios", '"heads"'))
    assert "heads" not in parquet.read_schema(plain.path / "measurements.parquet").names
    assert "heads" in parquet.read_schema(profile.path / "measurements.parquet").names


def test_they_are_measured_even_where_other_options_are_predicted(profile: Profile) -> None:
    layer = Layer("q_proj", 0, "q_proj", 64, 64, False)
    options = profile.document.grid.options(layer, heads=4)
    of_heads = {option for option in options if option.heads > 1}
    assert of_heads == {Option(0, 8, 0, 8, 4), Option(0, 16, 0, 8, 4)}
    assert of_heads <= set(first_measured(options))
    assert not of_heads & set(predictable(options))


def test_a_policy_of_head_ratios_is_carried_out_and_served(
    profile: Profile, llama: Path, tmp_path: Path
) -> None:
    plan = plan_budget(profile, None, "policy", policy=POLICY)
    plan.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    compress_plan(tmp_path / "plan.json", tmp_path / "checkpoint", silent, profile.path)
    assert tensor_bytes(tmp_path / "checkpoint") == plan.total_bytes
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())["quantization_config"]
    told = {name: layer["heads"] for name, layer in config["layers"].items() if "heads" in layer}
    assert told == {
        f"model.layers.{block}.self_attn.{part}": heads for block in range(2) for part, heads in HEADS.items()
    }
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    dense = AutoModelForCausalLM.from_pretrained(llama)
    for name in plan.layers:
        dense.get_submodule(name).weight.data = served.get_submodule(name).dense_weight()
    tokens_NT = torch.arange(60).view(2, 30)
    with torch.no_grad():
        assert torch.allclose(served(tokens_NT).logits, dense(tokens_NT).logits, atol=1e-4)
    found = evaluate_model(str(tmp_path / "checkpoint"), str(llama), None, 512, silent)
    assert 1 / 3 < plan.predicted_kl / found.kl_nats < 3


def test_curves_show_them_beside_no_fit(profile: Profile) -> None:
    points = [p for p in curve_points(profile, "*.0.self_attn.q_proj") if p.heads > 1]
    assert [(p.rank, p.heads, p.fitted_error) for p in points] == [(8, 4, None), (16, 4, None)]
    curves = layer_curves(profile, "*.0.self_attn.q_proj", (), (), 100)
    assert [m.heads for m in curves[0].measured if m.bits == 0] == [4, 4]
    assert sum(row[-2] == 4 for row in curve_rows(profile, curves)) == 2


def test_fused_projections_have_no_heads_to_cut_and_the_command_says_so_once(
    model_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    grid = ["--bits", "4", "--ranks", "0", "--group-sizes", "64", "--tokens", "192", "--head-ratios", "0.5"]
    made = CliRunner().invoke(
        cli.app, ["profile", str(model_directory("gpt2")), "-o", str(tmp_path / "profile"), *grid]
    )
    assert made.exit_code == 0, made.output
    assert made.stderr.count("no query, key or value projection of several heads") == 1
    assert headed(load_profile(tmp_path / "profile")) == {}


@pytest.mark.parametrize("architecture", ["gpt_neo", "opt", "mixtral"])
def test_separate_projections_are_cut_whatever_their_architecture(
    model_directory: Callable[[str], Path], architecture: str
) -> None:
    loaded = load_model(find_model(str(model_directory(architecture))))
    found = {layer.projection.rpartition(".")[2]: separable_heads(loaded, layer) for layer in loaded.layers}
    shared = 2 if architecture == "mixtral" else 4
    cut = {part: heads for part, heads in found.items() if heads > 1}
    assert cut == {"q_proj": 4, "k_proj": shared, "v_proj": shared}


@pytest.mark.parametrize("ratios", ["0", "1.5", "-0.5", "nan", "half", ""])
def test_a_ratio_that_is_no_share_is_wrong_usage(ratios: str, tmp_path: Path) -> None:
    made = CliRunner().invoke(
        cli.app, ["profile", "demo", "-o", str(tmp_path / "profile"), "--head-ratios", ratios]
    )
    assert made.exit_code == 2
    assert "--head-ratios" in made.stderr
    assert not (tmp_path / "profile").exists()
