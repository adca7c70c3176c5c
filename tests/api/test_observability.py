"""What operators see of a job from its request to its result: metrics that move, logs and traces with its id."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families
from service_process import ServiceProcess, command, environment

from benchmarks.installation import GRID, write_small_model

pytestmark = pytest.mark.alone

PATIENCE_SECONDS = 240


class Collector:
    """An OTLP endpoint on loopback that keeps every span."""

    def __init__(self) -> None:
        self.spans: list[dict[str, Any]] = []
        spans = self.spans

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    for scope in resource.scope_spans:
                        spans.extend(map(read_span, scope.spans))
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *arguments: object) -> None:
                return None

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def read_span(span: Any) -> dict[str, Any]:
    attributes = {pair.key: pair.value.string_value for pair in span.attributes}
    return {"name": span.name, "trace": span.trace_id.hex(), **attributes}


@dataclass(frozen=True)
class Observed:
    """One profile, two plans and an evaluation, as seen from outside."""

    key: str
    profile_job: str
    metrics: list[dict[str, float]]
    server_log: list[dict[str, Any]]
    worker_log: list[dict[str, Any]]
    spans: list[dict[str, Any]]


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    folder, collector = tmp_path_factory.mktemp("observed"), Collector()
    write_small_model(folder / "models" / "small", 1)
    variables = {
        "BITRANK_MODEL_ROOTS": str(folder / "models"),
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }
    data = folder / "data"
    made = subprocess.run(
        command("keys", "create", "ann", "--scopes", "read,plan,compress"),
        env=environment(data),
        capture_output=True,
        text=True,
        check=True,
    )
    key = made.stdout.strip()
    service = ServiceProcess(data, **variables)
    service.client.headers["Authorization"] = f"Bearer {key}"
    metrics = [read_metrics(service.client)]
    answer = service.client.post(
        "/v1/profiles", json={"model": "small", "settings": GRID}, headers={"X-Request-Id": "the-first"}
    )
    profile_job = answer.json()["id"]
    metrics.append(read_metrics(service.client))
    worker_log = folder / "worker.log"
    worker = subprocess.Popen(
        [sys.executable, "-m", "api.cli.jobs", "worker"],
        env=environment(data, **variables) | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=worker_log.open("wb"),
    )
    follow(service.client, answer)
    planned = service.client.post("/v1/plans", json={"model": "small", "budget": "3.3bpw"})
    assert planned.status_code == 201, planned.text
    plan = planned.headers["location"].rpartition("/")[2]
    follow(service.client, service.client.post("/v1/evaluations", json={"plan": plan, "tokens": 256}))
    metrics.append(read_metrics(service.client))
    worker.terminate()
    worker.wait(30)
    service.stop()
    collector.close()
    logs = (
        [json.loads(line) for line in text.splitlines()] for text in (service.log, worker_log.read_text())
    )
    yield Observed(key, profile_job, metrics, *logs, collector.spans)


def follow(client: httpx.Client, submitted: httpx.Response) -> None:
    """Read the job's events until it ends."""
    job = submitted.headers["location"]
    client.get(f"{job}/events", timeout=PATIENCE_SECONDS)
    record = client.get(job).json()
    assert record["state"] == "done", record


def read_metrics(client: httpx.Client) -> dict[str, float]:
    """Values by name and labels, as Prometheus reads them."""
    found = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            labels = ",".join(sample.labels[name] for name in sorted(sample.labels))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_metrics_follow_a_job(observed: Observed) -> None:
    before, waiting, after = observed.metrics
    assert before["bitrank_queue_depth"] == after["bitrank_queue_depth"] == 0
    assert waiting["bitrank_queue_depth"] == 1
    assert waiting["bitrank_jobs{profile,queued}"] == 1
    assert "bitrank_jobs{profile,queued}" not in after
    assert after["bitrank_jobs{profile,done}"] == after["bitrank_jobs{evaluation,done}"] == 1
    assert before["bitrank_profile_seconds"] == 0 < after["bitrank_profile_seconds"] < PATIENCE_SECONDS
    assert before["bitrank_predicted_over_measured_kl"] == 0
    assert 0.1 < after["bitrank_predicted_over_measured_kl"] < 10
    assert before["bitrank_plan_seconds_count"] == 0
    assert after["bitrank_plan_seconds_count"] == 1
    assert after["bitrank_http_requests_total{POST,/v1/plans,201}"] == 1
    assert after["bitrank_http_request_seconds_count{/v1/plans}"] == 1


def test_a_job_is_found_in_the_log_of_every_process_that_touched_it(observed: Observed) -> None:
    submitted = [line for line in observed.server_log if line.get("job_id") == observed.profile_job]
    assert submitted[0]["request_id"] == "the-first"
    assert submitted[0]["event"] == "request"
    computed = [line for line in observed.worker_log if line.get("job_id") == observed.profile_job]
    assert [line["task"] for line in computed] == ["begin", "block", "finish"]
    (started,) = [line for line in observed.worker_log if line["event"] == "working"]
    assert {line["worker"] for line in computed} == {started["worker"]}
    assert all(line["seconds"] >= 0 and line["timestamp"] and line["level"] == "info" for line in computed)


def test_all_tasks_of_a_job_are_one_trace_named_by_the_job(observed: Observed) -> None:
    trace = UUID(observed.profile_job).hex
    tasks = [span for span in observed.spans if span["trace"] == trace]
    assert [span["name"] for span in tasks] == ["task begin", "task block", "task finish"]
    assert {span["bitrank.job_id"] for span in tasks} == {observed.profile_job}


def test_requests_are_traced_with_their_request_and_job(observed: Observed) -> None:
    (span,) = [span for span in observed.spans if span.get("bitrank.request_id") == "the-first"]
    assert span["name"] == "POST /v1/profiles"
    assert span["bitrank.job_id"] == observed.profile_job
    assert not [span for span in observed.spans if "/metrics" in span["name"]]


def test_no_secret_is_logged_counted_or_traced(observed: Observed) -> None:
    for seen in (observed.server_log, observed.worker_log, observed.spans, observed.metrics):
        assert observed.key not in json.dumps(seen)


def test_an_endpoint_without_the_extra_is_a_warning_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "opentelemetry").mkdir()
    (tmp_path / "opentelemetry" / "__init__.py").write_text("")
    script = "\n".join(
        (
            "from api.observability.tracing import start_tracing, task_span",
            "start_tracing('x')",
            "with task_span('j', 't', 'w'): print('computed')",
        )
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ
        | {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
        | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "computed" in done.stdout
    assert "bitrank[otel]" in done.stdout + done.stderr
