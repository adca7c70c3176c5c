"""Disturbs batches of profiles and says whether anything was lost, done twice or came out different.

    python -m benchmarks.faults [kills outages disk clock …] [--database sqlite|postgresql] [--profiles 12] [--kills 30]

Two servers and three workers work on one batch, submitted over HTTP; every profile is of the same small random model
under another seed. A process that ends is started again at once. The disturbances:

    kills     SIGKILL of a random server or worker at random moments
    outages   PostgreSQL stopped, in turn in order and at once, and started 5 s later; SQLite's files locked for 40 s
    disk      the data directory, a tmpfs, is filled to the last byte for 10 s; then for so long that a job gives up
    clock     the clocks of half of the processes jump by hours and days, ahead and back

A witness looks at every layer file a hundred times a second: a file of a finished block that is written again is a
block run twice. The undisturbed run is `build_profile` in this process, compared byte by byte. `disk` mounts a tmpfs
and so needs root; `clock` needs a C compiler.
"""

from __future__ import annotations

import argparse
import json
import random
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from api.client import Client
from api.jobs.client import Jobs
from api.jobs.dbos_engine import engine_url
from api.schemas.jobs import JobRecord
from api.settings import Settings
from benchmarks.clock import Clock
from benchmarks.cluster import Cluster
from benchmarks.fleet import Fleet
from benchmarks.installation import (
    BUDGET,
    GRID,
    TIMEOUT_SECONDS,
    installation,
    measured_twice,
    read_profile,
    undisturbed,
    undisturbed_plan,
    write_small_model,
)
from benchmarks.reader import Reader
from benchmarks.witness import Witness

SERVERS, WORKERS = 2, 3
OUTAGE_SECONDS = 5.0
LOCK_SECONDS = 40.0
"""Longer than the 30 s that SQLite waits for a lock by itself."""
FULL_SECONDS = 10.0
GIVEN_UP_SECONDS = 80.0
"""Longer than all waits between the attempts of a task."""
DISK_BYTES = 64 * 2**20
JUMPS_SECONDS = (3_600, -7_200, 400 * 86_400, -86_400, 0)


@dataclass(frozen=True)
class Trial:
    """An installation at work."""

    settings: Settings
    jobs: Jobs
    fleet: Fleet
    cluster: Cluster | None
    clock: Clock | None
    chance: random.Random

    def ended(self, job_id: str) -> JobRecord:
        """The job when it has ended."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while self.goes_on(job_id, 1.0):
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job_id} did not end: {self.jobs.read(job_id)}")
        return self.jobs.read(job_id)

    def goes_on(self, job_id: str, seconds: float) -> bool:
        """Let it work for a while; false when the job has ended."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.fleet.revive()
            if self.jobs.read(job_id).is_finished:
                return False
            time.sleep(0.1)
        return True


def kill(trial: Trial, job_id: str, times: int) -> dict[str, int | str]:
    servers = 0
    made = 0
    while made < times and trial.goes_on(job_id, trial.chance.uniform(0.5, 8.0)):
        victim = trial.chance.choice(trial.fleet.processes)
        servers += trial.fleet.is_server(victim)
        trial.fleet.restart(victim)
        made += 1
    return {"servers_killed": servers, "workers_killed": made - servers}


def stop_database(trial: Trial, job_id: str, times: int) -> dict[str, int | str]:
    made = 0
    while made < times and trial.goes_on(job_id, trial.chance.uniform(3.0, 10.0)):
        if trial.cluster is None:
            with locked(trial.settings):
                time.sleep(LOCK_SECONDS)
        else:
            trial.cluster.stop("immediate" if made % 2 else "fast")
            time.sleep(OUTAGE_SECONDS)
            trial.cluster.start()
        made += 1
    return {"outages": made}


@contextmanager
def locked(settings: Settings) -> Iterator[None]:
    """No one else reads or writes the files of SQLite."""
    with ExitStack() as held:
        for url in (settings.url, engine_url(settings)):
            file = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None, timeout=30.0)
            held.callback(file.close)
            file.execute("BEGIN EXCLUSIVE")
        yield


