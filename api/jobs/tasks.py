"""What workers compute for jobs: profiling steps, plans, checkpoints, measurements.

What lives here: each task as a method from a JSON-able request to a JSON-able result, every one idempotent: what is
already in the data directory or the store is found, not made again. In which order is for `workflows.py`.

    <data_dir>/runs/<digest>/profile    a profile being made, kept when finished as the answer to the same request
    <data_dir>/profiles/<sha256>        finished profiles
    <data_dir>/checkpoints/<plan id>    finished checkpoints

Where machines share no disk, the store has the same names, and a run's steps as outputs of their own until it is
finished: runs/<digest>/begin, inputs-<n>, block-<n>, and at the end profile alone.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allocator.atomic import locked
from allocator.errors import BitrankError
from api.jobs.repository import Ledger
from api.problems import problem_of
from api.schemas.jobs import EvaluationJob, JobProgress, PlanJob, ProfileJob, ProfileOptions
from api.settings import Settings
from api.storage.artifacts import open_store
from api.storage.database import Database, EvaluationRow
from api.storage.models import Catalogue
from api.storage.plans import PlanStore
from api.storage.profiles import ProfileStore

if TYPE_CHECKING:
    from allocator.plan import Plan
    from profiler.documents.profile import Profile
    from profiler.sweep.run import ProfileRun, ProfileSettings

REPORT_SECONDS = 0.5
LOCK_SECONDS = 0.2
Json = dict[str, Any]


class Reporter:
    """A `Progress` that writes to the ledger: at most twice a second, and the time left at the rate so far.

    `item` is the model of a batch, whose own progress counts items: only events are written then.
    """

    def __init__(self, ledger: Ledger, job_id: str, item: str | None = None) -> None:
        self._ledger, self._job_id, self._item = ledger, job_id, item
        self._stage, self._first, self._entered, self._written = "", 0, 0.0, 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        moment = time.monotonic()
        if stage != self._stage:
            self._stage, self._first, self._entered, self._written = stage, done, moment, 0.0
        if done < total and moment - self._written < REPORT_SECONDS:
            return
        self._written = moment
        steps = done - self._first
        eta = (moment - self._entered) / steps * (total - done) if steps > 0 else None
        progress = JobProgress(stage=stage, done=done, total=total, eta_seconds=eta)
        self.event("progress", progress.model_dump())
        if self._item is None:
            self._ledger.set_progress(self._job_id, progress)

    def event(self, kind: str, data: Json) -> None:
        self._ledger.add_event(
            self._job_id, kind, data if self._item is None else {**data, "model": self._item}
        )


@dataclass(frozen=True, slots=True)
class Executor:
    """Who computes: the worker's id, its device, and who else is alive."""

    id: str
    device: str
    is_alive: Callable[[str], bool]


