"""The road on the embedded trained model: profile, plan, checkpoint, measured quality."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from allocator.plan import Plan
from api.report.report import render_report
from api.services import usecases
from api.services.demo import fill_report
from profiler.documents.profile import Profile
from profiler.model.checkpoint import DEMO_PATH, find_model, tensor_bytes
from profiler.model.layers import load_model
from profiler.statistics.calibration import silent, windows
from profiler.sweep.run import ProfileSettings

BUDGETS = ("2.5bpw", "3.0bpw", "3.3bpw", "4.3bpw", "45%")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("road")


@pytest.fixture(scope="module")
def profile(folder: Path) -> Profile:
    os.environ["BITRANK_HOME"] = str(folder / "home")
    settings = ProfileSettings(tokens=7_680, bits=(2, 3, 4, 5), ranks=(0,), group_sizes=(64,))
    return usecases.profile_model("demo", folder / "profile", settings, silent)


def compressed(
    profile: Profile, folder: Path, budget: str | None, strategy: str = "optimal"
) -> tuple[Plan, Path]:
    plan = usecases.plan_budget(profile, budget, strategy)
    output = folder / f"{strategy}-{budget}".replace(":", "-").replace("%", "-percent")
    if not output.exists():
        usecases.execute(plan, profile, output, silent)
    return plan, output


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_checkpoint_takes_exactly_the_planned_bytes(profile: Profile, folder: Path, budget: str) -> None:
    plan, output = compressed(profile, folder, budget)
    assert tensor_bytes(output) == plan.total_bytes <= plan.budget.bytes


def test_the_plan_loses_less_than_uniform_at_the_same_bytes_as_predicted(
    profile: Profile, folder: Path
) -> None:
    uniform, uniform_output = compressed(profile, folder, None, "uniform:3")
    plan, output = compressed(profile, folder, f"{uniform.total_bytes}B")
    original = load_model(find_model("demo"))
    text = (DEMO_PATH / "evaluation.txt").read_text(encoding="utf-8")
    tokens_NT = windows(original, text, 8_192, "evaluation.txt")
    found = {
        name: usecases.evaluate_loaded(
            load_model(find_model(str(path))), original, tokens_NT, "own text", silent
        )
        for name, path in (("plan", output), ("uniform 3 bits", uniform_output))
    }
    assert found["plan"].tensor_bytes <= found["uniform 3 bits"].tensor_bytes
    assert found["plan"].kl_nats < 0.93 * found["uniform 3 bits"].kl_nats
    assert 0.7 < plan.predicted_kl / found["plan"].kl_nats < 1.3
    rows = [("plan", plan, found["plan"]), ("uniform 3 bits", uniform, found["uniform 3 bits"])]
    page = render_report(fill_report(profile, {"3 bits": plan}, rows))
    assert "model.layers.0.self_attn.q_proj" in page


def test_a_new_process_loads_the_checkpoint_and_gives_the_same_logits(profile: Profile, folder: Path) -> None:
    plan, output = compressed(profile, folder, "3.3bpw")
    original = load_model(find_model("demo")).model
    stored = {name: t for file in output.glob("*.safetensors") for name, t in load_file(file).items()}
    in_memory = in_memory_model(original, plan, stored)
    tokens = torch.arange(64).view(1, -1) * 97 % 8192
    save_file({"tokens": tokens}, folder / "tokens.safetensors")
    script = (
        "import sys, torch, compressor.plugin\n"
        "from transformers import AutoModelForCausalLM\n"
        "from safetensors.torch import load_file, save_file\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        "tokens = load_file(sys.argv[2] + '/tokens.safetensors')['tokens']\n"
        "with torch.no_grad():\n"
        "    save_file({'logits': model(tokens).logits}, sys.argv[2] + '/logits.safetensors')\n"
    )
    subprocess.run([sys.executable, "-c", script, output, folder], check=True, capture_output=True)
    logits = load_file(folder / "logits.safetensors")["logits"]
    with torch.no_grad():
        difference = (logits - in_memory(tokens).logits).abs().max().item()
    assert difference <= 1e-4


def in_memory_model(
    original: torch.nn.Module, plan: Plan, stored: dict[str, torch.Tensor]
) -> torch.nn.Module:
    """The original with its layers replaced by hand, without the loader."""
    from compressor.plugin import replace_layers

    options = {name: layer.option for name, layer in plan.layers.items() if layer.bits != 16}
    replace_layers(original, options)
    for name in options:
        layer = original.get_submodule(name)
        layer.load_state_dict(
            {key.removeprefix(f"{name}."): t for key, t in stored.items() if key.startswith(f"{name}.")}
        )
    return original


def test_without_the_plug_in_loading_fails_instead_of_giving_random_layers(
    profile: Profile, folder: Path
) -> None:
    _, output = compressed(profile, folder, "3.3bpw")
    script = (
        "import sys\n"
        "from transformers import AutoModelForCausalLM\n"
        "AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", script, output], capture_output=True, text=True)
    assert done.returncode != 0
    assert "size mismatch" in done.stderr or "mismatch" in done.stderr


def test_evaluate_finds_the_plans_model_by_id(profile: Profile, folder: Path) -> None:
    _, output = compressed(profile, folder, "4.3bpw")
    found = usecases.evaluate_model(str(output), "demo", None, 1_024, silent, ("It was a cold morning",))
    assert 0 < found.kl_nats < 0.2
    assert found.samples[0].reference and found.samples[0].compressed


def test_the_frontier_falls_and_no_uniform_setting_beats_the_plan_of_its_bytes(profile: Profile) -> None:
    points = usecases.frontier_points(profile)
    assert all(a.kl_nats > b.kl_nats and a.total_bytes < b.total_bytes for a, b in pairwise(points))
    for uniform in usecases.uniform_points(profile):
        plan = usecases.plan_budget(profile, f"{uniform.total_bytes}B")
        assert plan.predicted_kl <= uniform.kl_nats


def test_the_profile_is_a_document_others_can_read(profile: Profile) -> None:
    document = json.loads((profile.path / "profile.json").read_text())
    assert document["schema_version"] == 1
    assert len(document["layers"]) == 84
    assert document["layers"]["model.layers.0.mlp.up_proj"]["fit"]["r_squared"] > 0.99
