"""The HTTP API against a real server process."""

from __future__ import annotations

import csv
import json
import threading
import time
from hashlib import sha256
from io import BytesIO, StringIO
from pathlib import Path

import httpx
import pyarrow.parquet as parquet
import pytest
from command_line import CommandLine
from road import Road
from service_process import ServiceProcess

from allocator.plan import MIB, Plan
from api.services.usecases import plan_budget
from benchmarks.cluster import Cluster, binary
from profiler.documents.profile import load_profile
from profiler.documents.sidecar import CliffDocument, Cut, GroupCliff
from profiler.statistics.estimate import Estimate

pytestmark = pytest.mark.alone


def submitted(client: httpx.Client) -> httpx.Response:
    return client.post("/v1/profiles", json={"model": "demo", "settings": {"tokens": 1024}})


def events_of(text: str) -> list[dict[str, str]]:
    blocks = [block for block in text.split("\n\n") if block.strip() and not block.startswith(":")]
    return [dict(line.split(": ", 1) for line in block.splitlines()) for block in blocks]


def test_a_plan_of_a_known_profile_is_made_at_once(client: httpx.Client, road: Road) -> None:
    made = client.post("/v1/plans", json={"model": "model", "budget": "3.4bpw"})
    expected = plan_budget(load_profile(road.profile), "3.4bpw")
    assert made.status_code == 201
    assert made.content == expected.document()


def test_a_plan_has_the_bytes_that_the_command_line_writes(
    client: httpx.Client, bitrank: CommandLine, road: Road, tmp_path: Path
) -> None:
    for number, budget in enumerate(("2.9bpw", "3.45bpw", "95%")):
        made = client.post("/v1/plans", json={"model": "model", "budget": budget})
        bitrank("plan", road.profile, "--budget", budget, "-o", tmp_path / f"{number}.json")
        assert (tmp_path / f"{number}.json").read_bytes() == made.content


def test_an_answered_plan_outlives_a_killed_server(road: Road, tmp_path: Path) -> None:
    first = ServiceProcess(tmp_path / "data", "--profile", road.profile)
    made = first.client.post("/v1/plans", json={"model": "model", "budget": "3.21bpw"})
    first.kill()
    second = ServiceProcess(tmp_path / "data")
    assert second.client.get(made.headers["location"]).content == made.content
    second.stop()


def test_a_plan_is_addressed_by_the_digest_of_its_bytes(client: httpx.Client, tmp_path: Path) -> None:
    made = client.post("/v1/plans", json={"model": "model", "budget": "3.3bpw"})
    read = client.get(made.headers["location"])
    assert read.content == made.content
    assert made.headers["location"] == f"/v1/plans/{sha256(read.content).hexdigest()[:32]}"
    Plan.model_validate_json(read.content).save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_bytes() == read.content


def test_the_same_request_gives_the_same_plan(client: httpx.Client) -> None:
    request = {"model": "model", "budget": "3.1bpw"}
    first, second = (client.post("/v1/plans", json=request) for _ in range(2))
    assert first.headers["location"] == second.headers["location"]


def test_a_uniform_strategy_needs_no_budget(client: httpx.Client) -> None:
    made = client.post("/v1/plans", json={"model": "model", "strategy": "uniform:3"}).json()
    assert {layer["bits"] for layer in made["layers"].values()} == {3}


def test_constraints_are_respected(client: httpx.Client) -> None:
    pins = [{"layers": "*.layers.1.*", "bits": 4}]
    request = {"model": "model", "budget": "3.5bpw", "constraints": {"pins": pins}}
    made = client.post("/v1/plans", json=request)
    assert made.status_code == 201, made.text
    assert {p["bits"] for name, p in made.json()["layers"].items() if ".layers.1." in name} == {4}


def test_a_model_without_a_profile_becomes_a_job(client: httpx.Client) -> None:
    answer = client.post("/v1/plans", json={"model": "demo", "budget": "3bpw"})
    assert answer.status_code == 202
    assert int(answer.headers["retry-after"]) > 0
    job = client.get(answer.headers["location"]).json()
    assert (job["kind"], job["state"], job["request"]["budget"]) == ("plan", "queued", "3bpw")


