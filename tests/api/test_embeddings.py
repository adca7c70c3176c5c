"""--embeddings: on the command line, over HTTP, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree

import httpx
import pytest
from command_line import CommandLine
from road import Road

from allocator.plan import Plan, load_plan
from api.http.routes.profiles import described_tables
from api.jobs.tasks import planned
from api.schemas.jobs import PlanJob
from api.services.usecases import compress_plan, evaluate_model, plan_budget
from profiler.documents.profile import Profile, load_profile
from profiler.documents.sidecar import TablesDocument
from profiler.model.checkpoint import tensor_bytes
from profiler.statistics.calibration import silent

TABLE = "model.embed_tokens"
BUDGET = "5bpw"


@pytest.fixture(scope="module")
def profile(road: Road) -> Profile:
    return load_profile(road.profile)


@pytest.fixture(scope="module")
def expected(profile: Profile) -> Plan:
    return plan_budget(profile.with_tables, BUDGET)


def test_the_road_with_embeddings_ends_in_a_checkpoint_of_the_planned_bytes(
    bitrank: CommandLine, road: Road, expected: Plan, tmp_path: Path
) -> None:
    plan, checkpoint = tmp_path / "plan.json", tmp_path / "small"
    assert bitrank("plan", road.profile, "--budget", BUDGET, "--embeddings", "-o", plan).code == 0
    assert load_plan(plan) == expected
    assert expected.layers[TABLE].bits < 16
    compress_plan(plan, checkpoint, silent, road.profile)
    assert tensor_bytes(checkpoint) == expected.total_bytes
    found = evaluate_model(str(checkpoint), str(road.model), road.text, 2048, silent)
    assert found.tensor_bytes == expected.total_bytes
    assert 1 / 2 < found.kl_nats / expected.predicted_kl < 2


def test_the_frontier_with_embeddings_reaches_smaller_sizes(bitrank: CommandLine, road: Road) -> None:
    without, with_tables = (
        json.loads(bitrank("frontier", road.profile, "--json", *flag).stdout)
        for flag in ((), ("--embeddings",))
    )
    assert with_tables["frontier"][0]["total_bytes"] < without["frontier"][0]["total_bytes"]
    assert [p["kl_nats"] for p in with_tables["uniform"]] == [p["kl_nats"] for p in without["uniform"]]


def test_compare_sets_strategies_beside_an_optimum_that_has_the_table(
    bitrank: CommandLine, road: Road
) -> None:
    outcome = bitrank("compare", road.profile, "uniform:3", "--embeddings", "--json")
    (pair,) = json.loads(outcome.stdout)["comparisons"]
    assert pair["optimum"]["total_bytes"] <= pair["plan"]["total_bytes"]
    assert pair["optimum"]["measured_kl"] < pair["plan"]["measured_kl"]


def test_a_profile_of_an_earlier_version_is_refused_in_one_line(
    bitrank: CommandLine, road: Road, tmp_path: Path
) -> None:
    copytree(road.profile, tmp_path / "old")
    (tmp_path / "old" / TablesDocument.file_name).unlink()
    outcome = bitrank("plan", tmp_path / "old", "--budget", BUDGET, "--embeddings", "-o", tmp_path / "p.json")
    assert outcome.code == 1
    assert outcome.stderr.count("\n") == 1
    assert "has no measured tables; profile it again" in outcome.stderr
    assert not (tmp_path / "p.json").exists()


def test_a_target_that_keeps_tables_is_refused_at_planning(bitrank: CommandLine, road: Road) -> None:
    outcome = bitrank("plan", road.profile, "--budget", "90%", "--embeddings", "--target", "vllm")
    assert outcome.code == 2
    assert "target vllm holds embeddings and output heads at 16 bits only" in outcome.stderr


def test_a_job_plans_as_the_command_line_does(profile: Profile, expected: Plan) -> None:
    assert planned(PlanJob(model="model", budget=BUDGET, embeddings=True), profile) == expected
    assert planned(PlanJob(model="model", budget=BUDGET), profile) == plan_budget(profile, BUDGET)


def test_over_http_embeddings_are_a_field_of_the_request(client: httpx.Client, expected: Plan) -> None:
    request = {"model": "model", "budget": BUDGET}
    made = client.post("/v1/plans", json=request | {"embeddings": True})
    assert made.status_code == 201, made.text
    assert made.content == expected.document()
    assert client.post("/v1/plans", json=request | {"embeddings": False}).json() == (
        client.post("/v1/plans", json=request).json()
    )
    explained = client.get(f"{made.headers['location']}/explain", params={"layer": TABLE}).json()
    assert [layer["layer"] for layer in explained["layers"]] == [TABLE]
    refused = client.post("/v1/plans", json=request | {"embeddings": True, "target": "gptqmodel"})
    assert refused.json()["type"].endswith("target")


def test_over_http_the_frontier_offers_tables_where_it_is_asked_to(
    bitrank: CommandLine, road: Road, client: httpx.Client, profile_id: str
) -> None:
    path, asked = f"/v1/profiles/{profile_id}/frontier", {"embeddings": "true"}
    found, without = client.get(path, params=asked), client.get(path)
    expected = json.loads(bitrank("frontier", road.profile, "--json", "--embeddings").stdout)["frontier"]
    assert found.json()["optimal"] == expected != without.json()["optimal"]
    assert found.headers["etag"] != without.headers["etag"]


@pytest.mark.parametrize("text", [None, "{"])
def test_a_profile_whose_tables_cannot_be_read_is_described_without_them(
    road: Road, tmp_path: Path, text: str | None
) -> None:
    copytree(road.profile, tmp_path / "old")
    file = tmp_path / "old" / TablesDocument.file_name
    file.unlink()
    if text is not None:
        file.write_text(text)
    assert described_tables(load_profile(tmp_path / "old")) is None
    found = described_tables(load_profile(road.profile))
    assert found is not None and found.names == [TABLE]


def test_over_http_an_export_that_cannot_hold_tables_says_so(client: httpx.Client) -> None:
    made = client.post("/v1/plans", json={"model": "model", "budget": BUDGET, "embeddings": True})
    answer = client.get(f"{made.headers['location']}/export", params={"format": "llm-compressor"})
    assert "plan without --embeddings" in answer.json()["detail"]
