"""The worker process: takes tasks from the queues, shows that it is alive, and looks after the work of the dead.

What lives here: starting and ending the engine in this process, heartbeats, and the reaper. A heartbeat is a counter,
and a worker is dead when its counter has not moved for so many seconds on the clock of the one who watches; no two
machines' clocks are compared, so none of them matters. The work of an executor without a row belongs to nobody and
is queued again: the engine's own compare-and-set lets only one do so.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from contextlib import suppress
from typing import Any
from uuid import uuid4

from sqlalchemy import BigInteger, Column, MetaData, String, Table, delete, insert, select, update
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from api.jobs.dbos_engine import (
    APPLICATION,
    COMPUTE,
    GROUPS,
    JOBS,
    POLLING_SECONDS,
    VERSION,
    engine_url,
    prepare_engine,
    wait_out_full_disks,
)
from api.jobs.repository import Ledger
from api.problems import ProblemError
from api.settings import Settings
from api.storage.database import make_engine, open_database, unusable

BEAT_SECONDS = 1.0
LOOK_SECONDS = 2.0
DEAD_SECONDS = 10.0
WAITING_JOBS, WAITING_GROUPS = 32, 16
"""Jobs and groups of jobs that one worker keeps waiting for their computations; each is a thread that sleeps."""
EXIT_DECLARED_DEAD = 3
GIVEN_UP = ("ERROR", "MAX_RECOVERY_ATTEMPTS_EXCEEDED")

WORKERS = Table(
    "bitrank_workers",
    MetaData(),
    Column("id", String(128), primary_key=True),
    Column("beat", BigInteger, nullable=False),
)


class Heartbeats:
    """This worker's row among the engine's tables, and what is seen of the others'."""

    def __init__(self, settings: Settings, dead_seconds: float) -> None:
        self._dead_seconds = dead_seconds
        self.id = f"{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:8]}"
        self._engine = make_engine(engine_url(settings))
        self._seen: dict[str, tuple[int, float]] = {}
        self._looked = time.monotonic()
        self._create()
        try:
            with self._engine.begin() as connection:
                connection.execute(insert(WORKERS).values(id=self.id, beat=0))
        except SQLAlchemyError as error:
            raise unusable(settings.url, error) from error

    def _create(self) -> None:
        with suppress(DBAPIError):  # another worker makes it just now
            WORKERS.create(self._engine, checkfirst=True)

    def beat(self) -> bool:
        """Move the counter; false when this worker has been declared dead."""
        with self._engine.begin() as connection:
            statement = update(WORKERS).where(WORKERS.c.id == self.id).values(beat=WORKERS.c.beat + 1)
            return bool(connection.execute(statement).rowcount)

    def bury(self) -> set[str]:
        """Drop the workers whose counters stand still; the ids of those alive.

        Whoever could not beat and look for a while, for itself or the database was away, starts watching anew: the
        others could not beat either, also where the database could still be read.
        """
        self.beat()
        with self._engine.connect() as connection:
            beats = {worker: beat for worker, beat in connection.execute(select(WORKERS))}
        moment = time.monotonic()
        if moment - self._looked > LOOK_SECONDS + self._dead_seconds / 2:
            self._seen.clear()
        self._looked = moment
        for worker, beat in beats.items():
            if worker not in self._seen or self._seen[worker][0] != beat:
                self._seen[worker] = (beat, moment)
        for worker in [w for w, (_, since) in self._seen.items() if moment - since > self._dead_seconds]:
            beat, _ = self._seen.pop(worker)
            with self._engine.begin() as connection:
                connection.execute(delete(WORKERS).where(WORKERS.c.id == worker, WORKERS.c.beat == beat))
        return self.alive()

    def alive(self) -> set[str]:
        with self._engine.connect() as connection:
            return set(connection.execute(select(WORKERS.c.id)).scalars())

    def leave(self) -> None:
        with self._engine.begin() as connection:
            connection.execute(delete(WORKERS).where(WORKERS.c.id == self.id))
        self._engine.dispose()