def test_an_etag_that_matches_is_answered_with_304(
    client: httpx.Client, plan_id: str, profile_id: str
) -> None:
    for path in (f"/v1/plans/{plan_id}", f"/v1/profiles/{profile_id}", f"/v1/profiles/{profile_id}/frontier"):
        etag = client.get(path).headers["etag"]
        assert client.get(path, headers={"If-None-Match": etag}).status_code == 304
        assert client.get(path, headers={"If-None-Match": '"other"'}).status_code == 200


def test_an_explanation_sets_marginal_gains_against_the_shadow_price(
    client: httpx.Client, plan_id: str
) -> None:
    answer = client.get(f"/v1/plans/{plan_id}/explain").json()
    plan = client.get(f"/v1/plans/{plan_id}").json()
    assert answer["shadow_price"] == plan["shadow_price"]
    assert [layer["layer"] for layer in answer["layers"]] == list(plan["layers"])
    for layer in answer["layers"]:
        for move in filter(None, (layer["better"], layer["worse"])):
            rate = -move["kl_change"] / move["bytes_change"] * MIB
            assert move["nats_per_mib"] == pytest.approx(rate)
        if layer["better"]:
            assert layer["better"]["option"]["total_bytes"] > layer["chosen"]["total_bytes"]


def test_an_explanation_of_one_layer(client: httpx.Client, plan_id: str) -> None:
    found = client.get(f"/v1/plans/{plan_id}/explain", params={"layer": "*.1.mlp.up_proj"}).json()["layers"]
    assert [layer["layer"] for layer in found] == ["model.layers.1.mlp.up_proj"]


def test_a_diff_accounts_for_every_byte_and_nat(client: httpx.Client, plan_id: str) -> None:
    made = client.post("/v1/plans", json={"model": "model", "budget": "4bpw"})
    other_id = made.headers["location"].rpartition("/")[2]
    before, after = client.get(f"/v1/plans/{plan_id}").json(), made.json()
    found = client.get(f"/v1/plans/{plan_id}/diff/{other_id}").json()
    assert found["bytes_change"] == after["total_bytes"] - before["total_bytes"] > 0
    assert sum(change["bytes_change"] for change in found["changed"]) == found["bytes_change"]
    assert sum(change["kl_change"] for change in found["changed"]) == pytest.approx(found["kl_change"])
    assert found["unchanged_layers"] + len(found["changed"]) == len(before["layers"])


def test_profiles_are_listed_and_read(client: httpx.Client, profile_id: str, road: Road) -> None:
    answer = client.get(f"/v1/profiles/{profile_id}").json()
    profile = load_profile(road.profile)
    assert answer["id"] == profile.sha256
    assert [layer["name"] for layer in answer["layers"]] == list(profile.document.layers)
    assert {"demo", "model"} <= set(client.get("/v1/profiles").json()["models"])
    assert client.get("/v1/profiles", params={"model": "other"}).json()["profiles"] == []


def test_curves_hold_measured_points_and_predictions_at_any_bits_and_rank(
    client: httpx.Client, profile_id: str, road: Road
) -> None:
    name = "model.layers.0.mlp.up_proj"
    wanted = {"layer": name, "bits": [2.5, 7], "rank": [3]}
    curve = client.get(f"/v1/profiles/{profile_id}/curves", params=wanted).json()["curves"][0]
    profile = load_profile(road.profile)
    fit = profile.document.layers[name].fit
    assert [m["error"] for m in curve["measured"]] == [m.error for m in profile.measurements[name]]
    assert [(p["bits"], p["rank"]) for p in curve["predicted"]] == [(2.5, 3), (7, 3)]
    for point in curve["predicted"]:
        assert point["error"] == fit.error(point["bits"], 3, 64)
        assert point["interval"]["low"] <= point["error"] <= point["interval"]["high"]


def test_curves_are_the_same_in_every_format(client: httpx.Client, profile_id: str) -> None:
    path = f"/v1/profiles/{profile_id}/curves"
    text = client.get(path, headers={"Accept": "text/csv"})
    table = client.get(path, headers={"Accept": "application/vnd.apache.parquet"})
    rows = list(csv.DictReader(StringIO(text.text)))
    columns = parquet.read_table(BytesIO(table.content)).to_pylist()
    document = client.get(path).json()["curves"]
    assert text.headers["content-type"].startswith("text/csv")
    assert [float(row["error"]) for row in rows] == [row["error"] for row in columns]
    assert len(rows) == sum(len(c["measured"]) + len(c["predicted"]) for c in document)


