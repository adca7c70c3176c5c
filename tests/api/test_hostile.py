"""Hostile clients against a real server: each is refused or closed, and an ordinary client is answered meanwhile."""

from __future__ import annotations

import asyncio
import json
import pickle
import re
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from road import Road
from service_process import ServiceProcess

from api.http.middleware.limits import Places
from api.problems import ProblemError
from benchmarks.attacks import ATTACKS, assault, unread
from benchmarks.bystander import Bystander
from benchmarks.fleet import Fleet
from benchmarks.installation import eventful_job, finished, installation, write_small_model

pytestmark = pytest.mark.alone

CONNECTIONS, STREAMS = 40, 4
SCRIPT = "/static/vendor/d3.min.js"
PLAN = {"model": "model", "budget": "3bpw"}


@pytest.fixture(scope="module")
def hostage(road: Road, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """A service with short patience, few connections and few streams."""
    folder = tmp_path_factory.mktemp("hostage")
    (folder / "models").mkdir()
    process = ServiceProcess(
        folder / "data",
        "--profile",
        road.profile,
        BITRANK_MODEL_ROOTS=str(folder / "models"),
        BITRANK_HUB="0",
        BITRANK_MAX_CONNECTIONS=str(CONNECTIONS),
        BITRANK_MAX_EVENT_STREAMS=str(STREAMS),
        BITRANK_MAX_BODY_BYTES=str(32 * 2**20),
        BITRANK_HEAD_SECONDS="2",
        BITRANK_BODY_SECONDS="2",
        BITRANK_UNREAD_SECONDS="2",
    )
    yield process
    process.stop()


@contextmanager
def others_are_answered(service: ServiceProcess) -> Iterator[None]:
    """An ordinary client has every plan it asks for while this is open."""
    bystander = Bystander(service.url, "model")
    yield
    bystander.close()
    assert set(bystander.answers) == {201}


def problem(answer: httpx.Response) -> tuple[int, str]:
    assert answer.headers["content-type"] == "application/problem+json"
    return answer.status_code, answer.json()["type"].rpartition(":")[2]


@pytest.mark.parametrize(
    ("name", "connections", "expected"),
    [
        ("silence", 30, "closed"),
        ("slow head", 30, "408 request-timeout"),
        ("slow body", 30, "408 request-timeout"),
        ("slow unwanted body", 30, "closed"),
        ("endless head", 3, "431 head-too-large"),
        ("large body", 3, "413 too-large"),
        ("large chunked body", 3, "413 too-large"),
        ("million items", 2, "422 invalid-request"),
    ],
)
def test_an_attack_is_refused_and_others_are_answered(
    hostage: ServiceProcess, name: str, connections: int, expected: str
) -> None:
    with others_are_answered(hostage):
        outcomes = asyncio.run(assault(ATTACKS[name], hostage.port, connections))
    assert outcomes == Counter({expected: connections})


@pytest.mark.parametrize("name", ["silence", "slow head", "slow body"])
def test_too_many_connections_make_room_for_new_ones(hostage: ServiceProcess, name: str) -> None:
    with others_are_answered(hostage):
        outcomes = asyncio.run(assault(ATTACKS[name], hostage.port, 3 * CONNECTIONS))
    assert sum(outcomes.values()) == 3 * CONNECTIONS
    assert set(outcomes) <= {"closed", "408 request-timeout", "503 unavailable"}


def test_answers_that_are_never_read_are_dropped(hostage: ServiceProcess) -> None:
    attack = unread(SCRIPT, len(hostage.client.get(SCRIPT).content))
    with others_are_answered(hostage):
        assert asyncio.run(assault(attack, hostage.port, 10)) == Counter({"closed": 10})


def test_more_requests_at_once_than_anyone_needs_are_cut_off(hostage: ServiceProcess) -> None:
    with others_are_answered(hostage):
        assert asyncio.run(assault(ATTACKS["pipelined requests"], hostage.port, 10)) == Counter(
            {"closed": 10}
        )


def test_a_few_requests_at_once_are_answered_in_order(hostage: ServiceProcess) -> None:
    paths = ("/healthz", "/v1/jobs/none", "/readyz")
    with socket.create_connection(("127.0.0.1", hostage.port), timeout=20) as connection:
        for path in paths:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answers = b"".join(iter(lambda: connection.recv(4096), b""))
    assert re.findall(rb"HTTP/1.1 (\d+) ", answers) == [b"200", b"404", b"200", b"200"]


def test_event_streams_that_are_never_read_give_their_places_back(hostage: ServiceProcess) -> None:
    attack = unread(f"/v1/jobs/{eventful_job(hostage.data_dir)}/events")
    with others_are_answered(hostage):
        assert asyncio.run(assault(attack, hostage.port, STREAMS)) == Counter({"closed": STREAMS})
    job = hostage.client.post("/v1/profiles", json={"model": "demo"}).headers["location"]
    hostage.client.post(f"{job}/cancel")
    assert hostage.client.get(f"{job}/events").status_code == 200


def test_more_event_streams_than_there_are_places_are_refused(hostage: ServiceProcess) -> None:
    job = hostage.client.post("/v1/profiles", json={"model": "demo"}).headers["location"]
    request = f"GET {job}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    silent = [socket.create_connection(("127.0.0.1", hostage.port)) for _ in range(STREAMS)]
    with others_are_answered(hostage):
        for connection in silent:
            connection.sendall(request)
            assert connection.recv(15) == b"HTTP/1.1 200 OK"
        assert problem(hostage.client.get(f"{job}/events")) == (503, "unavailable")
    for connection in silent:
        connection.close()


@pytest.mark.parametrize(
    "request_",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Bad: a\x00b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/plans HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /v1/plans HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_not_http_is_told_so(hostage: ServiceProcess, request_: bytes) -> None:
    with socket.create_connection(("127.0.0.1", hostage.port), timeout=20) as connection:
        connection.sendall(request_)
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ") and b"application/problem+json" in head
    assert json.loads(body)["type"] == "urn:bitrank:problem:bad-request"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "-1", "1e400", "1e999999999"])
