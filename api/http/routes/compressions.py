"""POST /v1/compressions: a worker carries a plan out into a checkpoint."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body, Depends
from starlette.responses import Response

from allocator.targets import check_compressible
from api.http.middleware.auth import requires
from api.http.routes.negotiation import IDEMPOTENT
from api.http.routes.submission import ACCEPTED, NewJobId, job_accepted
from api.http.service import ServiceOf
from api.problems import responses
from api.schemas.documents import CompressionRequest
from api.storage.api_keys import Principal

router = APIRouter(prefix="/v1/compressions", tags=["jobs"])


@router.post(
    "",
    status_code=202,
    dependencies=[IDEMPOTENT],
    responses={**ACCEPTED, **responses("unknown-plan", "unusable", "queue-full", "conflict")},
)
def submit_compression(
    request: Annotated[CompressionRequest, Body()],
    service: ServiceOf,
    owner: Annotated[Principal, Depends(requires("compress"))],
    job_id: NewJobId,
) -> Response:
    """The checkpoint lands under `checkpoints/<plan>` of the data directory."""
    check_compressible(service.plans.plan(request.plan).target)
    return job_accepted(service.jobs.submit("compression", request.model_dump(mode="json"), owner.id, job_id))
