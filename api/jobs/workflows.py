"""The workflows: in which order a job's tasks run, and what becomes of their outcomes.

What lives here: one durable workflow per job, one per model of a batch, one per task. A profile is one `begin`, a task
per block that any worker may take, one `finish`. The engine replays a workflow whose worker died from its recorded
children, so nothing here depends on anything but arguments and outcomes. The tasks themselves are in `tasks.py`.

An outcome is `{"result": …}` or `{"error": problem document}`; no exception crosses a workflow.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dbos import DBOS, SetWorkflowID, WorkflowHandle, WorkflowSerializationFormat
from dbos import error as engine_errors
from sqlalchemy.exc import OperationalError
from structlog.contextvars import bound_contextvars

from allocator.errors import BitrankError
from api.jobs.cancellation import Interrupted, Interruptions
from api.jobs.dbos_engine import COMPUTE, GROUPS, POLLING_SECONDS, RUN_JOB
from api.jobs.repository import Ledger, through_outages
from api.jobs.tasks import Reporter, Tasks
from api.observability.logging_setup import log
from api.observability.tracing import task_span
from api.problems import ProblemError, problem_of
from api.schemas.jobs import BatchJob, CompressionJob, EvaluationJob, JobProgress, PlanJob, ProfileJob
from api.storage.database import now

Json = dict[str, Any]
BACK_OFF_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
PERMANENT = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)
PORTABLE = WorkflowSerializationFormat.PORTABLE
OVER: Json = {"error": ProblemError("conflict", "the job was over before the task").document()}
ATTEMPTS = 1_000
"""Times that a workflow may be resumed: far beyond any number of machines that die, yet not endless."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """What the workflows of this process work with; set once, before the engine is launched."""

    ledger: Ledger
    tasks: Tasks
    interruptions: Interruptions


_runtime: list[Runtime] = []


def install(runtime: Runtime) -> None:
    _runtime[:] = [runtime]


class TaskFailed(Exception):
    """A task ended with a problem, which fails its job or its item."""

    def __init__(self, problem: Json) -> None:
        super().__init__(problem["detail"])
        self.problem = problem


@DBOS.workflow(name=RUN_JOB, max_recovery_attempts=ATTEMPTS, serialization_type=PORTABLE)
def run_job(job_id: str) -> str:
    """Everything a job does; returns the state it is left in."""
    started = start_job(job_id)
    if started is None:
        return "cancelled"
    kinds: dict[str, Callable[[str, Json], Json]] = {
        "profile": profile_job,
        "plan": plan_job,
        "batch": batch_job,
        "compression": compression_job,
        "evaluation": evaluation_job,
    }
    try:
        result = kinds[started["kind"]](job_id, started)
    except TaskFailed as error:
        fail_job(job_id, error.problem)
        return "failed"
    except engine_errors.DBOSException:
        raise  # a child was cancelled, and so is this
    except Exception as error:
        fail_job(job_id, internal(error))
        return "failed"
    finish_job(job_id, result)
    return "done"


@DBOS.step()
def start_job(job_id: str) -> Json | None:
    """The kind, request and owner of a job that is to run, None for one that was cancelled meanwhile."""
    ledger = _runtime[0].ledger
    if not ledger.start(job_id):
        return None
    return ledger.read(job_id).model_dump(mode="json", include={"kind", "request", "owner"})


@DBOS.step()
def finish_job(job_id: str, result: Json) -> None:
    _runtime[0].ledger.finish(job_id, result)


@DBOS.step()
def fail_job(job_id: str, problem: Json) -> None:
    _runtime[0].ledger.fail(job_id, problem)


def profile_job(job_id: str, started: Json) -> Json:
    job = ProfileJob.model_validate(started["request"])
    return {"profile_id": profiled(job_id, job_id, job, None, current=True)}


def plan_job(job_id: str, started: Json) -> Json:
    job = PlanJob.model_validate(started["request"])
    profile_id = profiled(job_id, job_id, job, None)
    request = plan_request(job, profile_id, [job.budget], started["owner"])
    (outcome,) = task(job_id, job_id, "plan", request, None)["outcomes"]
    if "error" in outcome:
        raise TaskFailed(outcome["error"])
    if not job.verify:
        return dict(outcome)
    measuring = {
        "plan": outcome["plan_id"],
        "constrained": job.constraints is not None,
        "owner": started["owner"],
    }
    measured = task(job_id, job_id, "verify", measuring, None)
    if "error" in measured:
        raise TaskFailed(measured["error"])
    return {**outcome, **measured}


def batch_job(job_id: str, started: Json) -> Json:
    """Every entry as a workflow of its own; the result lists all items in order, failed ones with their problem."""
    job, first, handles = BatchJob.model_validate(started["request"]), 0, []
    note_items(job_id, [], job.item_count)
    for number, entry in enumerate(job.jobs):
        with SetWorkflowID(f"{job_id}.{number}"):
            place = {"number": number, "first": first, "total": job.item_count, "owner": started["owner"]}
            handles.append(
                DBOS.enqueue_workflow(GROUPS, run_group, job_id, place, entry.model_dump(mode="json"))
            )
        first += len(entry.budgets)
    groups = [handle.get_result(polling_interval_sec=POLLING_SECONDS) for handle in handles]
    return {"items": [item for group in groups for item in group]}


@DBOS.workflow(max_recovery_attempts=ATTEMPTS, serialization_type=PORTABLE)
def run_group(job_id: str, place: Json, request: Json) -> list[Json]:
    """One model of a batch under each of its budgets; a problem before planning is every item's problem."""
    budgets, first = request.pop("budgets"), place["first"]
    job, prefix = PlanJob.model_validate(request), f"{job_id}.{place['number']}"
    try:
        profile_id = profiled(job_id, prefix, job, job.model)
        planning = plan_request(job, profile_id, budgets, place["owner"]) | {"first_item": first}
        outcomes = task(job_id, prefix, "plan", planning, job.model)["outcomes"]
    except TaskFailed as error:
        outcomes = [{"error": error.problem} for _ in budgets]
    items = [
        {"index": first + i, "model": job.model, "budget": budget, **outcome}
        for i, (budget, outcome) in enumerate(zip(budgets, outcomes, strict=True))
    ]
    note_items(job_id, items, place["total"])
    return items