def test_the_frontier_falls_and_lies_below_uniform(client: httpx.Client, profile_id: str) -> None:
    answer = client.get(f"/v1/profiles/{profile_id}/frontier").json()
    losses = [point["kl_nats"] for point in answer["optimal"]]
    assert losses == sorted(losses, reverse=True)
    for uniform in answer["uniform"]:
        affordable = [p["kl_nats"] for p in answer["optimal"] if p["total_bytes"] <= uniform["total_bytes"]]
        assert min(affordable, default=0) <= uniform["kl_nats"] * 1.05


def test_fidelity_is_the_measured_one_of_every_block_with_its_interval(
    client: httpx.Client, profile_id: str, road: Road
) -> None:
    answer = client.get(f"/v1/profiles/{profile_id}/fidelity").json()
    blocks = answer["blocks"]
    assert answer["source"] == "measured"
    assert [block["block"] for block in blocks] == [0, 1]
    assert all(b["interval"]["low"] <= b["kl_nats"] <= b["interval"]["high"] for b in blocks)
    assert answer["measured"] == json.loads((road.profile / "fidelity.json").read_text())
    assert blocks[0]["kl_nats"] == answer["measured"]["blocks"][0]["probe_kl"]["mean"]


def test_the_spectrum_has_every_layer_and_no_cliff_until_one_is_measured(
    client: httpx.Client, service: ServiceProcess, profile_id: str, road: Road
) -> None:
    path = f"/v1/profiles/{profile_id}/spectrum"
    before = client.get(path)
    assert before.json()["spectrum"] == json.loads((road.profile / "spectrum.json").read_text())
    assert before.json()["cliff"] is None
    beside = service.data_dir / "profiles" / profile_id / "cliff.json"
    write_cliff(beside, road)
    after = client.get(path, headers={"If-None-Match": before.headers["etag"]})
    assert after.status_code == 200
    assert after.json()["cliff"]["groups"][0]["group"] == "q_proj"
    beside.unlink()


def write_cliff(path: Path, road: Road) -> None:
    cut = Cut(0.5, 0.9, Estimate(0.1, 0.05, 0.15), 0.2)
    CliffDocument(
        model=load_profile(road.profile).document.model,
        text="text",
        windows=2,
        window_tokens=64,
        threshold_kl=0.05,
        energy_share=0.95,
        confidence=0.9,
        prompts=2,
        new_tokens=8,
        ngram=4,
        groups=(GroupCliff("q_proj", 64, (cut,), cut, 0.7, 0.97, False),),
    ).save(path)


def test_a_profile_without_measurements_predicts_fidelity_and_lacks_spectra(
    client: httpx.Client, service: ServiceProcess, profile_id: str
) -> None:
    beside = service.data_dir / "profiles" / profile_id
    texts = {name: (beside / name).read_text() for name in ("fidelity.json", "spectrum.json")}
    measured = client.get(f"/v1/profiles/{profile_id}/fidelity")
    for name in texts:
        (beside / name).unlink()
    predicted = client.get(f"/v1/profiles/{profile_id}/fidelity")
    assert (predicted.json()["source"], predicted.json()["measured"]) == ("predicted", None)
    assert predicted.headers["etag"] != measured.headers["etag"]
    for low, block, high in (
        (block["interval"]["low"], block["kl_nats"], block["interval"]["high"])
        for block in predicted.json()["blocks"]
    ):
        assert low <= block <= high
    lacking = client.get(f"/v1/profiles/{profile_id}/spectrum")
    assert lacking.status_code == 404
    assert lacking.json()["type"] == "urn:bitrank:problem:not-measured"
    assert "bitrank spectrum MODEL" in lacking.json()["detail"]
    (beside / "fidelity.json").write_text(texts["fidelity.json"].replace("64", "65", 1))
    damaged = client.get(f"/v1/profiles/{profile_id}/fidelity")
    assert damaged.status_code == 422
    assert "measure it again" in damaged.json()["detail"]
    for name, text in texts.items():
        (beside / name).write_text(text)
    assert client.get(f"/v1/profiles/{profile_id}/fidelity").headers["etag"] == measured.headers["etag"]


