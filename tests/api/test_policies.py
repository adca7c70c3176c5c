"""A policy file on the command line: from rules to a checkpoint, and what is said of rules that cannot be kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command_line import CommandLine
from refusals import assert_refused
from road import Road

RULES = """
rules:
- {layers: ["*.self_attn.*"], bits: 0, energy: 0.3}
- {layers: ["*.mlp.*"], last_blocks: 1, bits: 3, rank: 4, group_size: 32}
- {keep: true}
"""


@pytest.fixture(scope="module")
def profile(road: Road, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Low rank alone among its options."""
    folder = tmp_path_factory.mktemp("policy")
    grid = (
        "--bits",
        "0,3",
        "--ranks",
        "0,4,16",
        "--group-sizes",
        "32",
        "--factor-bits",
        "8",
        "--tokens",
        "1024",
    )
    outcome = CommandLine(folder)(
        "profile", road.model, "-o", folder / "profile", "--calibration", road.text, *grid
    )
    assert outcome.code == 0, outcome.stderr
    return folder / "profile"


def test_a_policy_is_carried_out_to_the_byte(bitrank: CommandLine, profile: Path, road: Road) -> None:
    (bitrank.folder / "policy.yaml").write_text(RULES)
    outcome = bitrank("plan", profile, "--strategy", "policy", "--policy", "policy.yaml", "--json")
    assert outcome.code == 0, outcome.stderr
    plan = json.loads(outcome.stdout)
    for name, layer in plan["layers"].items():
        expected = (0, 16) if "self_attn" in name else (3, 4) if "layers.1." in name else (16, 0)
        assert (layer["bits"], layer["rank"]) == expected, name
    assert bitrank("compress", "plan.json", "-o", "small", "--profile", profile).code == 0
    measured_on = ("--reference", plan["model"]["id"], "--text", road.text, "--tokens", "1024")
    found = json.loads(bitrank("evaluate", "small", *measured_on, "--json").stdout)
    assert found["tensor_bytes"] == plan["total_bytes"]


def test_a_rule_that_reaches_no_layer_is_mentioned(bitrank: CommandLine, road: Road) -> None:
    (bitrank.folder / "policy.yaml").write_text(
        "rules:\n- {layers: ['*.attention.*'], bits: 2}\n- {bits: 4}\n"
    )
    outcome = bitrank("plan", road.profile, "--strategy", "policy", "--policy", "policy.yaml")
    assert outcome.code == 0
    assert "rule 1: no layer matches '*.attention.*'; the closest are model.layers." in outcome.stderr


def test_a_policy_larger_than_the_budget_says_what_it_takes(bitrank: CommandLine, road: Road) -> None:
    (bitrank.folder / "policy.yaml").write_text("rules:\n- {bits: 4}\n")
    arguments = ("--strategy", "policy", "--policy", "policy.yaml", "--budget", "3bpw")
    outcome = bitrank("plan", road.profile, *arguments)
    assert_refused(outcome, bitrank.folder, "plan.json", "strategy policy takes", "raise it to", code=3)


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        (("--strategy", "policy"), "give a file with --policy", 2),
        (("--policy", "policy.yaml", "--budget", "3bpw"), "--policy goes with the strategy policy", 2),
        (("--strategy", "policy", "--policy", "nowhere.yaml"), "cannot read the policy", 2),
    ],
)
def test_a_policy_that_is_not_there_or_not_asked_for_is_refused(
    bitrank: CommandLine, road: Road, arguments: tuple[str, ...], said: str, code: int
) -> None:
    (bitrank.folder / "policy.yaml").write_text("rules:\n- {bits: 4}\n")
    outcome = bitrank("plan", road.profile, *arguments)
    assert outcome.code == code
    assert said in " ".join(outcome.stderr.replace("│", " ").split())


def test_spectra_are_needed_for_an_energy(bitrank: CommandLine, profile: Path) -> None:
    shutil.copytree(profile, bitrank.folder / "bare")
    (bitrank.folder / "bare" / "spectrum.json").unlink()
    (bitrank.folder / "policy.yaml").write_text(RULES)
    outcome = bitrank("plan", "bare", "--strategy", "policy", "--policy", "policy.yaml")
    assert outcome.code != 0 and "has no spectra" in outcome.stderr


def test_a_recipe_goes_by_the_fidelity_of_the_profile(bitrank: CommandLine, road: Road) -> None:
    outcome = bitrank("plan", road.profile, "--strategy", "ultra:3", "--json")
    assert outcome.code == 0, outcome.stderr
    layers = json.loads(outcome.stdout)["layers"]
    assert all(layer["bits"] == 3 and layer["rank"] > 0 for layer in layers.values())
    exported = bitrank("export", "plan.json", "--format", "pattern-overrides")
    assert exported.code == 0 and "pattern_overrides:" in exported.stdout

    shutil.copytree(road.profile, bitrank.folder / "bare")
    (bitrank.folder / "bare" / "fidelity.json").unlink()
    refused = bitrank("plan", "bare", "--strategy", "ultra", "-o", "none.json")
    assert_refused(
        refused, bitrank.folder, "none.json", "strategy ultra goes by the fidelity", "again", code=2
    )
