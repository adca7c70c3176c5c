"""The durable engine under the jobs, DBOS: where its tables lie, and what client and worker must agree on."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING

from sqlalchemy import Engine, ExceptionContext, event, make_url
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from api.settings import Settings
from api.storage.database import make_engine, unusable

if TYPE_CHECKING:
    from dbos import DBOSClient

APPLICATION = "bitrank"
VERSION = "jobs-1"
"""Of the workflows' shape, not of the product: workers of one version resume each other's work. Raise it when a
workflow's steps change."""
JOBS, GROUPS, COMPUTE = "jobs", "groups", "compute"
"""Queues. A job waits for its groups (one model of a batch), a group for its computations; each has a queue of its
own so that waiting never takes the place that what is waited for needs."""
RUN_JOB = "run_job"
POLLING_SECONDS = 0.4
"""Between looks at a queue and at a child's outcome: every task starts so much later, and an idle worker that much
less often asks the database."""


def engine_url(settings: Settings) -> str:
    """PostgreSQL: the service's own database, in the schema `dbos`. SQLite: a file beside the service's."""
    url = make_url(settings.url)
    if not url.drivername.startswith("sqlite"):
        return url.set(drivername="postgresql").render_as_string(hide_password=False)
    return f"sqlite:///{url.database}.engine"


def prepare_engine(settings: Settings) -> None:
    """Create or upgrade the engine's tables; several processes may do so at once. Raises `DatabaseError`."""
    from dbos import DBOS

    url = engine_url(settings)
    try:
        if url.startswith("sqlite"):
            engine = make_engine(url)
            with engine.connect():
                engine.dispose()
        DBOS.migrate(url)
    except SQLAlchemyError as error:
        raise unusable(url, error) from error


def wait_out_full_disks() -> None:
    """Let the engine of this process wait for room on SQLite's disk as it waits for a lock.

    By itself it waits for a database that is locked or away, but leaves a workflow whose outcome did not fit pending
    forever, in the hands of a worker that lives.
    """
    if not event.contains(Engine, "handle_error", _full_is_locked):
        event.listen(Engine, "handle_error", _full_is_locked)


def _full_is_locked(context: ExceptionContext) -> None:
    error = context.original_exception
    if isinstance(error, sqlite3.OperationalError) and "disk is full" in str(error):
        locked = sqlite3.OperationalError("database is locked, for its disk is full")
        raise OperationalError(context.statement, None, locked) from error


def engine_client(settings: Settings) -> DBOSClient:
    from dbos import DBOSClient

    return DBOSClient(
        system_database_url=engine_url(settings),
        application_name=APPLICATION,
        observability_query_timeout_sec=10.0,
    )
