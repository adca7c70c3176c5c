"""Requests whose server died or whose database went away: what the next server and the next try make of them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from hashlib import sha256
from pathlib import Path

import pytest
from service_process import ServiceProcess
from sqlalchemy import select, update

from api.http.middleware.idempotency import STALE_SECONDS, Answers
from api.jobs.repository import Ledger
from api.settings import Settings
from api.storage.database import Database, IdempotencyRow, JobRow, now, open_database
from benchmarks.cluster import Cluster, binary

pytestmark = pytest.mark.alone

BODY = b'{"model":"demo"}'
DIGEST = sha256(b"/v1/profiles\nb''\n" + BODY).hexdigest()
HEADERS = {"Content-Type": "application/json"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServiceProcess]:
    process = ServiceProcess(tmp_path)
    yield process
    process.stop()


@pytest.fixture
def database(server: ServiceProcess, tmp_path: Path) -> Iterator[Database]:
    found = open_database(Settings(data_dir=tmp_path))
    yield found
    found.close()


def claimed_by_a_dead_server(database: Database, key: str) -> str:
    """The id of the job that the dead server was about to make."""
    claimed = Answers(database, timedelta(hours=24)).claim("", key, DIGEST)
    assert isinstance(claimed, str)
    long_ago = now() - timedelta(seconds=STALE_SECONDS + 1)
    with database.transaction() as session:
        session.execute(update(IdempotencyRow).values(created_at=long_ago))
    return claimed


@pytest.mark.parametrize("got_to_the_job", [False, True])
def test_a_request_whose_server_died_makes_one_job_when_it_is_sent_again(
    server: ServiceProcess, database: Database, got_to_the_job: bool
) -> None:
    job_id = claimed_by_a_dead_server(database, "mine")
    if got_to_the_job:
        Ledger(database).insert("profile", {"model": "demo"}, None, quota=10, job_id=job_id)
    headers = {**HEADERS, "Idempotency-Key": "mine"}
    answer = server.client.post("/v1/profiles", content=BODY, headers=headers)
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == f"/v1/jobs/{job_id}"
    with database.transaction() as session:
        assert list(session.scalars(select(JobRow.id))) == [job_id]


def test_a_database_that_is_away_is_said_to_be_and_found_again(tmp_path: Path) -> None:
    try:
        binary("initdb")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    cluster = Cluster()
    server = ServiceProcess(tmp_path, BITRANK_DATABASE_URL=cluster.url)
    try:
        cluster.stop("immediate")
        for path in ("/v1/jobs", "/v1/profiles", "/v1/jobs/none", "/readyz"):
            away = server.client.get(path)
            assert (away.status_code, away.headers["retry-after"]) == (503, "5")
            assert away.json()["type"] == "urn:bitrank:problem:unavailable"
        headers = {**HEADERS, "Idempotency-Key": "mine"}
        assert server.client.post("/v1/profiles", content=BODY, headers=headers).status_code == 503
        assert server.client.get("/healthz").status_code == 200
        cluster.start()
        assert server.client.post("/v1/profiles", content=BODY, headers=headers).status_code == 202
        assert server.client.get("/readyz").status_code == 200
    finally:
        server.stop()
        cluster.remove()
