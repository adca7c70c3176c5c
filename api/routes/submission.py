"""What the routes that submit jobs share: the answer 202, and how it is documented."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from api.job_schemas import JobRecord

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


def job_accepted(job: JobRecord) -> Response:
    headers = {"Location": f"/v1/jobs/{job.id}", "Retry-After": str(POLL_SECONDS)}
    return Response(job.model_dump_json().encode(), 202, headers, "application/json")
