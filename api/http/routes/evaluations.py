"""/v1/evaluations: measure a plan's checkpoint; read measured KL beside the predicted one."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body, Depends, Query
from sqlalchemy import select
from starlette.responses import Response

from allocator.targets import check_compressible
from api.http.middleware.auth import requires
from api.http.routes.negotiation import IDEMPOTENT
from api.http.routes.submission import ACCEPTED, NewJobId, job_accepted
from api.http.service import ServiceOf
from api.problems import responses
from api.schemas.documents import PLAN_ID, EvaluationAnswer, EvaluationList, EvaluationRequest
from api.storage.api_keys import Principal
from api.storage.database import EvaluationRow

router = APIRouter(prefix="/v1/evaluations", tags=["jobs"])


@router.post(
    "",
    status_code=202,
    dependencies=[IDEMPOTENT],
    responses={**ACCEPTED, **responses("unknown-plan", "unusable", "queue-full", "conflict")},
)
def submit_evaluation(
    request: Annotated[EvaluationRequest, Body()],
    service: ServiceOf,
    owner: Annotated[Principal, Depends(requires("compress"))],
    job_id: NewJobId,
) -> Response:
    """Measure the checkpoint of a plan, made first where it is missing, against the original."""
    check_compressible(service.plans.plan(request.plan).target)
    return job_accepted(service.jobs.submit("evaluation", request.model_dump(mode="json"), owner.id, job_id))


@router.get("", responses=responses())
def list_evaluations(
    service: ServiceOf,
    reader: Annotated[Principal, Depends(requires("read"))],
    plan: Annotated[str | None, Query(pattern=PLAN_ID, description="Of this plan alone.")] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> EvaluationList:
    """The newest measurements, predicted KL beside measured KL."""
    query = select(EvaluationRow).order_by(EvaluationRow.created_at.desc()).limit(limit)
    if plan is not None:
        query = query.where(EvaluationRow.plan_id == plan)
    with service.database.transaction() as session:
        rows = list(session.scalars(query))
    return EvaluationList(
        evaluations=[EvaluationAnswer.model_validate(row, from_attributes=True) for row in rows]
    )