def fill_disk(trial: Trial, job_id: str, times: int) -> dict[str, int | str]:
    made = 0
    while made < times and trial.goes_on(job_id, trial.chance.uniform(3.0, 10.0)):
        with full(trial.settings):
            time.sleep(FULL_SECONDS)
        made += 1
    return {"times_full": made}


@contextmanager
def full(settings: Settings) -> Iterator[None]:
    """Not a byte is left, also where others give some back, and no room in the logs of SQLite."""
    filler, ending = settings.data_dir / "filler", threading.Event()

    def fill() -> None:
        with filler.open("ab", buffering=0) as file:
            while not ending.wait(0.02):
                for size in (2**20, 4096, 1):
                    while _written(file, size):
                        pass

    if not settings.database_url:
        truncate_logs(settings)
    filling = threading.Thread(target=fill)
    filling.start()
    try:
        yield
    finally:
        ending.set()
        filling.join()
        filler.unlink()


def _written(file: Any, size: int) -> bool:
    try:
        return bool(file.write(bytes(size)))
    except OSError:
        return False


def truncate_logs(settings: Settings) -> None:
    """So that the next write of either database needs room."""
    for url in (settings.url, engine_url(settings)):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"), timeout=30.0)) as file:
            file.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def set_clocks(trial: Trial, job_id: str, times: int) -> dict[str, int | str]:
    assert trial.clock is not None
    made = 0
    while made < times and trial.goes_on(job_id, trial.chance.uniform(1.0, 4.0)):
        trial.clock.set(JUMPS_SECONDS[made % len(JUMPS_SECONDS)])
        made += 1
    return {"jumps": made}


