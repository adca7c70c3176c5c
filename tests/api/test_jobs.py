"""Durable jobs with real worker processes: what a killed one leaves, others finish, once, to the same bytes."""

from __future__ import annotations

import errno
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError
from sqlalchemy.exc import OperationalError

from allocator.errors import BitrankError, InfeasibleError
from api.cli.jobs import read_batch
from api.jobs.client import Jobs, QuotaError, UnknownJobError
from api.jobs.dbos_engine import JOBS, RUN_JOB, VERSION, engine_client
from api.jobs.repository import Ledger
from api.jobs.tasks import profile_settings
from api.jobs.workflows import is_transient, persistently
from api.problems import ProblemError
from api.schemas.documents import ProfileSettingsRequest
from api.schemas.jobs import JobEvent, ProfileJob, ProfileOptions
from api.settings import Settings
from api.storage.database import open_database
from api.storage.plans import PlanStore
from benchmarks.cluster import Cluster, binary
from benchmarks.fleet import Fleet
from benchmarks.installation import (
    GRID,
    finished,
    installation,
    measured_twice,
    read_profile,
    undisturbed,
    write_small_model,
)
from benchmarks.witness import Witness
from profiler.documents.profile import load_profile
from profiler.model.checkpoint import find_model
from profiler.statistics.calibration import silent
from profiler.sweep.run import ProfileSettings, begin_profile, finish_profile, open_run, sweep_block

pytestmark = pytest.mark.alone

SMALL = {"model": "small", "settings": GRID}


