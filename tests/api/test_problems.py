"""Bad requests: each is answered with the right problem document, and others are answered meanwhile."""

from __future__ import annotations

import socket
from typing import Any

import httpx
import pytest
from service_process import ServiceProcess

pytestmark = pytest.mark.alone

PLAN = {"model": "model", "budget": "3bpw"}


def problem(answer: httpx.Response) -> tuple[int, str]:
    """Status and kind, of an answer that is a whole problem document."""
    document = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert document["status"] == answer.status_code
    assert document["title"] and document["detail"]
    return answer.status_code, document["type"].removeprefix("urn:bitrank:problem:")


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/v1/nothing", (404, "not-found")),
        ("GET", "/static/nothing.js", (404, "not-found")),
        ("GET", "/static/../app.py", (404, "not-found")),
        ("GET", "/static/%2e%2e/app.py", (404, "not-found")),
        ("PUT", "/v1/plans", (405, "method-not-allowed")),
        ("GET", f"/v1/plans/{'0' * 32}", (404, "unknown-plan")),
        ("GET", f"/v1/profiles/{'0' * 64}", (404, "unknown-profile")),
        ("GET", "/v1/jobs/none", (404, "unknown-job")),
        ("GET", "/v1/jobs/none/events", (404, "unknown-job")),
        ("POST", "/v1/jobs/none/cancel", (404, "unknown-job")),
        ("GET", "/v1/jobs?cursor=x", (422, "invalid-request")),
        ("GET", "/v1/jobs?limit=0", (422, "invalid-request")),
        ("GET", "/v1/jobs?state=lost", (422, "invalid-request")),
    ],
)
def test_addresses_that_lead_nowhere(
    client: httpx.Client, method: str, path: str, expected: tuple[int, str]
) -> None:
    answer = client.request(method, path)
    assert problem(answer) == expected
    assert answer.status_code != 405 or answer.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"budget": "lots"}, "budget-syntax"),
        ({"budget": "nanbpw"}, "budget-syntax"),
        ({"budget": "-3bpw"}, "budget-syntax"),
        ({"budget": "1e400bpw"}, "budget-syntax"),
        ({"budget": "InfinityMiB"}, "budget-syntax"),
        ({"budget": None}, "budget-syntax"),
        ({"budget": "1KB"}, "infeasible"),
        ({"budget": "900GB"}, "budget-above-original"),
        ({"strategy": "best"}, "strategy"),
        ({"strategy": "uniform:7"}, "strategy"),
        ({"constraints": {"pins": [{"layers": "nowhere.*", "bits": 3}]}}, "constraint"),
        ({"constraints": {"bits": [{"min_bits": 9, "max_bits": 12}]}}, "constraint"),
        ({"extra": 1}, "invalid-request"),
        ({"model": ["demo"]}, "invalid-request"),
    ],
)
def test_plans_that_cannot_be_made(client: httpx.Client, change: dict[str, Any], kind: str) -> None:
    assert problem(client.post("/v1/plans", json={**PLAN, **change})) == (422, kind)


def test_an_infeasible_budget_is_told_the_smallest_one(client: httpx.Client) -> None:
    smallest = client.post("/v1/plans", json={**PLAN, "budget": "1KB"}).json()["smallest_bytes"]
    assert client.post("/v1/plans", json={**PLAN, "budget": f"{smallest}B"}).status_code == 201
    assert client.post("/v1/plans", json={**PLAN, "budget": f"{smallest - 1}B"}).status_code == 422


@pytest.mark.parametrize(
    "body", [b'{"model": ', b"\xff\xfe", b"", b'{"model": "model", "budget": NaN}', b"[" * 50_000]
)
def test_bodies_that_are_not_a_request(client: httpx.Client, body: bytes) -> None:
    answer = client.post("/v1/plans", content=body, headers={"Content-Type": "application/json"})
    assert problem(answer)[0] in (400, 422)


@pytest.mark.parametrize(
    "model",
    [
        "../model",
        "/etc",
        "model/../..",
        ".",
        "a/b/c",
        "model\x00",
        "model\r\nX-Evil: 1",
        "~root",
        "..%2f",
        "a" * 300,
    ],
)
def test_model_names_that_are_no_names(client: httpx.Client, model: str) -> None:
    answer = client.post("/v1/profiles", json={"model": model})
    assert problem(answer)[1] in ("invalid-request", "unknown-model")
    assert "x-evil" not in answer.headers


def test_a_directory_that_is_no_model_root_is_not_reached(client: httpx.Client) -> None:
    assert problem(client.post("/v1/profiles", json={"model": "profiler/demo"})) == (404, "unknown-model")


def test_a_large_body_is_refused_before_it_is_read(client: httpx.Client) -> None:
    answer = client.post("/v1/plans", content=b" " * 300_000, headers={"Content-Type": "application/json"})
    assert problem(answer) == (413, "too-large")


def test_a_large_body_without_a_length_is_refused(client: httpx.Client) -> None:
    chunks = (b" " * 10_000 for _ in range(40))
    answer = client.post("/v1/plans", content=chunks, headers={"Content-Type": "application/json"})
    assert problem(answer) == (413, "too-large")


def test_a_batch_of_too_many_items_is_refused(client: httpx.Client) -> None:
    jobs = [{"model": "model", "budgets": ["3bpw"] * 600}] * 2
    assert problem(client.post("/v1/batches", json={"jobs": jobs})) == (422, "invalid-request")


def test_too_many_curve_points_are_refused(client: httpx.Client, profile_id: str) -> None:
    ranks = list(range(65))
    answer = client.get(f"/v1/profiles/{profile_id}/curves", params={"rank": ranks})
    assert problem(answer) == (422, "invalid-request")


def test_an_unacceptable_format_is_refused(client: httpx.Client, profile_id: str) -> None:
    answer = client.get(f"/v1/profiles/{profile_id}/curves", headers={"Accept": "image/png"})
    assert problem(answer) == (406, "not-acceptable")


def test_an_idempotency_key_belongs_to_one_request(client: httpx.Client) -> None:
    headers = {"Idempotency-Key": "one request"}
    client.post("/v1/plans", json=PLAN, headers=headers)
    other = client.post("/v1/plans", json={**PLAN, "budget": "4bpw"}, headers=headers)
    assert problem(other) == (422, "idempotency-key-reused")


def test_another_host_name_is_refused(client: httpx.Client) -> None:
    answer = client.get("/v1/profiles", headers={"Host": "rebound.example"})
    assert problem(answer) == (400, "host-not-allowed")


def test_a_body_that_never_ends_is_given_up_and_others_are_answered(
    service: ServiceProcess, client: httpx.Client
) -> None:
    head = b"POST /v1/plans HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", service.port), timeout=20) as slow:
        slow.sendall(head + b"Content-Length: 99\r\n\r\n{")
        assert client.post("/v1/plans", json=PLAN).status_code == 201
        assert slow.recv(100).startswith(b"HTTP/1.1 408 ")


def test_clients_that_never_read_do_not_hold_up_others(service: ServiceProcess, client: httpx.Client) -> None:
    job = client.post("/v1/profiles", json={"model": "demo"}).headers["location"]
    request = f"GET {job}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    silent = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(20)]
    for connection in silent:
        connection.sendall(request)
    assert client.post("/v1/plans", json=PLAN).status_code == 201
    for connection in silent:
        connection.close()
