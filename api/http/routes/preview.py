"""/v1/profiles/{id}/preview and /measured: what the page asks beside the profile. Nothing is stored here."""

from __future__ import annotations

from hashlib import sha256
from typing import Annotated

from fastapi import APIRouter, Query
from sqlalchemy import select
from starlette.responses import Response

from allocator.plan import Plan
from api.http.routes.negotiation import NOT_MODIFIED, IfNoneMatch, tagged
from api.http.routes.profiles import JSON, ProfileId, Reader
from api.http.service import Service, ServiceOf
from api.problems import responses
from api.schemas.documents import EMBEDDINGS, Answer, BudgetText, StrategyText
from api.storage.database import EvaluationRow, PlanRow

MOST_EVALUATIONS = 200
router = APIRouter(prefix="/v1/profiles", tags=["profiles"])


class MeasuredKl(Answer):
    """A compressed model: its size, and the KL (nats/token) predicted and measured. `plan` is null for a probe."""

    label: str
    text: str
    plan: str | None
    total_bytes: int
    predicted_kl: float
    kl_nats: float


class MeasuredAnswer(Answer):
    profile: str
    measured: list[MeasuredKl]


@router.get(
    "/{profile_id}/preview",
    response_model=Plan,
    responses={**NOT_MODIFIED, **responses("unknown-profile", "infeasible", "unusable")},
)
def preview_plan(
    profile_id: ProfileId,
    service: ServiceOf,
    reader: Reader,
    budget: Annotated[BudgetText | None, Query()] = None,
    strategy: Annotated[StrategyText, Query()] = "optimal",
    embeddings: Annotated[bool, Query(description=EMBEDDINGS)] = False,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """The plan for a budget, byte for byte as POST /v1/plans would keep it, made and not kept."""
    from api.services.usecases import plan_budget

    plan = plan_budget(service.profiles.load(profile_id).offered(embeddings), budget, strategy)
    document = plan.document()
    return tagged(document, JSON, f'"{sha256(document).hexdigest()[:32]}"', if_none_match)


@router.get("/{profile_id}/measured", responses=responses("unknown-profile"))
def read_measured(profile_id: ProfileId, service: ServiceOf, reader: Reader) -> MeasuredAnswer:
    """Predicted beside measured KL: the probes that calibrate the profile, and its plans' newest evaluations."""
    return MeasuredAnswer(
        profile=profile_id, measured=[*_probes(service, profile_id), *_evaluations(service, profile_id)]
    )


def _probes(service: Service, profile_id: str) -> list[MeasuredKl]:
    from api.services.usecases import plan_budget

    profile = service.profiles.load(profile_id)
    uniform = [
        (probe, plan_budget(profile, None, f"uniform:{probe.option.bits}"))
        for probe in profile.document.probes
    ]
    return [
        MeasuredKl(
            label=f"{probe.option.bits} bits",
            text="calibration windows held back",
            plan=None,
            total_bytes=plan.total_bytes,
            predicted_kl=plan.predicted_kl,
            kl_nats=probe.measured_kl,
        )
        for probe, plan in uniform
    ]


def _evaluations(service: Service, profile_id: str) -> list[MeasuredKl]:
    query = (
        select(EvaluationRow)
        .join(PlanRow, PlanRow.id == EvaluationRow.plan_id)
        .where(PlanRow.profile_id == profile_id, EvaluationRow.predicted_kl.is_not(None))
        .order_by(EvaluationRow.created_at.desc())
        .limit(MOST_EVALUATIONS)
    )
    with service.database.transaction() as session:
        rows = list(session.scalars(query))
    return [
        MeasuredKl(
            label=f"plan {row.plan_id[:8]}",
            text=row.result["text"],
            plan=row.plan_id,
            total_bytes=row.result["tensor_bytes"],
            predicted_kl=row.predicted_kl,
            kl_nats=row.measured_kl,
        )
        for row in rows
        if row.plan_id is not None and row.predicted_kl is not None
    ]