@dataclass(frozen=True)
class Installation:
    settings: Settings
    jobs: Jobs
    fleet: Fleet


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model `small`, of three blocks."""
    folder = tmp_path_factory.mktemp("installation")
    write_small_model(folder / "models" / "small", 3)
    return folder / "models"


@pytest.fixture(scope="module")
def expected(models: Path) -> dict[str, bytes]:
    return undisturbed(models / "small", 0, models.parent / "undisturbed")


@pytest.fixture(scope="module")
def sqlite(models: Path) -> Iterator[Installation]:
    """An installation on SQLite with two workers."""
    with installation(models.parent, "") as (settings, jobs):
        fleet = Fleet(settings)
        fleet.start()
        fleet.start()
        yield Installation(settings, jobs, fleet)
        fleet.end()


@pytest.fixture
def postgresql(models: Path, tmp_path: Path) -> Iterator[Installation]:
    """An installation on a PostgreSQL cluster of its own with two workers."""
    try:
        binary("initdb")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    cluster = Cluster()
    (tmp_path / "models").symlink_to(models)
    try:
        with installation(tmp_path, cluster.url) as (settings, jobs):
            fleet = Fleet(settings)
            fleet.start()
            fleet.start()
            yield Installation(settings, jobs, fleet)
            fleet.end()
    finally:
        cluster.remove()


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    database = open_database(Settings(data_dir=tmp_path))
    yield Ledger(database)
    database.close()


def endless_profile(seed: int) -> dict[str, object]:
    """Sampling this many tokens takes hours."""
    return {"model": "small", "settings": GRID | {"tokens": 9_000_000, "seed": seed}}


def awaited(jobs: Jobs, job_id: str, wanted: Callable[[JobEvent], bool]) -> JobEvent:
    """The first event of that sort, once there is one."""
    while True:
        for event in jobs.events(job_id):
            if wanted(event):
                return event
        assert not jobs.read(job_id).is_finished
        time.sleep(0.05)


def killed_in_mid_profile_and_finished_by_another(here: Installation) -> dict[str, bytes]:
    """The files of a profile whose worker was killed, after nothing was measured or written twice."""
    witness = Witness(here.settings.data_dir)
    job = here.jobs.submit("profile", SMALL, None)
    swept = awaited(here.jobs, job.id, lambda event: event.kind == "block")
    victim = next(p for p in here.fleet.processes if f"-{p.pid}-" in swept.data["executor"])
    here.fleet.kill(victim, signal.SIGKILL)
    record = finished(here.jobs, job.id)
    witness.close()
    assert record.state == "done", record.error
    assert record.result is not None
    assert witness.rewritten == []
    assert measured_twice(here.jobs, job.id) == 0
    measured = [e.data for e in here.jobs.events(job.id) if e.kind == "block" and e.data["measured"]]
    assert {data["block"] for data in measured} == {0, 1, 2}
    return read_profile(here.settings, record.result)


def test_a_profile_outlives_its_killed_worker_on_sqlite(
    sqlite: Installation, expected: dict[str, bytes]
) -> None:
    assert killed_in_mid_profile_and_finished_by_another(sqlite) == expected


def test_a_profile_outlives_its_killed_worker_on_postgresql(
    postgresql: Installation, expected: dict[str, bytes]
) -> None:
    assert killed_in_mid_profile_and_finished_by_another(postgresql) == expected


def test_blocks_swept_in_any_order_by_other_processes_make_the_same_profile(
    models: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    settings = ProfileSettings(tokens=512, bits=(2, 3, 4), ranks=(0, 4), group_sizes=(64,))
    ref, output = find_model(str(models / "small")), tmp_path / "profile"
    first, second = open_run(ref, output, settings), open_run(ref, output, settings)
    begin_profile(first, silent)
    assert len(sweep_block(first, 1, silent)) == 7
    assert [len(sweep_block(second, index, silent)) for index in (2, 1, 0)] == [7, 0, 7]
    assert load_profile(finish_profile(first, silent).path).path == output
    assert {name: (output / name).read_bytes() for name in expected} == expected


def test_events_are_numbered_and_progress_never_exceeds_its_total(sqlite: Installation) -> None:
    job = sqlite.jobs.submit("plan", SMALL | {"budget": "3.3bpw"}, None)
    assert finished(sqlite.jobs, job.id).state == "done"
    events = sqlite.jobs.events(job.id)
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert [event.kind for event in events][:2] == ["queued", "running"]
    assert events[-1].kind == "done"
    assert sqlite.jobs.events(job.id, after=events[-2].sequence) == events[-1:]
    assert all(e.data["done"] <= e.data["total"] for e in events if e.kind == "progress")


def test_a_finished_profile_is_not_measured_again(sqlite: Installation) -> None:
    first, second = (finished(sqlite.jobs, sqlite.jobs.submit("profile", SMALL, None).id) for _ in range(2))
    assert first.result == second.result
    assert not [event for event in sqlite.jobs.events(second.id) if event.kind == "block"]


def test_a_cancelled_job_frees_its_worker_and_says_no_more(sqlite: Installation) -> None:
    endless = [sqlite.jobs.submit("profile", endless_profile(seed), None) for seed in (1, 2)]
    for job in endless:
        awaited(sqlite.jobs, job.id, lambda event: event.kind == "running")
    time.sleep(1.0)
    for job in endless:
        assert sqlite.jobs.cancel(job.id).state == "cancelled"
    following = sqlite.jobs.submit("plan", SMALL | {"budget": "3.3bpw"}, None)
    assert finished(sqlite.jobs, following.id).state == "done"
    for job in endless:
        assert sqlite.jobs.events(job.id)[-1].kind in ("cancelled", "progress")
        assert sqlite.jobs.read(job.id).state == "cancelled"
        assert sqlite.jobs.cancel(job.id).state == "cancelled"


def test_one_failing_item_never_sinks_a_batch(sqlite: Installation) -> None:
    entries = [SMALL | {"budgets": ["3.3bpw", "1B", "2.9bpw"]}, {"model": "absent", "budgets": ["25%"]}]
    record = finished(sqlite.jobs, sqlite.jobs.submit("batch", {"jobs": entries}, None).id)
    assert record.state == "done" and record.result is not None
    items = record.result["items"]
    assert [item["budget"] for item in items] == ["3.3bpw", "1B", "2.9bpw", "25%"]
    problems = [item.get("error", {}).get("type", "").rpartition(":")[2] for item in items]
    assert problems == ["", "infeasible", "", "unknown-model"]
    noted = [event.data for event in sqlite.jobs.events(record.id) if event.kind == "item"]
    assert sorted(data["index"] for data in noted) == [0, 1, 2, 3]


def test_a_batch_decides_on_embeddings_where_an_entry_asks_for_it(sqlite: Installation) -> None:
    entries = [SMALL | {"budgets": ["60%"], "embeddings": wanted} for wanted in (False, True)]
    record = finished(sqlite.jobs, sqlite.jobs.submit("batch", {"jobs": entries}, None).id)
    assert record.state == "done" and record.result is not None, record.error
    database = open_database(sqlite.settings)
    store = PlanStore(sqlite.settings, database)
    without, with_tables = (store.plan(item["plan_id"]) for item in record.result["items"])
    database.close()
    assert without.tables == {} and with_tables.tables
    assert with_tables.predicted_kl <= without.predicted_kl


def test_a_plan_is_carried_out_and_measured(sqlite: Installation) -> None:
    planned = finished(sqlite.jobs, sqlite.jobs.submit("plan", SMALL | {"budget": "3.3bpw"}, None).id)
    assert planned.result is not None
    request = {"plan": planned.result["plan_id"], "tokens": 256}
    record = finished(sqlite.jobs, sqlite.jobs.submit("evaluation", request, None).id)
    assert record.state == "done" and record.result is not None, record.error
    assert record.result["kl_nats"] > 0
    checkpoint = sqlite.settings.checkpoints_dir / planned.result["plan_id"]
    assert (checkpoint / "config.json").exists()


def test_a_plan_to_verify_is_answered_with_what_was_measured(sqlite: Installation) -> None:
    wanted = SMALL | {"budget": "2.8bpw", "verify": True}
    record = finished(sqlite.jobs, sqlite.jobs.submit("plan", wanted, None).id)
    assert record.state == "done" and record.result is not None, record.error
    database = open_database(sqlite.settings)
    plan = PlanStore(sqlite.settings, database).plan(record.result["plan_id"])
    database.close()
    assert plan.verification is not None
    assert record.result["verification"] == plan.verification.model_dump(mode="json")
    assert plan.verification.measured_kl > 0 and plan.verification.swaps > 0
    assert plan.total_bytes <= plan.budget.bytes


def test_a_wrong_job_fails_once_with_a_problem(sqlite: Installation) -> None:
    job = sqlite.jobs.submit("plan", SMALL | {"budget": "1B"}, None)
    record = finished(sqlite.jobs, job.id)
    assert record.state == "failed" and record.error is not None
    assert record.error["type"].endswith(":infeasible") and record.error["smallest_bytes"] > 1
    assert not [event for event in sqlite.jobs.events(job.id) if event.kind == "retry"]


def test_a_job_whose_submitter_died_is_handed_over_by_a_worker(sqlite: Installation) -> None:
    database = open_database(sqlite.settings)
    record = Ledger(database).insert("profile", {"model": "absent"}, None, quota=100)
    database.close()
    assert finished(sqlite.jobs, record.id).state == "failed"


def test_a_job_that_the_engine_gave_up_fails(sqlite: Installation) -> None:
    database, client = open_database(sqlite.settings), engine_client(sqlite.settings)
    record = Ledger(database).insert("profile", {"model": "absent"}, None, quota=100)
    assert Ledger(database).start(record.id)
    client.enqueue(
        {"workflow_name": RUN_JOB, "queue_name": JOBS, "workflow_id": record.id, "app_version": VERSION}
    )
    failed = finished(sqlite.jobs, record.id)
    client.destroy()
    database.close()
    assert failed.error is not None and failed.error["detail"].startswith("the engine gave the job up")


def test_a_second_start_of_an_installation_keeps_its_jobs(sqlite: Installation) -> None:
    known = sqlite.jobs.list(None, 100)
    again = Jobs(sqlite.settings, open_database(sqlite.settings))
    again.launch()
    assert again.list(None, 100) == known
    again.close()


def test_pages_follow_each_other_without_gaps(ledger: Ledger) -> None:
    made = [ledger.insert("profile", {"model": str(n)}, None, quota=100).id for n in range(7)]
    first = ledger.page(None, 4, None)
    second = ledger.page(first.next_cursor, 4, None)
    assert [job.id for job in (*first.jobs, *second.jobs)] == made[::-1]
    assert second.next_cursor is None
    assert ledger.page(None, 4, "done").jobs == []


def test_writers_of_one_job_take_turns(ledger: Ledger) -> None:
    job = ledger.insert("profile", {}, None, quota=100)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: ledger.add_event(job.id, "progress", {"n": n}), range(40)))
    events = ledger.events(job.id, 1)
    assert [event.sequence for event in events] == list(range(2, 42))
    assert sorted(event.data["n"] for event in events) == list(range(40))


def test_a_cancelled_job_stays_cancelled(ledger: Ledger) -> None:
    job = ledger.insert("profile", {}, None, quota=100)
    assert ledger.start(job.id)
    assert ledger.cancel(job.id) and not ledger.cancel(job.id)
    ledger.finish(job.id, {"profile_id": "x"})
    ledger.fail(job.id, {"detail": "late"})
    assert not ledger.start(job.id)
    record = ledger.read(job.id)
    assert (record.state, record.result, record.error) == ("cancelled", None, None)


def test_items_of_a_running_batch_are_readable(ledger: Ledger) -> None:
    job = ledger.insert("batch", {}, None, quota=100)
    ledger.start(job.id)
    for index in (2, 0, 2):
        ledger.add_event(job.id, "item", {"index": index})
    assert ledger.read(job.id).result == {"items": [{"index": 0}, {"index": 2}]}


def test_an_owner_has_a_quota_of_unfinished_jobs(ledger: Ledger) -> None:
    first = ledger.insert("profile", {}, "key", quota=1)
    with pytest.raises(QuotaError) as refused:
        ledger.insert("profile", {}, "key", quota=1)
    assert refused.value.status == 429
    ledger.insert("profile", {}, "other", quota=1)
    ledger.cancel(first.id)
    ledger.insert("profile", {}, "key", quota=1)


def test_an_unknown_job_is_a_problem(ledger: Ledger) -> None:
    with pytest.raises(UnknownJobError) as refused:
        ledger.read("absent")
    assert refused.value.status == 404


@pytest.mark.parametrize(
    ("kind", "request_"),
    [
        ("walk", {}),
        ("profile", {}),
        ("profile", {"model": "demo", "settings": {"bits": []}}),
        ("batch", {"jobs": []}),
        ("batch", {"jobs": [{"model": "demo", "budgets": []}]}),
        ("plan", {"model": "demo", "budget": "25%", "surprise": 1}),
    ],
)
def test_a_request_of_another_shape_is_refused(
    sqlite: Installation, kind: str, request_: dict[str, object]
) -> None:
    before = sqlite.jobs.counts()
    with pytest.raises(ProblemError) as refused:
        sqlite.jobs.submit(kind, request_, None)
    assert refused.value.kind == "invalid-request"
    assert sqlite.jobs.counts() == before


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (ConnectionResetError(), True),
        (OperationalError("", {}, Exception()), True),
        (FileNotFoundError(), False),
        (InfeasibleError("too small", 1), False),
        (BitrankError(), False),
        (ProblemError("unknown-model", ""), False),
        (RuntimeError(), False),
    ],
)
def test_only_faults_that_pass_are_tried_again(error: Exception, transient: bool) -> None:
    assert is_transient(error) == transient


def test_a_full_disk_is_waited_out(ledger: Ledger) -> None:
    job = ledger.insert("profile", {}, None, quota=100)
    faults = [OSError(errno.ENOSPC, "No space left on device")] * 2

    def write() -> dict[str, object]:
        if faults:
            raise faults.pop()
        return {"written": True}

    def noted(kind: str, data: dict[str, object]) -> None:
        ledger.add_event(job.id, kind, data)

    assert persistently(write, noted, (0.01, 0.02)) == {"written": True}
    assert [event.data["seconds"] for event in ledger.events(job.id, 1)] == [0.01, 0.02]
    faults = [OSError(errno.ENOSPC, "No space left on device")] * 3
    with pytest.raises(OSError, match="No space"):
        persistently(write, noted, (0.01, 0.02))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("jobs: [", "as YAML"), ("- 1", "no list `jobs`"), ("jobs: 3", "no list `jobs`")],
)
def test_a_malformed_batch_file_is_one_clear_sentence(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "jobs.yaml"
    file.write_text(text)
    with pytest.raises(BitrankError, match=complaint):
        read_batch(file)


def test_a_batch_file_names_directories_for_every_worker(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    file = tmp_path / "jobs.yaml"
    file.write_text(
        f"jobs: [{{model: {tmp_path / 'mine'}, budgets: [25%]}}, {{model: demo, budgets: [25%]}}]"
    )
    mine, demo = read_batch(file)["jobs"]
    assert (mine["model"], mine["directory"]) == ("mine", str(tmp_path / "mine"))
    assert demo == {"model": "demo", "budgets": ["25%"]}


def test_every_setting_of_a_job_reaches_the_profiler() -> None:
    options = ProfileOptions(
        tokens=999, seed=3, bits=(2, 4), ranks=(0, 8), group_sizes=(32,), factor_bits=(8,), adaptive=True,
        head_ratios=(0.5, 1.0),
    )  # fmt: skip
    settings = profile_settings(ProfileJob(model="small", settings=options), "cpu")
    assert {name: getattr(settings, name) for name in ProfileOptions.model_fields} == options.model_dump()


@pytest.mark.parametrize("schema", [ProfileOptions, ProfileSettingsRequest])
@pytest.mark.parametrize("ratio", [0, 1.5, float("nan")])
def test_a_head_ratio_that_is_no_share_is_refused(schema: type[BaseModel], ratio: float) -> None:
    with pytest.raises(ValidationError, match="head_ratios"):
        schema(head_ratios=(ratio,))
