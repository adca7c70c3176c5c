"""Exports and targets, over HTTP and on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from command_line import CommandLine, Outcome
from road import Road
from service_process import ServiceProcess

from allocator.errors import BudgetSyntaxError
from allocator.export.formats import FORMATS
from allocator.plan import Plan, load_plan
from allocator.targets import TARGETS
from api.jobs.tasks import planned
from api.schemas.jobs import PlanJob
from api.services.usecases import plan_budget
from profiler.documents.profile import Profile, load_profile

TEXTS = sorted(FORMATS.keys() - {"peft"})


@pytest.fixture(scope="module")
def profile(road: Road) -> Profile:
    return load_profile(road.profile)


@pytest.fixture(scope="module")
def ranked_id(client: httpx.Client) -> str:
    made = client.post("/v1/plans", json={"model": "model", "strategy": "uniform:3:r4"})
    return str(made.headers["location"]).rpartition("/")[2]


@pytest.fixture(scope="module")
def plain_id(client: httpx.Client) -> str:
    made = client.post("/v1/plans", json={"model": "model", "budget": "3.2bpw", "target": "gptqmodel"})
    return str(made.headers["location"]).rpartition("/")[2]


def said(outcome: Outcome, code: int, *words: str) -> None:
    assert outcome.code == code, outcome.stderr
    assert outcome.stdout == ""
    assert [word for word in words if word not in outcome.stderr] == []


# Over HTTP


@pytest.mark.parametrize("name", TEXTS)
def test_a_plan_is_exported_in_every_format(client: httpx.Client, plain_id: str, name: str) -> None:
    plan = Plan.model_validate_json(client.get(f"/v1/plans/{plain_id}").content)
    answer = client.get(f"/v1/plans/{plain_id}/export", params={"format": name})
    form = FORMATS[name]  # type: ignore[index]
    assert answer.status_code == 200
    assert answer.text == form.write(plan)
    assert answer.headers["content-type"].startswith(form.media_type)
    assert answer.headers["content-disposition"] == f'attachment; filename="{form.filename}"'
    again = client.get(answer.url, headers={"If-None-Match": answer.headers["etag"]})
    assert again.status_code == 304


def test_an_adapter_is_exported_where_there_are_ranks(client: httpx.Client, ranked_id: str) -> None:
    answer = client.get(f"/v1/plans/{ranked_id}/export", params={"format": "peft"})
    assert answer.json()["lora_alpha"] == 4


def test_an_unknown_format_is_refused_with_the_known_ones(client: httpx.Client, plan_id: str) -> None:
    answer = client.get(f"/v1/plans/{plan_id}/export", params={"format": "onnx"})
    assert (answer.status_code, answer.json()["type"]) == (422, "urn:bitrank:problem:invalid-request")
    assert "llm-compressor" in answer.json()["detail"]
    assert client.get(f"/v1/plans/{plan_id}/export").status_code == 422
    assert client.get(f"/v1/plans/{'0' * 32}/export", params={"format": "peft"}).status_code == 404


def test_a_format_that_cannot_carry_ranks_says_what_to_do(client: httpx.Client, ranked_id: str) -> None:
    answer = client.get(f"/v1/plans/{ranked_id}/export", params={"format": "llm-compressor"})
    assert (answer.status_code, answer.json()["type"]) == (422, "urn:bitrank:problem:export")
    assert "--target llm-compressor" in answer.json()["detail"]


def test_a_plan_for_a_target_is_the_one_made_here(client: httpx.Client, profile: Profile) -> None:
    request = {"model": "model", "budget": "3.2bpw", "target": "gptqmodel"}
    made = client.post("/v1/plans", json=request)
    assert made.status_code == 201
    assert Plan.model_validate_json(made.content) == plan_budget(profile, "3.2bpw", target="gptqmodel")
    assert made.json()["target"] == "gptqmodel"
    assert {layer["rank"] for layer in made.json()["layers"].values()} == {0}


def test_an_unknown_target_is_refused_with_the_known_ones(client: httpx.Client) -> None:
    for model in ("model", "demo"):
        answer = client.post("/v1/plans", json={"model": model, "budget": "3bpw", "target": "onnx"})
        assert answer.status_code == 422
        assert "llama.cpp" in answer.json()["detail"]


def test_a_budget_that_the_target_makes_infeasible_names_the_smallest(client: httpx.Client) -> None:
    request = {"model": "model", "budget": "3bpw", "target": "vllm"}
    answer = client.post("/v1/plans", json=request)
    assert (answer.status_code, answer.json()["type"]) == (422, "urn:bitrank:problem:infeasible")
    smallest = answer.json()["smallest_bytes"]
    assert client.post("/v1/plans", json=request | {"budget": f"{smallest}B"}).status_code == 201
    assert client.post("/v1/plans", json=request | {"budget": f"{smallest - 1}B"}).status_code == 422


def test_a_plan_for_llama_cpp_is_explained_at_its_sizes_and_not_compressed(client: httpx.Client) -> None:
    """No row of this model is a whole block of 256, so all of it stays at 16 bits."""
    made = client.post("/v1/plans", json={"model": "model", "budget": "100%", "target": "llama.cpp"})
    plan_id = made.headers["location"].rpartition("/")[2]
    layers = client.get(f"/v1/plans/{plan_id}/explain").json()["layers"]
    assert {(layer["better"], layer["worse"]) for layer in layers} == {(None, None)}
    for jobs in ("compressions", "evaluations"):
        refused = client.post(f"/v1/{jobs}", json={"plan": plan_id})
        assert refused.status_code == 422
        assert "--format llama-quantize" in refused.json()["detail"]


def test_constraints_and_target_go_with_a_model_that_is_profiled_first(client: httpx.Client) -> None:
    pins = [{"layers": "*.0.*", "bits": 8}]
    request = {"model": "demo", "budget": "4bpw", "target": "vllm", "constraints": {"pins": pins}}
    answer = client.post("/v1/plans", json=request)
    assert answer.status_code == 202
    asked = client.get(answer.headers["location"]).json()["request"]
    assert asked["target"] == "vllm"
    assert asked["constraints"]["pins"][0]["bits"] == 8
    client.post(f"{answer.headers['location']}/cancel")
    wrong = client.post("/v1/plans", json=request | {"strategy": "uniform:3"})
    assert (wrong.status_code, wrong.json()["type"]) == (422, "urn:bitrank:problem:strategy")


def test_a_job_plans_under_its_constraints_and_target(profile: Profile) -> None:
    """What the worker does once the model is profiled."""
    constraints = {"pins": [{"layers": "*.layers.0.*", "bits": 4}]}
    job = PlanJob(model="model", budget="3.7bpw", target="gptqmodel", constraints=constraints)
    made = planned(job, profile)
    assert made.target == "gptqmodel"
    assert {layer.bits for name, layer in made.layers.items() if ".layers.0." in name} == {4}
    with pytest.raises(BudgetSyntaxError):
        planned(PlanJob(model="model", target="gptqmodel"), profile)


def test_a_batch_takes_targets_and_constraints(client: httpx.Client) -> None:
    entry = {"model": "demo", "budgets": ["4bpw"], "target": "gptqmodel", "constraints": {"tie_fused": True}}
    answer = client.post("/v1/batches", json={"jobs": [entry]})
    assert answer.status_code == 202
    asked = client.get(answer.headers["location"]).json()["request"]["jobs"][0]
    assert (asked["target"], asked["constraints"]["tie_fused"]) == ("gptqmodel", True)
    client.post(f"{answer.headers['location']}/cancel")
    refused = client.post("/v1/batches", json={"jobs": [entry | {"target": "onnx"}]})
    assert refused.status_code == 422


# On the command line


@pytest.mark.parametrize("name", TEXTS)
def test_export_prints_or_writes_the_format(bitrank: CommandLine, road: Road, name: str) -> None:
    assert bitrank("plan", road.profile, "--budget", "3.2bpw", "--target", "gptqmodel").code == 0
    plan = load_plan(bitrank.folder / "plan.json")
    expected = FORMATS[name].write(plan)  # type: ignore[index]
    assert bitrank("export", "plan.json", "--format", name).stdout == expected
    assert bitrank("export", "plan.json", "--format", name, "-o", "file").code == 0
    assert (bitrank.folder / "file").read_text() == expected
    document = json.loads(bitrank("export", "plan.json", "--format", name, "--json").stdout)
    assert document == {"format": name, "output": None, "text": expected}


@pytest.mark.parametrize("target", ["transformers", "gptqmodel"])
def test_a_plan_names_its_target(bitrank: CommandLine, road: Road, target: str) -> None:
    outcome = bitrank("plan", road.profile, "--budget", "3.2bpw", "--target", target, "--json")
    assert json.loads(outcome.stdout)["target"] == target


def test_a_service_plans_for_the_command_line(
    bitrank: CommandLine, service: ServiceProcess, road: Road, profile: Profile
) -> None:
    outcome = bitrank("plan", "model", "--server", service.url, "--budget", "3.2bpw", "--target", "gptqmodel")
    assert outcome.code == 0, outcome.stderr
    assert load_plan(bitrank.folder / "plan.json") == plan_budget(profile, "3.2bpw", target="gptqmodel")


def test_a_checkpoint_is_exported_with_its_adapter(bitrank: CommandLine, road: Road, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="needs the extra `export`")
    for arguments in (
        ("plan", road.profile, "--strategy", "uniform:3:r4"),
        ("compress", "plan.json", "-o", "small", "--profile", road.profile),
        (
            "export",
            "plan.json",
            "--format",
            "compressed-tensors",
            "--checkpoint",
            "small",
            "-o",
            "served",
            "--json",
        ),
    ):
        outcome = bitrank(*arguments)
        assert outcome.code == 0, outcome.stderr
    document = json.loads(outcome.stdout)
    assert document["checkpoint"] == "served"
    assert document["adapter"] == "served/adapter"
    assert document["tensor_bytes"] > 0 < document["adapter_bytes"]
    config = json.loads((bitrank.folder / "served" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert (bitrank.folder / "served" / "tokenizer.json").exists()


# Bad input


def test_an_unknown_format_is_wrong_usage(bitrank: CommandLine, road: Road) -> None:
    outcome = bitrank("export", road.plan, "--format", "onnx", "-o", "file")
    said(outcome, 2, "format 'onnx' is unknown; choose from compressed-tensors, gptqmodel")
    assert not (bitrank.folder / "file").exists()


@pytest.mark.parametrize("where", [(), ("--server", "http://127.0.0.1:9")])
def test_an_unknown_target_is_wrong_usage(bitrank: CommandLine, road: Road, where: tuple[str, ...]) -> None:
    """Known before any profile is read or any server is asked."""
    outcome = bitrank("plan", "nowhere", "--budget", "3bpw", "--target", "onnx", *where)
    said(outcome, 2, "target 'onnx' is unknown; choose from " + ", ".join(TARGETS))
    assert not (bitrank.folder / "plan.json").exists()


def test_a_target_that_makes_the_budget_infeasible_names_the_smallest(
    bitrank: CommandLine, road: Road
) -> None:
    arguments = ("plan", road.profile, "--target", "vllm", "--budget")
    outcome = bitrank(*arguments, "3bpw")
    said(outcome, 3, "smallest feasible plan takes", "raise the budget")
    smallest = outcome.complaint.split("takes ")[1].split(" bytes")[0].replace(",", "")
    assert bitrank(*arguments, f"{smallest}B").code == 0
    assert bitrank(*arguments, f"{int(smallest) - 1}B").code == 3


def test_a_format_that_cannot_carry_ranks_is_refused(bitrank: CommandLine, road: Road) -> None:
    assert bitrank("plan", road.profile, "--strategy", "uniform:3:r4").code == 0
    outcome = bitrank("export", "plan.json", "--format", "gptqmodel", "-o", "file")
    said(outcome, 1, "GPTQModel cannot carry low-rank corrections", "plan again with --target gptqmodel")
    assert not (bitrank.folder / "file").exists()


def test_a_strategy_that_the_target_does_not_offer_is_refused(bitrank: CommandLine, road: Road) -> None:
    outcome = bitrank("plan", road.profile, "--strategy", "uniform:3", "--target", "vllm")
    said(outcome, 2, "does not offer 3 bits", "it offers")
    assert not (bitrank.folder / "plan.json").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--format", "compressed-tensors"), 2, "name it with -o"),
        (("--format", "gptqmodel", "-o", "out"), 2, "holds no weights; leave --checkpoint out"),
    ],
)
def test_exporting_weights_needs_a_format_with_weights_and_an_output(
    bitrank: CommandLine, road: Road, arguments: tuple[str, ...], code: int, words: str
) -> None:
    said(bitrank("export", road.plan, "--checkpoint", road.checkpoint, *arguments), code, words)
    assert not (bitrank.folder / "out").exists()


def test_a_checkpoint_of_another_plan_is_not_exported(bitrank: CommandLine, road: Road) -> None:
    assert bitrank("plan", road.profile, "--budget", "4bpw").code == 0
    arguments = ("export", "plan.json", "--format", "compressed-tensors", "--checkpoint", road.checkpoint)
    said(bitrank(*arguments, "-o", "out"), 1, "not made from this plan")
    assert not (bitrank.folder / "out").exists()


def test_a_plan_for_llama_cpp_is_not_compressed(bitrank: CommandLine, road: Road) -> None:
    """No row of this model is a whole block of 256, so all of it stays at 16 bits."""
    plan = ("plan", road.profile, "--budget", "100%", "--target", "llama.cpp")
    assert bitrank(*plan).code == 0
    outcome = bitrank("compress", "plan.json", "-o", "out", "--profile", road.profile)
    said(outcome, 1, "the plan is for llama.cpp", "--format llama-quantize")
    assert not (bitrank.folder / "out").exists()


def test_a_full_disk_leaves_no_export(bitrank: CommandLine, road: Road) -> None:
    pytest.importorskip("compressed_tensors", reason="needs the extra `export`")
    arguments = ("export", road.plan, "--format", "compressed-tensors", "--checkpoint", road.checkpoint)
    outcome = bitrank(*arguments, "-o", "out", file_bytes=10_000)
    said(outcome, 1, "free some space")
    assert not (bitrank.folder / "out").exists()
    assert bitrank(*arguments, "-o", "out").code == 0
    assert not (bitrank.folder / "out.partial").exists()