class Tasks:
    """The tasks of one worker process. Keeps one model loaded, for the next block of it."""

    def __init__(self, settings: Settings, database: Database, executor: Executor) -> None:
        self._settings, self._database, self._executor = settings, database, executor
        self._catalogue = Catalogue(settings)
        self._profiles = ProfileStore(settings, database)
        self._plans = PlanStore(settings, database)
        self._store = open_store(settings)
        self._run: tuple[Json, ProfileRun] | None = None

    @property
    def worker(self) -> str:
        """The id of the worker these tasks are computed by."""
        return self._executor.id

    def run(self, name: str, request: Json, report: Reporter) -> Json:
        """The result of the task of that name."""
        tasks: dict[str, Callable[[Json, Reporter], Json]] = {
            "begin": self.begin,
            "block": self.block,
            "finish": self.finish,
            "plan": self.plan,
            "compress": self.compress,
            "verify": self.verify,
            "evaluate": self.evaluate,
        }
        return tasks[name](request, report)

    def begin(self, request: Json, report: Reporter) -> Json:
        """The id of the profile where it is made already; otherwise statistics on disk and the number of blocks.

        With `current`, one that an earlier version made is made again.
        """
        from profiler.sweep.run import begin_profile

        job = ProfileJob.model_validate({name: request[name] for name in request if name != "current"})
        known = self._profiles.find(job.model) if job.settings == ProfileOptions() else None
        if known is not None and not (request.get("current") and self._is_of_earlier_version(known)):
            return {"profile_id": known}
        run = self._opened(job)
        with self._alone(run, "begin"):
            if self._is_finished(run):
                return self._registered(run.output, job.model)
            if not self._store.has(address(run, "begin")):
                run.output.parent.mkdir(parents=True, exist_ok=True)
                begin_profile(run, report)
                self._publish_begun(run)
        return {"blocks": run.block_count}

    def block(self, request: Json, report: Reporter) -> Json:
        """Sweep one block; `measured` names the layers that were not on disk yet."""
        from profiler.sweep.run import sweep_block

        run, index = self._opened(ProfileJob.model_validate(request["profile"])), int(request["block"])
        step = f"block-{index}"
        with self._alone(run, step):
            if self._is_finished(run) or self._store.has(address(run, step)):
                return {"measured": []}
            self._fetch_begun(run, index)
            measured = sweep_block(run, index, report)
            self._store.publish(address(run, step), run.output, swept_files(run, index))
        report.event(
            "block",
            {
                "run": run.output.parent.name,
                "block": index,
                "measured": measured,
                "executor": self._executor.id,
            },
        )
        return {"measured": measured}

    def finish(self, request: Json, report: Reporter) -> Json:
        """Probes, the profile's files, and its registration."""
        from profiler.sweep.run import finish_profile

        job = ProfileJob.model_validate(request)
        run = self._opened(job)
        blocks = range(run.block_count)
        steps = ["begin", *(f"block-{index}" for index in blocks)]
        with self._alone(run, "finish"):
            if not self._is_finished(run):
                for step in steps:
                    self._store.fetch(address(run, step), run.output)
                self._run = None
                finish_profile(run, report)
            self._store.publish(address(run, "profile"), run.output, finished_files(run))
            for step in (*steps, *(f"inputs-{index}" for index in blocks)):
                self._store.remove(address(run, step))
            shutil.rmtree(run.work, ignore_errors=True)
        return self._registered(run.output, job.model)

    def plan(self, request: Json, report: Reporter) -> Json:
        """One outcome per budget: the id of a stored plan, or a problem."""
        outcomes = []
        for number, budget in enumerate(request["budgets"]):
            outcome = self._planned(request, budget)
            outcomes.append(outcome)
            if (first := request.get("first_item")) is not None:
                item = {"index": first + number, "model": request["model"], "budget": budget, **outcome}
                report.event("item", item)
        return {"outcomes": outcomes}

    def _planned(self, request: Json, budget: str | None) -> Json:
        profile = self._profiles.load(request["profile_id"])
        try:
            made = planned(PlanJob.model_validate({**request["job"], "budget": budget}), profile)
        except BitrankError as error:
            return {"error": problem_of(error).document()}
        plan_id, _ = self._plans.save(made, request.get("owner"))
        return {"profile_id": profile.sha256, "plan_id": plan_id}

    def verify(self, request: Json, report: Reporter) -> Json:
        """A stored plan measured beside uniform: the id of the plan that says so, and what was measured."""
        from api.services.usecases import verify_plan

        plan = self._plans.plan(request["plan"])
        profile = self._profiles.load(plan.profile_sha256)
        try:
            found = verify_plan(plan, profile, report, self._executor.device, request["constrained"])
        except BitrankError as error:
            return {"error": problem_of(error).document()}
        plan_id, _ = self._plans.save(found, request.get("owner"))
        assert found.verification is not None
        return {"plan_id": plan_id, "verification": found.verification.model_dump(mode="json")}

    def compress(self, request: Json, report: Reporter) -> Json:
        """The checkpoint of a stored plan, unless it is there."""
        from api.services.usecases import execute

        plan_id = request["plan"]
        plan, output, name = self._plans.plan(plan_id), self._checkpoint(plan_id), f"checkpoints/{plan_id}"
        output.parent.mkdir(parents=True, exist_ok=True)
        with alone(output.with_name(f".{plan_id}.lock"), self._executor):
            if not output.exists() and not self._store.has(name):
                profile = self._profiles.load(plan.profile_sha256)
                execute(plan, profile, output, report, self._executor.device)
            if output.exists():
                self._store.publish(name, output, sorted(output.iterdir()))
        return {"plan_id": plan_id, "checkpoint": name, "tensor_bytes": plan.total_bytes}

    def evaluate(self, request: Json, report: Reporter) -> Json:
        """The measured KL of a plan's checkpoint, stored beside the predicted one."""
        from api.services.usecases import evaluate_model

        job, row_id = EvaluationJob.model_validate(request["job"]), request["evaluation_id"]
        plan, checkpoint = self._plans.plan(job.plan), self._checkpoint(job.plan)
        if not checkpoint.exists():
            self._store.restore(f"checkpoints/{job.plan}", checkpoint)
        found = evaluate_model(
            str(checkpoint), plan.model.id, None, job.tokens, report, device=self._executor.device
        )
        self._record(row_id, job.plan, plan, asdict(replace(found, model=f"checkpoints/{job.plan}")))
        return {
            "evaluation_id": row_id,
            "plan_id": job.plan,
            "kl_nats": found.kl_nats,
            "predicted_kl_nats": plan.predicted_kl,
            "perplexity": found.perplexity,
            "reference_perplexity": found.reference_perplexity,
        }

    def _record(self, row_id: str, plan_id: str, plan: Plan, result: Json) -> None:
        row = EvaluationRow(
            id=row_id,
            plan_id=plan_id,
            model=result["model"],
            reference=result["reference"],
            predicted_kl=plan.predicted_kl,
            measured_kl=result["kl_nats"],
            result={key: value for key, value in result.items() if value == value},
        )
        with self._database.transaction() as session:
            session.merge(row)

    def _checkpoint(self, plan_id: str) -> Path:
        return self._settings.checkpoints_dir / plan_id

    def _is_of_earlier_version(self, profile_id: str) -> bool:
        """Whether a profile has no weights of its tokens, so that its prices may be wrong by factors."""
        from profiler.documents.profile import TOKEN_WEIGHTS

        return not (self._profiles.load(profile_id).path / TOKEN_WEIGHTS).exists()

    def _is_finished(self, run: ProfileRun) -> bool:
        """Whether the profile is made, here or on another machine."""
        from profiler.documents.workspace import is_finished

        self._store.fetch(address(run, "profile"), run.output)
        return is_finished(run.output, run.request)

    def _publish_begun(self, run: ProfileRun) -> None:
        """What every block needs is one output, each block's inputs are another: they are large."""
        for index, inputs in enumerate(run.inputs):
            self._store.publish(address(run, f"inputs-{index}"), run.output, [inputs.path])
        large = {inputs.path for inputs in run.inputs}
        common = [file for file in sorted(run.work.glob("[!.]*.*")) if file not in large]
        self._store.publish(address(run, "begin"), run.output, [run.output / "request.json", *common])

    def _fetch_begun(self, run: ProfileRun, index: int) -> None:
        for needed in ("begin", f"inputs-{index}"):
            self._store.fetch(address(run, needed), run.output)
        for folder in ("layers", "probes"):
            (run.work / folder).mkdir(parents=True, exist_ok=True)

    def _registered(self, directory: Path, model: str) -> Json:
        return {"profile_id": self._profiles.register(directory, model)}

    def _opened(self, job: ProfileJob) -> ProfileRun:
        """The run of this request, from memory where the last task was of it too."""
        from profiler.model.checkpoint import find_model
        from profiler.sweep.run import open_run

        key = job.model_dump()
        if self._run is not None and self._run[0] == key:
            return self._run[1]
        self._run = None
        ref = find_model(job.directory or self._catalogue.resolve(job.model))
        run = open_run(ref, Path(), profile_settings(job, self._executor.device))
        digest = sha256(f"{ref.id}\n{run.request}".encode()).hexdigest()[:32]
        run = replace(run, output=self._settings.data_dir / "runs" / digest / "profile")
        self._run = (key, run)
        return run

    @contextmanager
    def _alone(self, run: ProfileRun, step: str) -> Iterator[None]:
        with alone(run.output.parent / f"{step}.lock", self._executor):
            yield


