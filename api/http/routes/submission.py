"""What the routes that submit jobs share: the job's id, the answer 202, and how it is documented."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, Request
from starlette.responses import Response

from api.schemas.jobs import JobRecord

POLL_SECONDS = 2
ACCEPTED: dict[int | str, dict[str, Any]] = {
    202: {
        "description": "The job. Its address is in Location; ask again after Retry-After seconds, or read its events.",
        "model": JobRecord,
        "headers": {
            "Location": {"description": "The job's address.", "schema": {"type": "string"}},
            "Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}},
        },
    }
}


async def _job_id(request: Request) -> str | None:
    return getattr(request.state, "job_id", None)


NewJobId = Annotated[str | None, Depends(_job_id)]
"""The id that the request's Idempotency-Key has chosen for the job; None without one."""


def job_accepted(job: JobRecord) -> Response:
    headers = {"Location": f"/v1/jobs/{job.id}", "Retry-After": str(POLL_SECONDS)}
    return Response(job.model_dump_json().encode(), 202, headers, "application/json")
