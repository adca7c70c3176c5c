"""/v1/plans: make a plan, read it, export it, explain it, compare it."""

from __future__ import annotations

from contextlib import nullcontext
from threading import Lock
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Path, Query
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from allocator.export.formats import FORMATS, FormatName
from allocator.plan import Plan
from api.http.middleware.auth import requires
from api.http.routes.negotiation import IDEMPOTENT, NOT_MODIFIED, IfNoneMatch, tagged
from api.http.routes.submission import ACCEPTED, NewJobId, job_accepted
from api.http.service import Service, ServiceOf
from api.problems import responses
from api.schemas.documents import PLAN_ID, DiffAnswer, ExplanationAnswer, PlanRequest
from api.services.explanation import difference, explain
from api.storage.api_keys import Principal

router = APIRouter(prefix="/v1/plans", tags=["plans"])
PlanId = Annotated[str, Path(pattern=PLAN_ID, description="A plan's id.")]
Reader = Annotated[Principal, Depends(requires("read"))]
Planner = Annotated[Principal, Depends(requires("plan"))]
PLANNING = Lock()
"""One plan is solved at a time: threads that compute side by side only take the interpreter from each other.
Not under constraints or a target, which may take seconds."""
EXAMPLES = {
    "bits per weight": {"value": {"model": "demo", "budget": "3.25bpw"}},
    "a quarter of the original": {"value": {"model": "demo", "budget": "25%"}},
    "for vLLM": {"value": {"model": "demo", "budget": "90%", "target": "vllm"}},
    "uniform": {"value": {"model": "demo", "strategy": "uniform:3"}},
    "measured before it is relied on": {"value": {"model": "demo", "budget": "3.25bpw", "verify": True}},
    "constrained": {
        "value": {
            "model": "demo",
            "budget": "3.25bpw",
            "constraints": {"pins": [{"layers": "*.0.*", "bits": 8}], "tie_fused": True},
        }
    },
}
EXPORTED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The file, as the tool reads it.",
        "content": {
            media_type: {"schema": {"type": schema}}
            for media_type, schema in (
                ("application/json", "object"),
                ("application/yaml", "object"),
                ("text/plain", "string"),
            )
        },
        "headers": {
            "Content-Disposition": {"description": "Its usual file name.", "schema": {"type": "string"}}
        },
    },
}
MADE: dict[int | str, dict[str, Any]] = {
    201: {
        "description": "The plan.",
        "headers": {
            "Location": {"description": "The plan's address.", "schema": {"type": "string"}},
            "ETag": {"description": "The plan's id, quoted.", "schema": {"type": "string"}},
        },
    },
}


@router.post(
    "",
    status_code=201,
    response_model=Plan,
    dependencies=[IDEMPOTENT],
    responses={**MADE, **ACCEPTED, **responses("unknown-model", "too-large", "queue-full", "conflict")},
)
def make_plan(
    request: Annotated[PlanRequest, Body(openapi_examples=EXAMPLES)],
    service: ServiceOf,
    owner: Planner,
    job_id: NewJobId,
) -> Response:
    """Plan one budget from the newest profile of a model: 201. What takes a worker is a job, 202: a model without a
    profile is measured first, and a plan to verify afterwards."""
    profile_id = service.profiles.find(request.model)
    if profile_id is None or request.verify:
        return _as_job(service, request, owner, job_id)
    return _planned(service, profile_id, request, owner)


def _as_job(service: Service, request: PlanRequest, owner: Principal, job_id: str | None) -> Response:
    from api.services.usecases import check_planning

    service.catalogue.resolve(request.model)
    check_planning(request.budget, request.strategy, request.constraints is not None, request.target)
    return job_accepted(service.jobs.submit("plan", request.model_dump(mode="json"), owner.id, job_id))


def _planned(service: Service, profile_id: str, request: PlanRequest, owner: Principal) -> Response:
    with service.metrics.plan_seconds.time():
        plan_id, document = service.plans.save(plan_of(service, profile_id, request), owner.id)
    headers = {"Location": f"/v1/plans/{plan_id}", "ETag": f'"{plan_id}"'}
    return Response(document, 201, headers, "application/json")


def plan_of(service: Service, profile_id: str, request: PlanRequest) -> Plan:
    """The plan a request asks for. Raises the allocator's errors."""
    from api.services.usecases import plan_budget

    constraints = None if request.constraints is None else request.constraints.rules()
    profile = service.profiles.load(profile_id).offered(request.embeddings)
    with PLANNING if constraints is None and request.target is None else nullcontext():
        return plan_budget(profile, request.budget, request.strategy, constraints, request.target)


@router.get("/{plan_id}", response_model=Plan, responses={**NOT_MODIFIED, **responses("unknown-plan")})
async def read_plan(
    plan_id: PlanId, service: ServiceOf, reader: Reader, if_none_match: IfNoneMatch = None
) -> Response:
    """plan.json, byte for byte as `bitrank plan` writes it."""
    document = service.plans.cached(plan_id)
    if document is None:
        document = await run_in_threadpool(service.plans.read, plan_id)
    return tagged(document, "application/json", f'"{plan_id}"', if_none_match)


@router.get("/{plan_id}/explain", responses=responses("unknown-plan"))
def explain_plan(
    plan_id: PlanId,
    service: ServiceOf,
    reader: Reader,
    layer: Annotated[str, Query(min_length=1, max_length=200, description="Layers by glob.")] = "*",
) -> ExplanationAnswer:
    """Why layers got what they got: marginal nats per MiB against the shadow price, next better and worse option."""
    from api.services.usecases import menu_for

    plan = service.plans.plan(plan_id)
    profile = service.profiles.load(plan.profile_sha256).offering(plan)
    return explain(plan_id, plan, menu_for(profile, plan.target), layer)


@router.get(
    "/{plan_id}/export",
    response_class=Response,
    responses={**EXPORTED, **NOT_MODIFIED, **responses("unknown-plan", "export")},
)
def export_plan(
    plan_id: PlanId,
    service: ServiceOf,
    reader: Reader,
    format_name: Annotated[
        FormatName, Query(alias="format", description="The tool's format.", examples=["llm-compressor"])
    ],
    if_none_match: IfNoneMatch = None,
) -> Response:
    """The plan as another tool reads it: a recipe, a configuration or a command; weights are not in it."""
    form = FORMATS[format_name]
    content = form.write(service.plans.plan(plan_id)).encode()
    disposition = f'attachment; filename="{form.filename}"'
    etag = f'"{plan_id}-{format_name}"'
    return tagged(content, form.media_type, etag, if_none_match, **{"Content-Disposition": disposition})


@router.get("/{plan_id}/diff/{other_id}", responses=responses("unknown-plan"))
def compare_plans(plan_id: PlanId, other_id: PlanId, service: ServiceOf, reader: Reader) -> DiffAnswer:
    """What changes from one plan to another."""
    return difference(plan_id, service.plans.plan(plan_id), other_id, service.plans.plan(other_id))