def address(run: ProfileRun, step: str) -> str:
    """A step's name in the store."""
    return f"runs/{run.output.parent.name}/{step}"


def swept_files(run: ProfileRun, index: int) -> list[Path]:
    """The sweeps and the probes of one block's layers."""
    return [
        file for layer in run.loaded.layers_of(index) for file in sorted(run.work.glob(f"*/{layer.name}.*"))
    ]


def finished_files(run: ProfileRun) -> list[Path]:
    """The profile's files; last the one without which it is unfinished."""
    files = [file for file in run.output.glob("[!.]*") if file.name != "profile.json"]
    return [*sorted(files), run.output / "profile.json"]


def profile_settings(job: ProfileJob, device: str) -> ProfileSettings:
    from profiler.sweep.run import ProfileSettings

    given = {name: value for name, value in job.settings.model_dump().items() if value is not None}
    return ProfileSettings(device=device, **given)


def planned(job: PlanJob, profile: Profile) -> Plan:
    """The plan of one budget, as the job asks for it. Raises the allocator's errors."""
    from api.schemas.documents import PlanConstraints
    from api.services.usecases import plan_budget

    constraints = None if job.constraints is None else PlanConstraints.model_validate(job.constraints).rules()
    return plan_budget(profile.offered(job.embeddings), job.budget, job.strategy, constraints, job.target)


@contextmanager
def alone(path: Path, executor: Executor) -> Iterator[None]:
    """Hold the lock file while open. The system lets go of a killed holder's lock at once; a holder that is frozen
    is passed over when it is declared dead, which does no harm: what both then write is the same.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        seen = ""
        while not locked(file.fileno()):
            file.seek(0)
            holder = file.read().strip()
            if holder and holder == seen and not executor.is_alive(holder):
                break
            seen = holder
            time.sleep(LOCK_SECONDS)
        else:
            file.truncate(0)
            file.write(executor.id)
            file.flush()
        yield
