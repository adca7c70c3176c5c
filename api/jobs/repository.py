"""The ledger of jobs: their rows and events, read and written one short transaction at a time.

What lives here: every state a job can be in and how it gets from one to the next. A job that was cancelled or is
finished stays so, whatever a worker still writes. Who does the work is in `workflows.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar
from uuid import uuid4

from sqlalchemy import Connection, Insert, and_, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError, OperationalError

from api.problems import ProblemError
from api.schemas.jobs import UNFINISHED, JobEvent, JobProgress, JobRecord, Kind, Page, State
from api.storage.database import Database, JobEventRow, JobRow, now
from api.storage.pagination import decode_cursor, encode_cursor

T = TypeVar("T")
OUTAGE_SECONDS = 300.0
"""How long a write waits for a database that went away."""


class UnknownJobError(ProblemError):
    """No job has this id."""

    def __init__(self, job_id: str) -> None:
        super().__init__("unknown-job", f"no job {job_id[:64]!r}; GET /v1/jobs lists them")


class QuotaError(ProblemError):
    """The owner has too many unfinished jobs."""

    def __init__(self, quota: int) -> None:
        detail = f"{quota} jobs are unfinished already; wait for one of them or cancel it"
        super().__init__("queue-full", detail, headers={"Retry-After": "30"})


class Ledger:
    """The tables `jobs` and `job_events`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def insert(
        self, kind: Kind, request: dict[str, Any], owner: str | None, quota: int, job_id: str | None = None
    ) -> JobRecord:
        """A queued job, or the one of that id. Raises `QuotaError` when the owner has `quota` unfinished ones."""
        unfinished = select(func.count()).where(JobRow.owner == owner, JobRow.state.in_(UNFINISHED))
        row = JobRow(
            id=job_id or str(uuid4()),
            kind=kind,
            state="queued",
            request=request,
            progress=_waiting(),
            owner=owner,
        )
        try:
            with self._database.transaction() as session:
                if session.get(JobRow, row.id) is not None:
                    return self.read(row.id)
                if (session.scalar(unfinished) or 0) >= quota:
                    raise QuotaError(quota)
                session.add(row)
                session.flush()
                session.execute(_event(row.id, "queued", {}))
        except IntegrityError:  # another server has just made it
            return self.read(row.id)
        return self.read(row.id)

    def read(self, job_id: str) -> JobRecord:
        """Raises `UnknownJobError`."""
        with self._database.transaction() as session:
            row = session.get(JobRow, job_id)
        if row is None:
            raise UnknownJobError(job_id)
        record = _record(row)
        if record.kind != "batch" or record.result is not None:
            return record
        return record.model_copy(update={"result": {"items": self.items(job_id)}})

    def items(self, job_id: str) -> list[dict[str, Any]]:
        """The finished items of a batch, in the order of their numbers."""
        query = select(JobEventRow.data).where(JobEventRow.job_id == job_id, JobEventRow.kind == "item")
        with self._database.engine.connect() as connection:
            found = {data["index"]: data for data in connection.execute(query).scalars()}
        return [found[index] for index in sorted(found)]

    def page(self, cursor: str | None, limit: int, state: State | None) -> Page:
        query = select(JobRow).order_by(JobRow.created_at.desc(), JobRow.id.desc())
        if state is not None:
            query = query.where(JobRow.state == state)
        if cursor is not None:
            created_at, last_id = decode_cursor(cursor)
            same_moment = and_(JobRow.created_at == created_at, JobRow.id < last_id)
            query = query.where(or_(JobRow.created_at < created_at, same_moment))
        with self._database.transaction() as session:
            rows = list(session.scalars(query.limit(limit + 1)))
        following = (
            encode_cursor(rows[limit - 1].created_at, rows[limit - 1].id) if len(rows) > limit else None
        )
        return Page(jobs=[_record(row) for row in rows[:limit]], next_cursor=following)

    def events(self, job_id: str, after: int, most: int | None = None) -> list[JobEvent]:
        query = (
            select(JobEventRow)
            .where(JobEventRow.job_id == job_id, JobEventRow.sequence > after)
            .order_by(JobEventRow.sequence)
            .limit(most)
        )
        with self._database.transaction() as session:
            rows = list(session.scalars(query))
        return [JobEvent.model_validate(row, from_attributes=True) for row in rows]

    def add_event(self, job_id: str, kind: str, data: dict[str, Any]) -> None:
        """Append an event; writers that meet on one sequence number take turns."""
        statement = _event(job_id, kind, data)

        def append(connection: Connection) -> bool:
            connection.execute(statement)
            return True

        self._write(append)

    def start(self, job_id: str) -> bool:
        """Note that a job runs; false where it is finished or cancelled."""
        if self._move(job_id, ("queued",), ("running", {}), state="running"):
            return True
        return through_outages(lambda: self.read(job_id)).state == "running"

    def finish(self, job_id: str, result: dict[str, Any]) -> None:
        self._move(job_id, ("running",), ("done", {"result": result}), state="done", result=result)

    def fail(self, job_id: str, problem: dict[str, Any]) -> None:
        self._move(job_id, UNFINISHED, ("failed", {"error": problem}), state="failed", error=problem)

    def cancel(self, job_id: str) -> bool:
        """False where the job was finished already."""
        return self._move(job_id, UNFINISHED, ("cancelled", {}), state="cancelled")

    def is_over(self, job_id: str) -> bool:
        """Whether nothing is to be computed for a job any more: done, failed, cancelled."""
        with self._database.engine.connect() as connection:
            state = connection.execute(select(JobRow.state).where(JobRow.id == job_id)).scalar()
        return state not in UNFINISHED

    def set_progress(self, job_id: str, progress: JobProgress) -> None:
        self._move(job_id, ("running",), None, progress=progress.model_dump())

    def oldest(self, state: State) -> list[str]:
        """The ids of jobs in a state, oldest first, a hundred at most."""
        query = select(JobRow.id).where(JobRow.state == state).order_by(JobRow.created_at).limit(100)
        with self._database.engine.connect() as connection:
            return list(connection.execute(query).scalars())

    def counts(self) -> dict[str, int]:
        """Jobs by state."""
        query = select(JobRow.state, func.count()).group_by(JobRow.state)
        with self._database.engine.connect() as connection:
            return {state: count for state, count in connection.execute(query)}

    def _move(
        self, job_id: str, states: tuple[str, ...], event: tuple[str, dict[str, Any]] | None, **values: Any
    ) -> bool:
        """Change a job that is in one of these states, and append the event, both or neither."""
        statement = update(JobRow).where(JobRow.id == job_id, JobRow.state.in_(states)).values(**values)

        def change(connection: Connection) -> bool:
            moved = bool(connection.execute(statement.values(updated_at=now())).rowcount)
            if moved and event is not None:
                connection.execute(_event(job_id, *event))
            return moved

        return self._write(change)

    def _write(self, change: Callable[[Connection], bool]) -> bool:
        """What `change` says, in a transaction; again while another writer took the same sequence number."""

        def once() -> bool | None:
            try:
                with self._database.engine.begin() as connection:
                    return change(connection)
            except IntegrityError:
                return None

        while (changed := through_outages(once)) is None:
            time.sleep(0.01)
        return changed


def through_outages(action: Callable[[], T]) -> T:
    """Do it, again and again while the database is away. Raises `OperationalError` after `OUTAGE_SECONDS`."""
    deadline, wait = time.monotonic() + OUTAGE_SECONDS, 0.1
    while True:
        try:
            return action()
        except OperationalError:
            if time.monotonic() > deadline:
                raise
        time.sleep(wait)
        wait = min(2 * wait, 5.0)


def _event(job_id: str, kind: str, data: dict[str, Any]) -> Insert:
    """The statement that appends an event, numbered after the last of its job."""
    following = select(func.coalesce(func.max(JobEventRow.sequence), 0) + 1).where(
        JobEventRow.job_id == job_id
    )
    return insert(JobEventRow).values(
        job_id=job_id, sequence=following.scalar_subquery(), kind=kind, data=data, created_at=now()
    )


def _waiting() -> dict[str, Any]:
    return JobProgress().model_dump()


def _record(row: JobRow) -> JobRecord:
    return JobRecord.model_validate(row, from_attributes=True)
