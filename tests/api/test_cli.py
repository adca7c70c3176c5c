"""The command line's contract: one JSON document on stdout, everything else on stderr, and help at once."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import CommandLine
from road import Road

ROOT = Path(__file__).parents[2]
COMMANDS = (
    "demo",
    "profile",
    "calibrate",
    "recover",
    "compare",
    "plan",
    "frontier",
    "curves",
    "compress",
    "evaluate",
    "export",
    "fidelity",
    "spectrum",
    "cliff",
    "quality",
    "kvcache",
)
SERVICE_COMMANDS = ("serve", "worker", "batch", "jobs", "keys")
HEAVY = {"torch", "transformers", "numpy", "scipy", "cvxpy", "pandas", "pyarrow", "fastapi"}


def answer(bitrank: CommandLine, *arguments: str | Path) -> Any:
    """What a command prints with --json, which is one strict JSON document and nothing else."""
    outcome = bitrank(*arguments, "--json")
    assert outcome.code == 0, outcome.stderr

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(outcome.stdout, parse_constant=refuse)


# Help


@pytest.mark.parametrize("command", ["", *COMMANDS, *SERVICE_COMMANDS])
def test_help_imports_nothing_heavy(command: str) -> None:
    arguments = [*command.split(), "--help"]
    process = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "api.main", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Usage:" in process.stdout
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in process.stderr.splitlines()}
    assert "typer" in imported
    assert not imported & HEAVY


def test_help_names_every_command(bitrank: CommandLine) -> None:
    words = bitrank("--help").stdout.split()
    assert [command for command in (*COMMANDS, *SERVICE_COMMANDS) if command not in words] == []


def test_the_installed_script_is_the_module() -> None:
    script = Path(sys.executable).with_name("bitrank")
    if not script.exists():
        pytest.skip("bitrank is not installed beside this Python")
    process = subprocess.run([script, "frontier", "/nowhere"], capture_output=True, text=True)
    assert process.returncode == 1
    assert process.stderr.startswith("bitrank: /nowhere is not a profile directory")
    assert process.stderr.count("\n") == 1


# Profile


def test_profile_reports_what_it_measured(bitrank: CommandLine, road: Road) -> None:
    """A finished profile of the same settings is reported again, not made again."""
    before = {file: file.stat().st_mtime_ns for file in road.profile.iterdir()}
    report = answer(bitrank, *road.profiling(road.profile))
    assert report["profile"] == str(road.profile)
    assert report["layers"] == 14
    assert report["measurements"] == 14 * (3 * 2 + 3)
    assert report["worst_r_squared"] > 0.9
    assert {file: file.stat().st_mtime_ns for file in road.profile.iterdir()} == before


def test_factor_bits_are_measured_on_request(bitrank: CommandLine, road: Road) -> None:
    arguments = ("profile", road.model, "-o", "out", "--tokens", "192", "--bits", "4", "--ranks", "0,4")
    report = answer(bitrank, *arguments, "--group-sizes", "64", "--factor-bits", "4,16")
    assert report["measurements"] == 14 * (1 + 2)
    plan = answer(bitrank, "plan", "out", "--strategy", "uniform:4:r4")
    assert {layer["factor_bits"] for layer in plan["layers"].values()} == {4}
    outcome = bitrank("profile", road.model, "-o", "other", "--factor-bits", "3")
    assert outcome.code == 2
    assert "choose from [4, 8, 16]" in outcome.stderr


def test_progress_goes_to_stderr(bitrank: CommandLine, road: Road) -> None:
    arguments = ("profile", road.model, "-o", "out", "--tokens", "192", "--bits", "2", "--ranks", "0")
    outcome = bitrank(*arguments, "--group-sizes", "64", "--json")
    assert json.loads(outcome.stdout)["layers"] == 14
    assert "sampling calibration text" in outcome.stderr
    assert "sweep" in outcome.stderr


# Plan


def test_plan_prints_the_plan_it_writes(bitrank: CommandLine, road: Road) -> None:
    plan = answer(bitrank, "plan", road.profile, "--budget", "3bpw")
    assert plan == json.loads((bitrank.folder / "plan.json").read_text())
    assert plan["total_bytes"] <= plan["budget"]["bytes"]
    assert plan["total_bytes"] == sum(plan["kept"].values()) + sum(
        layer["bytes"] for layer in plan["layers"].values()
    )
    assert plan["lower_bound"] <= plan["predicted_kl"]


@pytest.mark.parametrize(("strategy", "rank"), [("uniform:3", 0), ("uniform:3:r4", 4)])
def test_a_uniform_strategy_needs_no_budget(
    bitrank: CommandLine, road: Road, strategy: str, rank: int
) -> None:
    plan = answer(bitrank, "plan", road.profile, "--strategy", strategy)
    options = {(layer["bits"], layer["rank"], layer["group_size"]) for layer in plan["layers"].values()}
    assert options == {(3, rank, 64)}
    assert plan["strategy"] == strategy
    assert plan["budget"]["bytes"] == plan["total_bytes"]


def test_the_optimum_loses_no_more_than_uniform_at_the_same_bytes(bitrank: CommandLine, road: Road) -> None:
    uniform = answer(bitrank, "plan", road.profile, "--strategy", "uniform:3")
    best = answer(bitrank, "plan", road.profile, "--budget", f"{uniform['total_bytes']}B")
    assert best["total_bytes"] <= uniform["total_bytes"]
    assert best["predicted_kl"] <= uniform["predicted_kl"] * (1 + 1e-12)
    assert uniform["gap"] >= uniform["predicted_kl"] - best["predicted_kl"] - 1e-12


def test_plan_says_what_it_decided(bitrank: CommandLine, road: Road) -> None:
    outcome = bitrank("plan", road.profile, "--budget", "3bpw")
    assert outcome.code == 0
    for words in ("plan.json: ", " bpw", "predicted KL", "gap", "one more MiB", "layers at"):
        assert words in outcome.stdout
    assert outcome.stderr == road.remarks


# Frontier and curves


def test_the_frontier_falls_with_size_and_lies_below_uniform(bitrank: CommandLine, road: Road) -> None:
    found = answer(bitrank, "frontier", road.profile)
    sizes = [point["total_bytes"] for point in found["frontier"]]
    losses = [point["kl_nats"] for point in found["frontier"]]
    assert len(sizes) > 10
    assert sizes == sorted(sizes)
    assert losses == sorted(losses, reverse=True)
    assert [point["strategy"] for point in found["uniform"]] == ["uniform:2", "uniform:3", "uniform:4"]
    for point in found["uniform"]:
        larger = [loss for size, loss in zip(sizes, losses, strict=True) if size >= point["total_bytes"]]
        assert larger[0] <= point["kl_nats"] * (1 + 1e-12)


def test_curves_are_of_the_layers_asked_for(bitrank: CommandLine, road: Road) -> None:
    found = answer(bitrank, "curves", road.profile, "--layer", "*.0.mlp.*")
    names = {f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")}
    assert set(found["fits"]) == names
    assert {point["layer"] for point in found["points"]} == names
    assert len(found["points"]) == 3 * 9
    errors = {
        (point["layer"], point["bits"]): point["error"]
        for point in found["points"]
        if (point["rank"], point["group_size"]) == (0, 64)
    }
    assert all(errors[name, 2] > errors[name, 3] > errors[name, 4] > 0 for name in names)


def test_curves_of_no_layer_say_what_names_look_like(bitrank: CommandLine, road: Road) -> None:
    outcome = bitrank("curves", road.profile, "--layer", "nothing")
    assert outcome.code == 1
    assert "no layer matches 'nothing'" in outcome.complaint
    assert "model.layers.0." in outcome.complaint


@pytest.mark.parametrize(
    ("command", "heading"), [("frontier", "predicted KL"), ("curves", "error (squared)")]
)
def test_tables_are_for_people(bitrank: CommandLine, road: Road, command: str, heading: str) -> None:
    outcome = bitrank(command, road.profile)
    assert outcome.code == 0
    header, *rows = outcome.stdout.splitlines()
    assert heading in header
    assert len(rows) > 10
    assert outcome.stderr == (road.remarks if command == "frontier" else "")


# Compress and evaluate


def test_compress_writes_the_bytes_that_the_plan_says(bitrank: CommandLine, road: Road) -> None:
    made = answer(bitrank, "compress", road.plan, "-o", "out")
    assert made == {
        "checkpoint": "out",
        "tensor_bytes": json.loads(road.plan.read_text())["total_bytes"],
    }
    assert not [path for path in bitrank.folder.iterdir() if path.name.startswith(("out.", ".out"))]


def test_evaluate_answers_with_the_agreed_keys(bitrank: CommandLine, road: Road) -> None:
    arguments = ("evaluate", road.checkpoint, "--reference", road.model, "--text", road.text)
    (bitrank.folder / "prompts.txt").write_text("There was\n\n")
    prompts = ("--prompt", "In the beginning", "--prompts", "prompts.txt")
    found = answer(bitrank, *arguments, "--tokens", "512", *prompts)
    assert 0 < found["kl_nats"] < 10
    assert found["perplexity"] > 1
    assert found["reference_perplexity"] > 1
    assert -1 <= found["logits_cosine"] < 1
    assert 0 <= found["top1_agreement"] < 1
    assert found["tokens_per_second"] > 0
    assert found["tensor_bytes"] == json.loads(road.plan.read_text())["total_bytes"]
    assert [sample["prompt"] for sample in found["samples"]] == ["In the beginning", "There was"]


def test_a_model_does_not_differ_from_itself(bitrank: CommandLine, road: Road) -> None:
    """On one window, whose standard error is unknown and therefore null."""
    arguments = ("evaluate", road.model, "--reference", road.model, "--text", road.text, "--tokens", "64")
    found = answer(bitrank, *arguments)
    assert found["kl_nats"] == pytest.approx(0, abs=1e-6)
    assert found["top1_agreement"] == 1
    assert found["perplexity"] == found["reference_perplexity"]
    assert found["kl_standard_error"] is None


def test_compress_is_told_where_a_model_that_moved_is(
    bitrank: CommandLine, road: Road, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(road.model, moved)
    plan = json.loads(road.plan.read_text())
    plan["model"]["id"] = str(tmp_path / "gone")
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    here = ("compress", tmp_path / "plan.json", "--profile", road.profile, "-o", tmp_path / "small")
    assert bitrank(*here).code == 1
    assert bitrank(*here, "--model", moved).code == 0


def test_plan_verify_says_on_one_line_what_was_measured(
    bitrank: CommandLine, road: Road, tmp_path: Path
) -> None:
    outcome = bitrank("plan", road.profile, "--budget", "2.8bpw", "--verify", "-o", tmp_path / "plan.json")
    assert outcome.code == 0, outcome.stderr
    verification = json.loads((tmp_path / "plan.json").read_text())["verification"]
    (line,) = [line for line in outcome.stdout.splitlines() if line.startswith("measured KL")]
    assert f"{verification['measured_kl']:.4f}" in line and f"{verification['uniform_kl']:.4f}" in line
    assert ("this plan loses" in outcome.stderr) == (verification["verdict"] == "worse")
    assert not list(tmp_path.glob("bitrank-verify-*"))


# Calibrate


def test_calibrate_says_how_well_plans_are_predicted_and_is_planned_from(
    bitrank: CommandLine, road: Road
) -> None:
    found = answer(bitrank, "calibrate", road.profile, "-o", "out", "--plans", "10")
    assert set(found) == {"profile", "sha256", "plans", "gain", "agreement"}
    assert (found["profile"], found["plans"]) == ("out", 10)
    gain, agreement = found["gain"], found["agreement"]
    assert 0 < gain["low"] < gain["mean"] < gain["high"]
    assert {name.split()[1] for name in gain["classes"]} == {"low", "middle", "high"}
    assert -1 <= agreement["spearman"] <= 1
    assert 0 <= agreement["misordered"] <= 1 and 0 <= agreement["coverage"] <= 1
    assert agreement["median_log_ratio"] >= 0 and agreement["median_log_ratio_before"] >= 0

    written = json.loads((bitrank.folder / "out" / "profile.json").read_text())
    assert (written["gain"], written["agreement"]) == (gain, agreement)
    assert len(written["plans"]) == 10
    plan = answer(bitrank, "plan", "out", "--budget", "3.2bpw")
    assert plan["profile_sha256"] == found["sha256"]
    low, high = plan["predicted_kl_interval"]
    assert low / plan["predicted_kl"] == pytest.approx(gain["low"] / gain["mean"])
    assert high / plan["predicted_kl"] == pytest.approx(gain["high"] / gain["mean"])
    made = answer(bitrank, "compress", "plan.json", "-o", "small")
    assert made["tensor_bytes"] == plan["total_bytes"]


def test_calibrate_measures_on_the_text_it_is_given(bitrank: CommandLine, road: Road) -> None:
    arguments = ("calibrate", road.profile, "--plans", "10", "--text", road.text)
    outcome = bitrank(*arguments, "--tokens", "256", "-o", "text")
    assert outcome.code == 0, outcome.stderr
    first, heading, figures = outcome.stdout.splitlines()[:3]
    assert first == "10 plans measured; each predicted from the others, in text:"
    for words in ("rank correlation", "pairs misordered", "before", "inside it"):
        assert words in heading
    assert figures.count("%") == 4 and "…" in figures
    assert "measuring trials" in outcome.stderr

    assert bitrank(*arguments, "--tokens", "128", "-o", "less").code == 0
    plans = [
        json.loads((bitrank.folder / name / "profile.json").read_text())["plans"] for name in ("text", "less")
    ]
    assert [p["total_bytes"] for p in plans[0]] == [p["total_bytes"] for p in plans[1]]
    assert all(a["measured_kl"] != b["measured_kl"] for a, b in zip(*plans, strict=True))


def test_a_recovered_checkpoint_takes_the_same_bytes_and_is_nearer_the_original(
    bitrank: CommandLine, road: Road
) -> None:
    arguments = ("recover", road.checkpoint, "--reference", road.model, "-o", "better", "--text", road.text)
    made = answer(bitrank, *arguments, "--steps", "40")
    assert made["settings"]["steps"] == 40 and made["helped"]
    assert made["after_kl"] < made["before_kl"]
    measured = [
        answer(bitrank, "evaluate", checkpoint, "--reference", road.model, "--text", road.text)
        for checkpoint in (road.checkpoint, "better")
    ]
    assert measured[1]["tensor_bytes"] == measured[0]["tensor_bytes"]
    assert measured[1]["kl_nats"] < measured[0]["kl_nats"]


def test_strategies_are_measured_beside_the_optimum_at_their_bytes(bitrank: CommandLine, road: Road) -> None:
    strategies = ("uniform:3", "uniform:2:r4", "progressive:fall")
    found = answer(bitrank, "compare", road.profile, *strategies, "--budget", "4bpw")["comparisons"]
    assert [pair["strategy"] for pair in found] == list(strategies)
    for pair in found:
        plan, optimum = pair["plan"], pair["optimum"]
        assert 0.99 * plan["total_bytes"] < optimum["total_bytes"] <= plan["total_bytes"]
        assert optimum["predicted_kl"] <= plan["predicted_kl"]
        assert pair["saved"] == pytest.approx(1 - optimum["measured_kl"] / plan["measured_kl"])
        assert plan["reference_perplexity"] == optimum["reference_perplexity"] > 1
        assert plan["perplexity"] != optimum["perplexity"] != plan["reference_perplexity"]
    assert found[0]["plan"]["uniform_kl"] == pytest.approx(found[0]["plan"]["measured_kl"])
    assert [pair["plan"]["mean_bits"] for pair in found[:2]] == [3, 2]
    assert [pair["plan"]["mean_rank"] for pair in found[:2]] == [0, 4]


def test_the_optimum_may_be_given_a_share_of_the_bytes(bitrank: CommandLine, road: Road) -> None:
    (pair,) = answer(bitrank, "compare", road.profile, "uniform:4", "--share", "0.99")["comparisons"]
    assert 0.985 < pair["optimum"]["total_bytes"] / pair["plan"]["total_bytes"] <= 0.99


def test_a_comparison_is_written_with_its_page(bitrank: CommandLine, road: Road) -> None:
    printed = answer(bitrank, "compare", road.profile, "uniform:3", "-o", "found.json")
    assert json.loads((bitrank.folder / "found.json").read_text()) == printed
    page = (bitrank.folder / "found.html").read_text(encoding="utf-8")
    assert "bitrank compare" in page and '"strategy": "uniform:3"' in page.replace('":"', '": "')


def test_the_comparison_is_a_table(bitrank: CommandLine, road: Road) -> None:
    outcome = bitrank("compare", road.profile)
    assert outcome.code == 0, outcome.stderr
    lines = outcome.stdout.splitlines()
    assert lines[0].split()[:2] == ["plan", "bytes"]
    assert [line.split()[0] for line in lines[1:-1:2]] == ["uniform:2", "uniform:3", "uniform:4"]
    assert all(line.startswith("  the optimum ") for line in lines[2:-1:2])
    assert lines[-1].startswith("perplexity of the original ")
