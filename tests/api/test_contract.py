"""Every answer to every generated request is one that the OpenAPI document describes."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from service_process import ServiceProcess

pytestmark = pytest.mark.alone

EXAMPLES = 12
EXCLUDED = [positive_data_acceptance]
"""A request of the right form may still be refused: a budget can be infeasible, a cursor made up."""
PROFILE = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def known(client: httpx.Client, profile_id: str, plan_id: str) -> dict[str, str]:
    """Ids that exist, by the name of the parameter that takes them."""
    job = client.post("/v1/profiles", json={"model": "demo"}).json()["id"]
    return {"profile_id": profile_id, "plan_id": plan_id, "other_id": plan_id, "job_id": job}


def without_keys(document: dict[str, Any]) -> dict[str, Any]:
    """The document without its security scheme: on loopback no key is needed, and made-up ones hide all else."""
    del document["components"]["securitySchemes"]
    for methods in document["paths"].values():
        for operation in methods.values():
            operation.pop("security", None)
    return document


def test_answers_are_as_documented(
    service: ServiceProcess, client: httpx.Client, known: dict[str, str], subtests: pytest.Subtests
) -> None:
    document = without_keys(client.get("/openapi.json").json())
    operations = [o.ok() for o in schemathesis.openapi.from_dict(document).get_all_operations()]
    assert len(operations) == sum(len(methods) for methods in document["paths"].values())
    for operation in operations:
        if operation.path.endswith("/events"):
            continue  # a stream of a job that never ends

        @PROFILE
        @given(case=operation.as_strategy())
        def any_request(case: Case) -> None:
            case.call_and_validate(base_url=service.url, timeout=30, excluded_checks=EXCLUDED)

        @PROFILE
        @given(case=operation.as_strategy(generation_mode=GenerationMode.POSITIVE))
        def valid_request(case: Case) -> None:
            case.path_parameters.update({k: known[k] for k in case.path_parameters if k in known})
            case.call_and_validate(base_url=service.url, timeout=30, excluded_checks=EXCLUDED)

        with subtests.test(operation.label):
            any_request()
        with subtests.test(f"{operation.label}, of what exists"):
            valid_request()
