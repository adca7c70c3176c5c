"""/healthz, /readyz, /metrics: what schedulers and Prometheus ask."""

from __future__ import annotations

from fastapi import APIRouter, Depends
from sqlalchemy.exc import SQLAlchemyError
from starlette.responses import Response

from api.http.middleware.auth import requires
from api.http.service import ServiceOf
from api.observability.metrics_collector import observe_database
from api.problems import database_away, responses
from api.schemas.documents import Health

router = APIRouter(tags=["probes"])


@router.get("/healthz")
async def is_alive() -> Health:
    """The process answers."""
    return Health()


@router.get("/readyz", responses=responses("unavailable"))
def is_ready(service: ServiceOf) -> Health:
    """The database answers too."""
    try:
        service.database.ping()
    except SQLAlchemyError:
        raise database_away() from None
    return Health()


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **responses()},
    dependencies=[Depends(requires("read"))],
)
def read_metrics(service: ServiceOf) -> Response:
    """Prometheus' text format."""
    observe_database(service.metrics, service.database)
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
