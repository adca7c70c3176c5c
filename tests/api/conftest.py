"""One service for the whole session, with the small model's profile registered."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from road import Road
from service_process import ServiceProcess


@pytest.fixture(scope="session")
def service(road: Road, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """The service on loopback; the profile is registered under the name `model`."""
    process = ServiceProcess(
        tmp_path_factory.mktemp("service"),
        "--profile",
        road.profile,
        BITRANK_MODEL_ROOTS=str(road.folder),
        BITRANK_HUB="0",
        BITRANK_MAX_BODY_BYTES="200000",
        BITRANK_QUEUE_QUOTA="100000",
        BITRANK_BODY_SECONDS="3",
    )
    yield process
    process.stop()


@pytest.fixture(scope="session")
def client(service: ServiceProcess) -> httpx.Client:
    return service.client


@pytest.fixture(scope="session")
def profile_id(client: httpx.Client) -> str:
    found: str = client.get("/v1/profiles", params={"model": "model"}).json()["profiles"][0]["id"]
    return found


@pytest.fixture(scope="session")
def plan_id(client: httpx.Client) -> str:
    made = client.post("/v1/plans", json={"model": "model", "budget": "3.2bpw"})
    assert made.status_code == 201, made.text
    return made.headers["location"].rpartition("/")[2]