class Worker:
    """One worker of an installation; a process holds at most one."""

    def __init__(self, settings: Settings, device: str = "cpu", dead_seconds: float = DEAD_SECONDS) -> None:
        from api.jobs.cancellation import Interruptions
        from api.jobs.tasks import Executor, Tasks
        from api.jobs.workflows import Runtime, install

        _prepare_libraries()
        self._database = open_database(settings)
        prepare_engine(settings)
        wait_out_full_disks()
        self._settings = settings
        self._ledger = Ledger(self._database)
        self._heartbeats = Heartbeats(settings, dead_seconds)
        executor = Executor(self._heartbeats.id, device, lambda worker: worker in self._heartbeats.alive())
        tasks = Tasks(settings, self._database, executor)
        self._interruptions = Interruptions(self._ledger.is_over)
        install(Runtime(self._ledger, tasks, self._interruptions))

    @property
    def id(self) -> str:
        return self._heartbeats.id

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set. What is unfinished then is queued again for others."""
        threading.Thread(target=self._beat, args=(stop,), name="heartbeat", daemon=True).start()
        self._launch()
        try:
            while not stop.wait(LOOK_SECONDS):
                self._look_after_others()
        finally:
            self._leave()

    def _beat(self, stop: threading.Event) -> None:
        while not stop.wait(BEAT_SECONDS):
            try:
                if not self._heartbeats.beat() and not stop.is_set():
                    os._exit(EXIT_DECLARED_DEAD)  # another worker has this one's work by now
            except SQLAlchemyError:
                continue  # the database is away: the next beat tries again

    def _launch(self) -> None:
        from dbos import DBOS

        DBOS(
            config={
                "name": APPLICATION,
                "system_database_url": engine_url(self._settings),
                "application_version": VERSION,
                "executor_id": self.id,
                "log_level": "WARNING",
                "run_migrations": False,
            }
        )
        DBOS.launch()
        for queue, concurrency in ((JOBS, WAITING_JOBS), (GROUPS, WAITING_GROUPS), (COMPUTE, 1)):
            DBOS.register_queue(queue, worker_concurrency=concurrency, polling_interval_sec=POLLING_SECONDS)

    def _look_after_others(self) -> None:
        """Bury the dead, queue their work again, hand over jobs the engine never got, fail those it gave up."""
        try:
            self._resume_orphans()
            self._hand_over_waiting()
            self._fail_given_up()
        except SQLAlchemyError:
            return  # the database is away: the next look tries again

    def _resume_orphans(self) -> None:
        """Workers are looked up after their work, so that one which has just begun is seen."""
        from dbos import DBOS

        pending = DBOS.list_workflows(
            status="PENDING", app_version=VERSION, load_input=False, load_output=False
        )
        alive = self._heartbeats.bury()
        orphaned = {workflow.executor_id for workflow in pending if workflow.executor_id} - alive
        if orphaned:
            DBOS._recover_pending_workflows(sorted(orphaned))

    def _hand_over_waiting(self) -> None:
        from dbos import DBOS, SetWorkflowID

        from api.jobs.workflows import run_job

        for job_id in self._ledger.oldest("queued"):
            if DBOS.get_workflow_status(job_id) is None:
                with SetWorkflowID(job_id):
                    DBOS.enqueue_workflow(JOBS, run_job, job_id)

    def _fail_given_up(self) -> None:
        from dbos import DBOS

        running = self._ledger.oldest("running")
        lost = (
            DBOS.list_workflows(workflow_ids=running, status=list(GIVEN_UP), load_input=False)
            if running
            else []
        )
        for workflow in lost:
            problem = ProblemError(
                "internal", f"the engine gave the job up ({workflow.error}); submit it again"
            )
            self._ledger.fail(workflow.workflow_id, problem.document())

    def _leave(self) -> None:
        """End at once: a computation under way is nobody's then, and another worker takes it."""
        self._interruptions.close()
        with suppress(SQLAlchemyError):
            self._heartbeats.leave()


def _prepare_libraries() -> None:
    """Load what every task needs before the first one comes, and keep its progress bars out of the log."""
    import transformers

    import profiler.sweep.run  # noqa: F401

    log: Any = transformers.utils.logging
    log.set_verbosity_error()
    log.disable_progress_bar()
