"""Jobs as the service sees them: submitted, read, listed, cancelled. No model is loaded here.

What lives here: the queue's front end and the worker processes a service starts beside itself. What a job does is in
`workflows.py`, who does it in `worker.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from api.jobs.dbos_engine import JOBS, RUN_JOB, VERSION, engine_client, prepare_engine
from api.jobs.repository import Ledger, QuotaError, UnknownJobError
from api.problems import ProblemError
from api.schemas.jobs import REQUESTS, JobEvent, JobRecord, Kind, Page, State
from api.settings import Settings
from api.storage.database import Database

if TYPE_CHECKING:
    from dbos import DBOSClient, EnqueueOptions

__all__ = ["Jobs", "QuotaError", "UnknownJobError"]
RESTART_SECONDS = 2.0
Events = list[JobEvent]


class Jobs:
    """The jobs of one installation. `launch` before anything is submitted, `close` at the end."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings = settings
        self._ledger = Ledger(database)
        self._client: DBOSClient | None = None
        self._workers: LocalWorkers | None = None

    def launch(self, workers: int = 0) -> None:
        """Connect to the engine, and keep `workers` worker processes running on this machine until `close`."""
        prepare_engine(self._settings)
        self._client = engine_client(self._settings)
        if workers:
            self._workers = LocalWorkers(self._settings, workers)

    def close(self) -> None:
        if self._workers is not None:
            self._workers.close()
            self._workers = None
        if self._client is not None:
            self._client.destroy()
            self._client = None

    def submit(
        self, kind: str, request: dict[str, Any], owner: str | None, job_id: str | None = None
    ) -> JobRecord:
        """Queue a job; one that has the id `job_id` already is not made again.

        Raises `QuotaError`, and `ProblemError` (invalid-request) for a request of another shape. The row is written
        first: should this process die before the engine has it, a worker hands it over.
        """
        checked = _checked(kind, request)
        record = self._ledger.insert(checked[0], checked[1], owner, self._settings.queue_quota, job_id)
        enqueue_job(self._engine, record.id)
        return record

    def read(self, job_id: str) -> JobRecord:
        """Raises `UnknownJobError`."""
        return self._ledger.read(job_id)

    def list(self, cursor: str | None, limit: int, state: State | None = None) -> Page:
        """Newest first."""
        return self._ledger.page(cursor, limit, state)

    def cancel(self, job_id: str) -> JobRecord:
        """Stop a job within seconds; one that is finished stays as it is. Raises `UnknownJobError`."""
        self.read(job_id)
        if self._ledger.cancel(job_id):
            self._engine.cancel_workflow(job_id, cancel_children=True)
        return self.read(job_id)

    def events(self, job_id: str, after: int = 0, most: int | None = None) -> Events:
        """What happened first after the event of that sequence number. Raises `UnknownJobError`."""
        found = self._ledger.events(job_id, after, most)
        if not found:
            self.read(job_id)
        return found

    def counts(self) -> dict[str, int]:
        """Jobs by state."""
        return self._ledger.counts()

    @property
    def _engine(self) -> DBOSClient:
        if self._client is None:
            raise RuntimeError("jobs are not launched")
        return self._client


def enqueue_job(client: DBOSClient, job_id: str) -> None:
    """Hand a job to the engine; once is enough and more does nothing."""
    from dbos import WorkflowSerializationFormat

    options: EnqueueOptions = {
        "workflow_name": RUN_JOB,
        "queue_name": JOBS,
        "workflow_id": job_id,
        "app_version": VERSION,
        "serialization_type": WorkflowSerializationFormat.PORTABLE,
    }
    client.enqueue(options, job_id)


def _checked(kind: str, request: dict[str, Any]) -> tuple[Kind, dict[str, Any]]:
    known = next((name for name in REQUESTS if name == kind), None)
    if known is None:
        raise ProblemError(
            "invalid-request", f"no job is of the kind {kind!r}; kinds are {', '.join(REQUESTS)}"
        )
    try:
        return known, REQUESTS[known].model_validate(request).model_dump(mode="json")
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ProblemError("invalid-request", f"{field}: {first['msg']}") from None


class LocalWorkers:
    """Worker processes of this machine, started again when they end. They end themselves when this process does."""

    def __init__(self, settings: Settings, count: int) -> None:
        self._settings = settings
        self._closing = threading.Event()
        self._processes = [start_worker(settings) for _ in range(count)]
        self._watcher = threading.Thread(target=self._watch, name="local-workers", daemon=True)
        self._watcher.start()

    def close(self) -> None:
        self._closing.set()
        self._watcher.join()
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                process.wait(10.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _watch(self) -> None:
        while not self._closing.wait(RESTART_SECONDS):
            for index, process in enumerate(self._processes):
                if process.poll() is not None:
                    self._processes[index] = start_worker(self._settings)


def start_worker(settings: Settings) -> subprocess.Popen[bytes]:
    """A worker process of this installation; it ends with its standard input, so with this process."""
    command = [sys.executable, "-P", "-m", "api.cli.jobs", "worker", "--while-stdin-is-open"]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=os.environ | settings_environment(settings),
    )


def settings_environment(settings: Settings) -> dict[str, str]:
    """The variables that tell another process of the same data, database and models."""
    return {
        "BITRANK_DATA_DIR": str(settings.data_dir),
        "BITRANK_DATABASE_URL": settings.database_url,
        "BITRANK_DATABASE_PASSWORD": settings.database_password,
        "BITRANK_STORE": settings.store,
        "BITRANK_MODEL_ROOTS": os.pathsep.join(map(str, settings.model_roots)),
        "BITRANK_HUB": str(settings.hub).lower(),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