@DBOS.step()
def note_items(job_id: str, items: list[Json], total: int) -> None:
    """Make items readable while the batch still runs, and count them."""
    ledger = _runtime[0].ledger
    known = {item["index"] for item in ledger.items(job_id)}
    for item in items:
        if item["index"] not in known:
            ledger.add_event(job_id, "item", item)
    done = len(known | {item["index"] for item in items})
    elapsed_seconds = (now() - ledger.read(job_id).created_at).total_seconds()
    eta = elapsed_seconds / done * (total - done) if done else None
    ledger.set_progress(job_id, JobProgress(stage="items", done=done, total=total, eta_seconds=eta))


def compression_job(job_id: str, started: Json) -> Json:
    job = CompressionJob.model_validate(started["request"])
    return task(job_id, job_id, "compress", job.model_dump(), None)


def evaluation_job(job_id: str, started: Json) -> Json:
    job = EvaluationJob.model_validate(started["request"])
    task(job_id, job_id, "compress", {"plan": job.plan}, None)
    request = {"job": job.model_dump(), "evaluation_id": job_id}
    return task(job_id, job_id, "evaluate", request, None)


def plan_request(job: PlanJob, profile_id: str, budgets: list[str | None], owner: str | None) -> Json:
    settled = job.model_dump(mode="json", exclude={"budget"})
    return {"job": settled, "profile_id": profile_id, "budgets": budgets, "model": job.model, "owner": owner}