def test_a_preview_is_the_plan_without_being_stored(client: httpx.Client, profile_id: str) -> None:
    preview = client.get(f"/v1/profiles/{profile_id}/preview", params={"budget": "3.77bpw"})
    plan_id = preview.headers["etag"].strip('"')
    assert client.get(f"/v1/plans/{plan_id}").status_code == 404
    made = client.post("/v1/plans", json={"model": "model", "budget": "3.77bpw"})
    assert made.content == preview.content
    assert made.headers["location"] == f"/v1/plans/{plan_id}"


def test_probes_are_measured_beside_their_predictions(
    client: httpx.Client, profile_id: str, road: Road
) -> None:
    measured = client.get(f"/v1/profiles/{profile_id}/measured").json()["measured"]
    probes = load_profile(road.profile).document.probes
    assert [point["kl_nats"] for point in measured] == [probe.measured_kl for probe in probes]
    assert all(point["plan"] is None and point["predicted_kl"] > 0 for point in measured)


def test_an_idempotency_key_carries_a_request_out_once(client: httpx.Client) -> None:
    headers, body = {"Idempotency-Key": "once"}, {"model": "demo"}
    first, second = (client.post("/v1/profiles", json=body, headers=headers) for _ in range(2))
    assert first.headers["location"] == second.headers["location"]
    assert second.content == first.content
    assert second.headers["idempotency-replayed"] == "true"


def test_every_post_repeats_its_answer_under_one_idempotency_key(client: httpx.Client, plan_id: str) -> None:
    job = submitted(client).headers["location"]
    bodies: dict[str, dict[str, object] | None] = {
        "/v1/plans": {"model": "model", "budget": "3.5bpw"},
        "/v1/profiles": {"model": "demo"},
        "/v1/batches": {"jobs": [{"model": "model", "budgets": ["3bpw"]}]},
        "/v1/compressions": {"plan": plan_id},
        "/v1/evaluations": {"plan": plan_id},
        "/v1/jobs/{job_id}/cancel": None,
    }
    operations = client.get("/openapi.json").json()["paths"]
    assert {path for path, methods in operations.items() if "post" in methods} == set(bodies)
    for path, body in bodies.items():
        documented = [parameter["name"].lower() for parameter in operations[path]["post"]["parameters"]]
        assert "idempotency-key" in documented, path
        address = path.replace("/v1/jobs/{job_id}", job)
        headers = {"Idempotency-Key": f"every {path}"}
        first, second = (client.post(address, json=body, headers=headers) for _ in range(2))
        assert first.is_success and "idempotency-replayed" not in first.headers, first.text
        assert (second.status_code, second.content) == (first.status_code, first.content)
        assert second.headers["idempotency-replayed"] == "true"


