"""API keys, scopes and limits on an address that is not loopback; confinement of model names."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from road import Road
from service_process import ServiceProcess, command, environment

from api.http.middleware.limits import RateLimit
from api.problems import ProblemError
from api.settings import Settings
from api.storage.api_keys import KeyStore
from api.storage.database import ApiKeyRow, open_database
from api.storage.models import Catalogue

pytestmark = pytest.mark.alone


def run(data_dir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, env=environment(data_dir), check=False
    )


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeyStore:
    return KeyStore(open_database(Settings(data_dir=tmp_path_factory.mktemp("guarded"))))


@pytest.fixture(scope="module")
def guarded(keys: KeyStore, road: Road) -> Iterator[ServiceProcess]:
    """A service on every address; its database already has a key."""
    keys.create("first", ("read",))
    database = Path(str(keys._database.engine.url.database))
    process = ServiceProcess(database.parent, "--profile", road.profile, host="0.0.0.0")
    yield process
    process.stop()


def test_only_probes_page_and_documentation_are_open(guarded: ServiceProcess) -> None:
    for path in ("/healthz", "/readyz", "/", "/docs", "/openapi.json", "/static/app.js"):
        assert guarded.client.get(path).status_code == 200, path
    for path in ("/v1/profiles", "/v1/jobs", "/metrics", "/v1/nothing"):
        answer = guarded.client.get(path)
        assert answer.status_code == 401, path
        assert answer.headers["www-authenticate"].startswith("Bearer")
        assert answer.json()["type"] == "urn:bitrank:problem:unauthenticated"


@pytest.mark.parametrize("header", ["Bearer wrong", "Bearer", "Basic YTpi", "br_x", "Bearer \xff"])
def test_wrong_keys_are_refused(guarded: ServiceProcess, header: str) -> None:
    answer = guarded.client.get("/v1/jobs", headers=[(b"authorization", header.encode("latin-1"))])
    assert answer.status_code == 401


def test_a_key_may_do_what_its_scopes_say(guarded: ServiceProcess, keys: KeyStore) -> None:
    client, plan = guarded.client, {"model": "model", "budget": "3bpw"}
    _, reader = keys.create("reader", ("read",))
    _, planner = keys.create("planner", ("plan",))
    assert client.get("/v1/profiles", headers=bearer(reader)).status_code == 200
    assert client.post("/v1/plans", json=plan, headers=bearer(reader)).status_code == 403
    assert client.post("/v1/plans", json=plan, headers=bearer(planner)).status_code == 201
    assert client.get("/v1/profiles", headers=bearer(planner)).status_code == 403
    refused = client.post("/v1/compressions", json={"plan": "0" * 32}, headers=bearer(planner))
    assert refused.json()["type"] == "urn:bitrank:problem:forbidden"


def test_a_job_belongs_to_the_key_that_submitted_it(guarded: ServiceProcess, keys: KeyStore) -> None:
    id, key = keys.create("owner", ("plan",))
    job = guarded.client.post("/v1/profiles", json={"model": "demo"}, headers=bearer(key)).json()
    assert job["owner"] == id


def test_a_revoked_key_stops_working_within_seconds(guarded: ServiceProcess, keys: KeyStore) -> None:
    id, key = keys.create("leaver", ("read",))
    assert guarded.client.get("/v1/jobs", headers=bearer(key)).status_code == 200
    keys.revoke(id)
    deadline = time.monotonic() + 10
    while guarded.client.get("/v1/jobs", headers=bearer(key)).status_code == 200:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_keys_are_neither_stored_nor_logged(guarded: ServiceProcess, keys: KeyStore) -> None:
    _, key = keys.create("secret", ("read",))
    guarded.client.get("/v1/jobs", headers=bearer(key), params={"cursor": key})
    stored = b"".join(file.read_bytes() for file in guarded.data_dir.glob("bitrank.db*"))
    assert key.encode() not in stored
    assert key not in guarded.log


def test_a_key_is_made_listed_and_revoked_on_the_command_line(tmp_path: Path) -> None:
    made = json.loads(run(tmp_path, "keys", "create", "ann", "--scopes", "read,compress", "--json").stdout)
    assert made["scopes"] == ["compress", "read"]
    assert made["key"] not in run(tmp_path, "keys", "list").stdout
    assert run(tmp_path, "keys", "revoke", made["id"]).returncode == 0
    listed = json.loads(run(tmp_path, "keys", "list", "--json").stdout)["keys"]
    assert [(key["id"], key["revoked_at"] is None) for key in listed] == [(made["id"], False)]
    assert run(tmp_path, "keys", "create", "bob", "--scopes", "root").returncode != 0
    assert run(tmp_path, "keys", "revoke", "nobody").returncode != 0


def test_an_open_address_without_any_key_is_refused(tmp_path: Path) -> None:
    outcome = run(tmp_path, "serve", "--host", "0.0.0.0", "--port", "0")
    assert outcome.returncode != 0
    assert "bitrank keys create" in " ".join(outcome.stderr.replace("│", " ").split())


def test_a_key_beyond_its_rate_is_told_to_wait() -> None:
    limit = RateLimit(per_second=0.1, burst=3)
    for _ in range(3):
        limit.take("a")
    with pytest.raises(ProblemError) as refused:
        limit.take("a")
    limit.take("b")
    limit.take(None)
    assert refused.value.status == 429
    assert int(refused.value.headers["Retry-After"]) >= 9


def test_the_rate_limit_answers_429_over_http(tmp_path: Path) -> None:
    _, key = KeyStore(open_database(Settings(data_dir=tmp_path))).create("eager", ("read",))
    process = ServiceProcess(tmp_path, host="0.0.0.0", BITRANK_REQUESTS_PER_SECOND="0.5", BITRANK_BURST="4")
    try:
        answers = [process.client.get("/v1/jobs", headers=bearer(key)) for _ in range(6)]
    finally:
        process.stop()
    assert [answer.status_code for answer in answers[:4]] == [200] * 4
    assert answers[-1].status_code == 429
    assert answers[-1].json()["type"] == "urn:bitrank:problem:too-many-requests"


def test_a_full_queue_and_another_host_are_problems_and_a_health_check_is_not(tmp_path: Path) -> None:
    _, key = KeyStore(open_database(Settings(data_dir=tmp_path))).create("eager", ("plan",))
    limits = {"BITRANK_QUEUE_QUOTA": "1", "BITRANK_ALLOWED_HOSTS": "bitrank.example"}
    process = ServiceProcess(tmp_path, host="0.0.0.0", **limits)
    try:
        headers = bearer(key) | {"Host": "bitrank.example"}
        first, second = (
            process.client.post("/v1/profiles", json={"model": "demo"}, headers=headers) for _ in range(2)
        )
        health = process.client.get("/healthz")
        elsewhere = process.client.get("/healthz", headers={"Host": "rebound.example"})
    finally:
        process.stop()
    assert (first.status_code, second.status_code) == (202, 429)
    assert second.json()["type"] == "urn:bitrank:problem:queue-full"
    assert int(second.headers["retry-after"]) > 0
    assert (health.status_code, elsewhere.status_code) == (200, 400)


@pytest.fixture
def roots(tmp_path: Path) -> Settings:
    for name in ("models/good", "models/team/nested", "outside"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "models" / "alias").symlink_to(tmp_path / "models" / "good")
    (tmp_path / "models" / "escape").symlink_to(tmp_path / "outside")
    (tmp_path / "models" / "leaky").mkdir()
    (tmp_path / "models" / "leaky" / "model.safetensors").symlink_to(tmp_path / "outside" / "config.json")
    return Settings(model_roots=(tmp_path / "models",), hub=False)


@pytest.mark.parametrize("name", ["good", "team/nested", "alias"])
def test_names_under_a_root_are_found(roots: Settings, name: str) -> None:
    assert Path(Catalogue(roots).resolve(name)) == (roots.model_roots[0] / name).resolve()


@pytest.mark.parametrize(
    "name", ["escape", "leaky", "../outside", "good/..", "missing", "", "/", "good\n", "a..b"]
)
def test_names_that_lead_out_of_the_roots_are_refused(roots: Settings, name: str) -> None:
    with pytest.raises(ProblemError) as refused:
        Catalogue(roots).resolve(name)
    assert refused.value.kind == "unknown-model"


def test_the_catalogue_lists_the_demo_and_the_models_under_roots(roots: Settings) -> None:
    assert {"demo", "good", "team/nested"} <= set(Catalogue(roots).names())


def test_hub_ids_are_taken_where_the_hub_is_allowed() -> None:
    assert Catalogue(Settings()).resolve("owner/name") == "owner/name"
    with pytest.raises(ProblemError):
        Catalogue(Settings(hub=False)).resolve("owner/name")


def test_only_digests_of_keys_are_in_the_table(keys: KeyStore) -> None:
    _, key = keys.create("digest", ("read",))
    assert all(key not in (row.sha256, row.name) for row in keys.list())
    assert isinstance(keys.list()[0], ApiKeyRow)