def profiled(job_id: str, prefix: str, job: ProfileJob, item: str | None, current: bool = False) -> str:
    """The id of the model's profile, measured by as many workers as there are; `current`: not by an earlier version."""
    request = job.model_dump(mode="json", include=set(ProfileJob.model_fields))
    begun = task(job_id, prefix, "begin", request | ({"current": True} if current else {}), item)
    if "profile_id" in begun:
        return str(begun["profile_id"])
    blocks = [
        start_task(job_id, f"{prefix}.block-{index}", "block", {"profile": request, "block": index}, item)
        for index in range(begun["blocks"])
    ]
    for handle in blocks:
        settled(handle)
    return str(task(job_id, prefix, "finish", request, item)["profile_id"])


def task(job_id: str, prefix: str, name: str, request: Json, item: str | None) -> Json:
    """Have a worker compute a task and wait for it. Raises `TaskFailed`."""
    return settled(start_task(job_id, f"{prefix}.{name}", name, request, item))


def start_task(
    job_id: str, workflow_id: str, name: str, request: Json, item: str | None
) -> WorkflowHandle[Json]:
    with SetWorkflowID(workflow_id):
        return DBOS.enqueue_workflow(COMPUTE, run_task, job_id, name, request, item)


def settled(handle: WorkflowHandle[Json]) -> Json:
    outcome = handle.get_result(polling_interval_sec=POLLING_SECONDS)
    if "error" in outcome:
        raise TaskFailed(outcome["error"])
    return dict(outcome["result"])


@DBOS.workflow(max_recovery_attempts=ATTEMPTS, serialization_type=PORTABLE)
def run_task(job_id: str, name: str, request: Json, item: str | None) -> Json:
    return compute(job_id, name, request, item)


@DBOS.step()
def compute(job_id: str, name: str, request: Json, item: str | None) -> Json:
    """The task's outcome. Transient faults are tried again with growing waits; the task of a job that is over stops."""
    runtime = _runtime[0]
    if through_outages(lambda: runtime.ledger.is_over(job_id)):
        return OVER
    with bound_contextvars(job_id=job_id, task=name, worker=runtime.tasks.worker):
        started = time.monotonic()
        outcome = attempted(runtime, job_id, name, request, item)
        problem = {"problem": outcome["error"]["detail"]} if "error" in outcome else {}
        log.info("task", seconds=round(time.monotonic() - started, 3), **problem)
    return outcome


def attempted(runtime: Runtime, job_id: str, name: str, request: Json, item: str | None) -> Json:
    report = Reporter(runtime.ledger, job_id, item)
    try:
        with runtime.interruptions.watching(job_id), task_span(job_id, name, runtime.tasks.worker):
            return {"result": persistently(lambda: runtime.tasks.run(name, request, report), report.event)}
    except Interrupted:
        return OVER
    except ProblemError as error:
        return {"error": error.document()}
    except BitrankError as error:
        return {"error": problem_of(error).document()}
    except Exception as error:
        log.exception("task failed")
        return {"error": internal(error)}


def internal(error: Exception) -> Json:
    detail = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
    return ProblemError("internal", detail).document()


def persistently(
    action: Callable[[], Json],
    note: Callable[[str, Json], None],
    waits: tuple[float, ...] = BACK_OFF_SECONDS,
) -> Json:
    """Do it, and again after each of the waits while the fault is a transient one; each is noted."""
    for attempt, wait in enumerate(waits, 1):
        try:
            return action()
        except Exception as error:
            if not is_transient(error):
                raise
            note("retry", {"attempt": attempt, "seconds": wait, "reason": str(error)[:200]})
        deadline = time.monotonic() + wait
        while time.monotonic() < deadline:
            time.sleep(min(0.1, wait))
    return action()


def is_transient(error: Exception) -> bool:
    """Whether trying again may help: a full disk, a network or database that went away; never a wrong request."""
    if isinstance(error, (BitrankError, ProblemError, *PERMANENT)):
        return False
    return isinstance(error, OSError | OperationalError)