def test_concurrent_requests_with_one_key_make_one_job(client: httpx.Client, service: ServiceProcess) -> None:
    answers: list[httpx.Response] = []

    def send() -> None:
        headers = {"Idempotency-Key": "race"}
        answers.append(httpx.post(f"{service.url}/v1/profiles", json={"model": "demo"}, headers=headers))

    threads = [threading.Thread(target=send) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made = {a.headers["location"] for a in answers if a.status_code == 202}
    assert len(made) == 1
    assert {a.status_code for a in answers} <= {202, 409}


def test_a_job_is_followed_until_it_is_cancelled(client: httpx.Client) -> None:
    job = submitted(client).headers["location"]
    stop = threading.Timer(0.5, client.post, (f"{job}/cancel",))
    stop.start()
    events = events_of(client.get(f"{job}/events").text)
    assert [event["event"] for event in events] == ["queued", "cancelled"]
    assert [event["id"] for event in events] == ["1", "2"]
    assert json.loads(events[-1]["data"])["state"] == "cancelled"
    assert client.get(job).json()["state"] == "cancelled"


def test_a_stream_goes_on_after_the_last_event_seen(client: httpx.Client) -> None:
    job = submitted(client).headers["location"]
    client.post(f"{job}/cancel")
    resumed = events_of(client.get(f"{job}/events", headers={"Last-Event-ID": "1"}).text)
    assert [event["event"] for event in resumed] == ["cancelled"]
    assert events_of(client.get(f"{job}/events", headers={"Last-Event-ID": "2"}).text) == []


def test_jobs_are_paged_without_gaps_or_repeats(client: httpx.Client) -> None:
    made = {submitted(client).json()["id"] for _ in range(5)}
    seen: list[str] = []
    cursor = None
    while True:
        page = client.get("/v1/jobs", params={"limit": 2, **({"cursor": cursor} if cursor else {})}).json()
        seen += [job["id"] for job in page["jobs"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert made <= set(seen)
    assert len(seen) == len(set(seen))


def test_a_batch_is_one_job(client: httpx.Client) -> None:
    jobs = [{"model": "model", "budgets": ["3bpw", "4bpw"]}, {"model": "demo", "budgets": ["25%"]}]
    answer = client.post("/v1/batches", json={"jobs": jobs})
    assert answer.status_code == 202
    assert answer.json()["kind"] == "batch"


def test_a_stored_plan_can_be_compressed_and_evaluated(client: httpx.Client, plan_id: str) -> None:
    for path, kind in (("/v1/compressions", "compression"), ("/v1/evaluations", "evaluation")):
        answer = client.post(path, json={"plan": plan_id})
        assert (answer.status_code, answer.json()["kind"]) == (202, kind)


def test_probes_and_metrics(client: httpx.Client, plan_id: str) -> None:
    assert client.get("/healthz").json() == client.get("/readyz").json() == {"status": "ok"}
    client.get(f"/v1/plans/{plan_id}")
    text = client.get("/metrics").text
    assert 'bitrank_http_requests_total{method="GET",route="/v1/plans/{plan_id}",status="200"}' in text
    assert "bitrank_plan_seconds_count" in text
    assert "bitrank_queue_depth" in text


def test_a_request_id_is_kept_or_given(client: httpx.Client) -> None:
    assert client.get("/healthz", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert len(client.get("/healthz", headers={"X-Request-Id": "no spaces"}).headers["x-request-id"]) == 32


def test_the_log_is_json_with_request_ids(client: httpx.Client, service: ServiceProcess) -> None:
    client.get("/v1/nothing", headers={"X-Request-Id": "find-me"})
    found: list[dict[str, object]] = []
    deadline = time.monotonic() + 5
    while not found and time.monotonic() < deadline:  # written after the answer was sent
        lines = [json.loads(line) for line in service.log.splitlines()]
        found = [line for line in lines if line.get("request_id") == "find-me"]
    assert [(line["status"], line["level"]) for line in found] == [(404, "info")]


def test_the_page_and_the_documentation_load_nothing_from_elsewhere(client: httpx.Client) -> None:
    for path in ("/", "/docs"):
        answer = client.get(path)
        policy = answer.headers["content-security-policy"]
        assert answer.status_code == 200
        assert "script-src 'self';" in policy and "default-src 'none'" in policy
        assert 'src="http' not in answer.text and 'href="http' not in answer.text


def test_the_openapi_document_describes_every_error_as_a_problem(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    for path, methods in document["paths"].items():
        for operation in methods.values():
            for status, answer in operation["responses"].items():
                if int(status) >= 400:
                    assert list(answer["content"]) == ["application/problem+json"], (path, status)


def test_a_server_is_ready_only_while_its_database_answers(tmp_path: Path) -> None:
    try:
        binary("initdb")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    cluster = Cluster()
    server = ServiceProcess(tmp_path / "data", BITRANK_DATABASE_URL=cluster.url)
    try:
        assert server.client.get("/readyz").status_code == 200
        cluster.stop()
        away = server.client.get("/readyz")
        assert (away.status_code, away.headers["content-type"]) == (503, "application/problem+json")
        assert away.json()["type"] == "urn:bitrank:problem:unavailable"
        assert int(away.headers["retry-after"]) > 0
        assert server.client.get("/healthz").status_code == 200
        cluster.start()
        assert server.client.get("/readyz").status_code == 200
    finally:
        server.stop()
        cluster.remove()


def test_plans_survive_a_restart(road: Road, tmp_path: Path) -> None:
    first = ServiceProcess(tmp_path / "data", "--profile", road.profile)
    made = first.client.post("/v1/plans", json={"model": "model", "budget": "3bpw"})
    first.stop()
    second = ServiceProcess(tmp_path / "data")
    try:
        assert second.client.get(made.headers["location"]).content == made.content
        again = second.client.post("/v1/plans", json={"model": "model", "budget": "3bpw"})
        assert again.headers["location"] == made.headers["location"]
    finally:
        second.stop()
