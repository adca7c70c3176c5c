"""POST /v1/batches: every model under every budget, as one job."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body, Depends
from starlette.responses import Response

from api.http.middleware.auth import requires
from api.http.routes.negotiation import IDEMPOTENT
from api.http.routes.submission import ACCEPTED, NewJobId, job_accepted
from api.http.service import ServiceOf
from api.problems import ProblemError, responses
from api.schemas.documents import BatchRequest
from api.storage.api_keys import Principal

router = APIRouter(prefix="/v1/batches", tags=["jobs"])
EXAMPLES = {
    "two budgets": {"value": {"jobs": [{"model": "demo", "budgets": ["3bpw", "25%"]}]}},
    "for GPTQModel": {"value": {"jobs": [{"model": "demo", "budgets": ["3bpw"], "target": "gptqmodel"}]}},
}


@router.post(
    "",
    status_code=202,
    dependencies=[IDEMPOTENT],
    responses={**ACCEPTED, **responses("unknown-model", "too-large", "queue-full", "conflict")},
)
def submit_batch(
    request: Annotated[BatchRequest, Body(openapi_examples=EXAMPLES)],
    service: ServiceOf,
    owner: Annotated[Principal, Depends(requires("plan"))],
    job_id: NewJobId,
) -> Response:
    """Finished items can be read in the job's `result` while it runs; one that fails leaves the others alone."""
    items = sum(len(entry.budgets) for entry in request.jobs)
    most = service.settings.max_batch_items
    if items > most:
        raise ProblemError("invalid-request", f"{items:,} items are more than {most:,}; split the batch")
    for model in {entry.model for entry in request.jobs}:
        service.catalogue.resolve(model)
    return job_accepted(service.jobs.submit("batch", request.model_dump(mode="json"), owner.id, job_id))