def test_numbers_that_are_none_are_refused_wherever_they_stand(hostage: ServiceProcess, number: str) -> None:
    for path, body in (
        ("/v1/plans", '{"model":"model","budget":N}'),
        ("/v1/plans", '{"model":"model","budget":"Nbpw"}'),
        ("/v1/plans", '{"model":"model","budget":"3bpw","constraints":{"floors":[{"max_error":N}]}}'),
        ("/v1/profiles", '{"model":"demo","settings":{"tokens":N}}'),
        ("/v1/batches", '{"jobs":[{"model":"model","budgets":[N]}]}'),
    ):
        content = body.replace("N", number)
        answer = hostage.client.post(path, content=content, headers={"Content-Type": "application/json"})
        assert problem(answer) in ((422, "invalid-request"), (422, "budget-syntax")), (path, content)


@pytest.mark.parametrize("number", ["nan", "inf", "-1", "1e400"])
def test_numbers_in_addresses_too(hostage: ServiceProcess, number: str) -> None:
    profiles = hostage.client.get("/v1/profiles", params={"model": "model"}).json()["profiles"]
    address = f"/v1/profiles/{profiles[0]['id']}"
    for query in (f"curves?bits={number}", f"curves?rank={number}", f"preview?budget={number}bpw"):
        assert problem(hostage.client.get(f"{address}/{query}"))[0] == 422, query


@pytest.mark.parametrize(
    "text", ["a\r\nX-Evil: 1", "a\nX-Evil: 1", "a\r\n\r\nHTTP/1.1 200 OK", "a%0d%0aX-Evil:1"]
)
def test_no_text_of_a_request_becomes_a_header_of_its_answer(hostage: ServiceProcess, text: str) -> None:
    client = hostage.client
    answers = (
        client.post("/v1/profiles", json={"model": text}),
        client.post("/v1/plans", json={**PLAN, "model": text}),
        client.post("/v1/batches", json={"jobs": [{"model": text, "budgets": ["3bpw"]}]}),
        client.get("/v1/profiles", params={"model": text}),
        client.get(f"/v1/jobs/{quote(text)}"),
        client.get("/v1/jobs", params={"cursor": text}),
    )
    for answer in answers:
        assert answer.status_code in (200, 404, 422)
        assert "x-evil" not in answer.headers
        assert "\n" not in "".join(answer.headers.values())


@pytest.mark.parametrize("name", ["outside", "linked", "linked-weights", "../secret", "good/../../secret"])
def test_no_model_name_leads_out_of_its_root(
    hostage: ServiceProcess, road: Road, tmp_path: Path, name: str
) -> None:
    models = hostage.data_dir.parent / "models"
    for link, target in (
        (models / "outside", tmp_path),
        (models / "linked" / "config.json", Path("/etc/passwd")),
        (models / "linked-weights" / "model.safetensors", road.profile / "profile.json"),
    ):
        link.parent.mkdir(exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(target)
    assert problem(hostage.client.post("/v1/profiles", json={"model": name}))[1] in (
        "unknown-model",
        "invalid-request",
    )
    assert hostage.client.get("/v1/jobs", params={"state": "running"}).status_code == 200


def test_a_request_names_no_directory(hostage: ServiceProcess) -> None:
    answer = hostage.client.post("/v1/profiles", json={"model": "demo", "directory": "/etc"})
    assert problem(answer) == (422, "invalid-request")


class Trap:
    """Unpickled, it writes a file."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self._file,))


def test_no_code_of_a_model_is_run(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    for name in ("pickled", "remote"):
        write_small_model(tmp_path / "models" / name, 1)
    pickled, remote = tmp_path / "models" / "pickled", tmp_path / "models" / "remote"
    (pickled / "model.safetensors").unlink()
    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(sprung)))
    config = json.loads((remote / "config.json").read_text())
    config |= {
        "model_type": "evil",
        "auto_map": {k: "evil.Evil" for k in ("AutoConfig", "AutoModelForCausalLM")},
    }
    (remote / "config.json").write_text(json.dumps(config))
    (remote / "evil.py").write_text(f"open({str(sprung)!r}, 'w')\nclass Evil: pass\n")
    with installation(tmp_path, "") as (settings, jobs):
        fleet = Fleet(settings)
        fleet.start()
        for name in ("pickled", "remote"):
            record = finished(jobs, jobs.submit("profile", {"model": name}, None).id)
            assert record.state == "failed" and record.error is not None
            assert record.error["type"] == "urn:bitrank:problem:unusable", record.error
        fleet.end()
    assert not sprung.exists()


def test_one_api_key_cannot_take_every_event_stream() -> None:
    places = Places(most=3, most_per_key=2)
    for _ in range(2):
        places.take("greedy")
    with pytest.raises(ProblemError) as refused:
        places.take("greedy")
    assert refused.value.kind == "too-many-requests"
    places.take("other")
    with pytest.raises(ProblemError) as refused:
        places.take("third")
    assert refused.value.kind == "unavailable"
    places.give_back("greedy")
    places.take("third")