DISTURBANCES: dict[str, Callable[[Trial, str, int], dict[str, int | str]]] = {
    "kills": kill,
    "outages": stop_database,
    "disk": fill_disk,
    "clock": set_clocks,
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an experiment came to. Every field from `blocks_run_twice` on but the last two should be 0."""

    disturbance: str
    database: str
    disturbed: dict[str, int | str]
    profiles: int
    done: int
    blocks: int
    blocks_run_twice: int
    layers_measured_twice: int
    different_profiles: int
    different_plans: int
    ended_by_themselves: int
    events_lost: int
    wrong_answers: int
    left_over: list[str]
    longest_silence_seconds: float
    seconds: float


def experiment(folder: Path, name: str, cluster: Cluster | None, times: int, profiles: int) -> Outcome:
    """A batch of `profiles` under one disturbance, compared with undisturbed profiles and plans."""
    model = folder / "models" / "small"
    write_small_model(model, 3)
    expected = [undisturbed(model, seed, folder / f"undisturbed-{seed}") for seed in range(profiles)]
    plans = [undisturbed_plan(folder / f"undisturbed-{seed}") for seed in range(profiles)]
    with ExitStack() as held:
        if name == "disk":
            held.enter_context(small_disk(folder / "data"))
        settings, jobs = held.enter_context(installation(folder, cluster.url if cluster else ""))
        fleet = Fleet(settings, folder / "log")
        held.callback(fleet.end)
        clock = Clock(folder) if name == "clock" else None
        trial = Trial(settings, jobs, fleet, cluster, clock, random.Random(0))
        witness = Witness(settings.data_dir)
        start(trial)
        started = time.monotonic()
        job_id = submit_batch(fleet.urls, profiles)
        reader = Reader(fleet.urls, job_id)
        await_block(jobs, job_id)
        disturbed = DISTURBANCES[name](trial, job_id, times)
        record = trial.ended(job_id)
        seconds = time.monotonic() - started
        reader.close()
        items = (record.result or {}).get("items", [])
        events = [event.sequence for event in jobs.events(job_id)]
        if name == "disk":
            disturbed |= give_up_and_resume(trial, profiles)
        fleet.end()
        witness.close()
        return Outcome(
            disturbance=name,
            database="sqlite" if cluster is None else "postgresql",
            disturbed=disturbed,
            profiles=profiles,
            done=sum("plan_id" in item for item in items) if record.state == "done" else 0,
            blocks=witness.finished_blocks,
            blocks_run_twice=witness.blocks_run_twice,
            layers_measured_twice=measured_twice(jobs, job_id),
            different_profiles=differing([read_profile(settings, item) for item in items], expected),
            different_plans=differing([item.get("plan_id") for item in items], plans),
            ended_by_themselves=fleet.ended_by_themselves,
            events_lost=len(set(range(1, max(events) + 1)) - set(events)),
            wrong_answers=reader.wrong_answers,
            left_over=left_over(settings),
            longest_silence_seconds=round(reader.longest_silence_seconds, 1),
            seconds=round(seconds),
        )


def start(trial: Trial) -> None:
    """Servers and workers, every other one under the clock that can be set."""
    for number in range(SERVERS + WORKERS):
        environment = trial.clock.environment if trial.clock is not None and number % 2 == 0 else {}
        (trial.fleet.start_server if number < SERVERS else trial.fleet.start)(environment)


def submit_batch(urls: list[str], profiles: int) -> str:
    entries = [
        {"model": "small", "settings": GRID | {"seed": seed}, "budgets": [BUDGET]} for seed in range(profiles)
    ]
    with Client(urls[0], retries=20) as client:
        return client.submit("batches", {"jobs": entries}).id


def await_block(jobs: Jobs, job_id: str) -> None:
    """Until the job is in the midst of its work: a block of it is swept."""
    while not any(event.kind == "block" for event in jobs.events(job_id)):
        time.sleep(0.05)


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def give_up_and_resume(trial: Trial, seed: int) -> dict[str, int | str]:
    """A disk that stays full for longer than a task is tried: the job then, and submitted again on a disk with room."""
    request = {"model": "small", "settings": GRID | {"seed": seed}}
    job = trial.jobs.submit("profile", request, None)
    await_block(trial.jobs, job.id)
    with full(trial.settings):
        time.sleep(GIVEN_UP_SECONDS)
        while_full = trial.jobs.read(job.id)
    first = trial.ended(job.id)
    again = trial.ended(trial.jobs.submit("profile", request, None).id)
    return {
        "while_full_for_long": while_full.state,
        "then": first.state,
        "submitted_again": again.state,
        "layers_measured_again": measured_in_both(trial.jobs, first, again),
    }


def measured_in_both(jobs: Jobs, *records: JobRecord) -> int:
    first, second = (
        {layer for event in jobs.events(r.id) if event.kind == "block" for layer in event.data["measured"]}
        for r in records
    )
    return len(first & second)


def differing(found: list[Any], expected: list[Any]) -> int:
    return sum(a != b for a, b in zip(found, expected, strict=False)) + abs(len(found) - len(expected))


def left_over(settings: Settings) -> list[str]:
    """Files that are neither results nor locks nor the database's."""
    hidden = [*settings.data_dir.rglob(".*")]
    return sorted(str(p.relative_to(settings.data_dir)) for p in hidden if p.suffix != ".lock")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("disturbances", nargs="*", default=list(DISTURBANCES), metavar="DISTURBANCE")
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--times", type=int, default=5, help="how often the other disturbances come")
    parser.add_argument("--profiles", type=int, default=12)
    parser.add_argument("--keep", action="store_true", help="keep the folder of each experiment")
    given = parser.parse_args()
    for name in given.disturbances:
        cluster = Cluster() if given.database == "postgresql" else None
        try:
            folder = Path(tempfile.mkdtemp(prefix=f"bitrank-{name}-"))
            times = given.kills if name == "kills" else given.times
            outcome = experiment(folder, name, cluster, times, given.profiles)
        finally:
            if cluster is not None:
                cluster.remove()
        print(json.dumps(asdict(outcome), indent=1), flush=True)
        print(f"log: {folder}/log", file=sys.stderr)


if __name__ == "__main__":
    main()
