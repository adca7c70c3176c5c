"""/v1/jobs: list, read, follow and cancel jobs. What a job does is in `tasks.py`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Path, Query
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool

from api.http.middleware.auth import requires
from api.http.routes.negotiation import IDEMPOTENT
from api.http.service import ServiceOf
from api.problems import ProblemError, responses
from api.schemas.jobs import JobEvent, JobRecord, Page, State
from api.storage.api_keys import Principal

POLL_SECONDS = 0.4
MOST_EVENTS = 100
"""Read at once for one stream, so that many streams of a long job are no burden."""
RECONNECT_MILLISECONDS = 1_000
STATES = ("queued", "running", "done", "failed", "cancelled")
FINAL = ("done", "failed", "cancelled")

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])
JobId = Annotated[
    str, Path(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9-]+$", description="A job's id.")
]
Reader = Annotated[Principal, Depends(requires("read"))]
Canceller = Annotated[Principal, Depends(requires("plan", "compress"))]


@router.get("", responses=responses())
def list_jobs(
    service: ServiceOf,
    reader: Reader,
    state: Annotated[State | None, Query()] = None,
    cursor: Annotated[
        str | None, Query(max_length=200, description="`next_cursor` of the page before.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> Page:
    """Jobs, newest first."""
    return service.jobs.list(cursor, limit, state)


@router.get("/{job_id}", responses=responses("unknown-job"))
def read_job(job_id: JobId, service: ServiceOf, reader: Reader) -> JobRecord:
    """State, progress and, once there is one, the result. A running batch shows the items finished so far."""
    return service.jobs.read(job_id)


@router.post("/{job_id}/cancel", dependencies=[IDEMPOTENT], responses=responses("unknown-job", "conflict"))
def cancel_job(job_id: JobId, service: ServiceOf, owner: Canceller) -> JobRecord:
    """Stop a job within seconds; one that is finished stays as it is."""
    return service.jobs.cancel(job_id)


async def _stream_start(
    job_id: JobId,
    service: ServiceOf,
    reader: Reader,
    last_event_id: Annotated[
        str | None, Header(max_length=32, description="Go on after this event.", examples=["7"])
    ] = None,
) -> AsyncIterator[int]:
    """The sequence number to go on after, and one of the bounded number of streams until the answer is sent."""
    after = 0
    if last_event_id is not None:
        if not (last_event_id.isascii() and last_event_id.isdigit() and len(last_event_id) <= 18):
            raise ProblemError(
                "invalid-request", "Last-Event-ID is the id of an event of this stream, a number"
            )
        after = int(last_event_id)
    await run_in_threadpool(service.jobs.read, job_id)
    service.event_streams.take(reader.id)
    service.metrics.event_streams.inc()
    try:
        yield after
    finally:
        service.event_streams.give_back(reader.id)
        service.metrics.event_streams.dec()


@router.get(
    "/{job_id}/events", response_class=EventSourceResponse, responses=responses("unknown-job", "unavailable")
)
async def follow_job(
    job_id: JobId, service: ServiceOf, reader: Reader, after: Annotated[int, Depends(_stream_start)]
) -> AsyncIterator[ServerSentEvent]:
    """Every event of the job, so far and to come, as server-sent events. Ends with the job; Last-Event-ID resumes."""
    while True:
        events = await run_in_threadpool(service.jobs.events, job_id, after, MOST_EVENTS)
        for event in events:
            after = event.sequence
            yield _sent(event)
            if event.kind in FINAL:
                return
        if not events and (await run_in_threadpool(service.jobs.read, job_id)).is_finished:
            return
        if len(events) < MOST_EVENTS:
            await asyncio.sleep(POLL_SECONDS)


def _sent(event: JobEvent) -> ServerSentEvent:
    """`data` is the event's data, with the job's state where the event changes it."""
    state = {"state": event.kind} if event.kind in STATES else {}
    data = {**event.data, **state, "created_at": event.created_at.isoformat()}
    return ServerSentEvent(data=data, event=event.kind, id=str(event.sequence), retry=RECONNECT_MILLISECONDS)
