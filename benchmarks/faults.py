"""Kills workers at random moments of a batch and says whether anything was lost, done twice or came out different.

    python benchmarks/faults.py [--kills 30] [--profiles 12] [--workers 3] [--database sqlite|postgresql]
                                [--outages 0]

Every profile is of the same small random model under another seed. Each kill is a SIGKILL of a random worker process,
which is started again. A witness looks at every layer file a few hundred times a second: a file of a finished block
that is written again is a block run twice. The undisturbed run is `build_profile` in this process, compared byte by
byte. PostgreSQL is a cluster of this machine's own binaries in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from api.database import open_database
from api.job_schemas import JobRecord
from api.jobs import Jobs, settings_environment
from api.settings import Settings

GRID = {"tokens": 512, "bits": [2, 3, 4], "ranks": [0, 4], "group_sizes": [64]}
FILES = ("profile.json", "measurements.parquet", "calibration.safetensors")
DEAD_AFTER_SECONDS = 3.0
OUTAGE_SECONDS = 5.0
TIMEOUT_SECONDS = 1_800.0


class Cluster:
    """A PostgreSQL server of its own in a temporary folder, run by an unprivileged user."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="bitrank-postgresql-"))
        self.port = free_port()
        self._user = {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.geteuid() == 0 else {}
        if self._user:
            shutil.chown(self.folder, "nobody", "nogroup")
        binary("initdb")
        self._run("initdb", "-D", str(self.folder / "data"), "-U", "bitrank", "-A", "trust", "-E", "UTF8")
        self.start()

    @property
    def url(self) -> str:
        return f"postgresql://bitrank@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        options = f"-p {self.port} -h 127.0.0.1 -k {self.folder} -F"
        self._run(
            "pg_ctl",
            "-D",
            str(self.folder / "data"),
            "-o",
            options,
            "-l",
            str(self.folder / "log"),
            "-w",
            "start",
        )

    def stop(self) -> None:
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-m", "fast", "-w", "stop")

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [binary(program), *arguments],
            check=True,
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            **self._user,
        )


def binary(name: str) -> str:
    """The path of a PostgreSQL program, also where Debian keeps it off the search path."""
    places = [*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    found = shutil.which(name, path=os.pathsep.join([*map(str, places), os.environ.get("PATH", "")]))
    if found is None:
        raise FileNotFoundError(f"{name} is not installed; install postgresql")
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Fleet:
    """Worker processes of one installation that can be killed and started again."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> subprocess.Popen[bytes]:
        environment = os.environ | settings_environment(self._settings) | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "api.job_cli", "worker", "--dead-after", str(DEAD_AFTER_SECONDS)]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        self.processes.append(process)
        return process

    def kill(self, process: subprocess.Popen[bytes], how: signal.Signals = signal.SIGKILL) -> None:
        process.send_signal(how)
        process.wait()
        self.processes.remove(process)

    def end(self) -> None:
        for process in list(self.processes):
            self.kill(process)


class Witness:
    """Watches the layer files of every run; `rewritten` names those of a finished block that changed."""

    def __init__(self, data_dir: Path) -> None:
        self._runs = data_dir / "runs"
        self._first: dict[str, tuple[int, int]] = {}
        self._finished: set[str] = set()
        self.rewritten: list[str] = []
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    @property
    def finished_blocks(self) -> int:
        return len(self._finished)

    def _watch(self) -> None:
        while not self._closing.wait(0.01):
            for folder in self._runs.glob("*/profile/.work/layers"):
                self._look(folder)

    def _look(self, folder: Path) -> None:
        blocks: dict[str, dict[str, tuple[int, int]]] = {}
        for file in folder.glob("[!.]*.json"):
            try:
                status = file.stat()
            except FileNotFoundError:
                continue
            block = f"{folder.parent.parent.parent.name}/{'.'.join(file.name.split('.')[:3])}"
            blocks.setdefault(block, {})[file.name] = (status.st_ino, status.st_mtime_ns)
        for block, layers in blocks.items():
            for name, seen in layers.items():
                key = f"{block}/{name}"
                if block in self._finished and self._first[key] != seen:
                    self.rewritten.append(key)
                self._first[key] = seen
            if len(layers) == LAYERS_PER_BLOCK:
                self._finished.add(block)


LAYERS_PER_BLOCK = 7


def write_small_model(path: Path, blocks: int) -> None:
    """A Llama with random weights and no tokenizer; calibration text is sampled from it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=blocks,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)


def undisturbed(model: Path, seed: int, output: Path) -> dict[str, bytes]:
    """The files of the profile that one process makes, without jobs."""
    import torch

    from profiler.calibration import silent
    from profiler.checkpoint import find_model
    from profiler.run import ProfileSettings, build_profile

    grid = {name: value if name == "tokens" else tuple(value) for name, value in GRID.items()}  # type: ignore[arg-type]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        build_profile(find_model(str(model)), output, ProfileSettings(seed=seed, **grid), silent)  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(threads)
    return {name: (output / name).read_bytes() for name in FILES}


@contextmanager
def installation(folder: Path, url: str) -> Iterator[tuple[Settings, Jobs]]:
    """An empty installation whose catalogue is `<folder>/models`."""
    settings = Settings(
        data_dir=folder / "data", database_url=url, model_roots=(folder / "models",), hub=False
    )
    database = open_database(settings)
    jobs = Jobs(settings, database)
    jobs.launch()
    try:
        yield settings, jobs
    finally:
        jobs.close()
        database.close()


def finished(jobs: Jobs, job_id: str) -> JobRecord:
    """The job when it has ended."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not (record := jobs.read(job_id)).is_finished:
        if time.monotonic() > deadline:
            raise TimeoutError(f"job {job_id} did not end: {record.state}, {record.progress}")
        time.sleep(0.1)
    return record


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an experiment came to."""

    database: str
    kills: int
    outages: int
    profiles: int
    done: int
    blocks: int
    blocks_run_twice: int
    layers_measured_twice: int
    different_profiles: int
    seconds: float


def experiment(
    folder: Path, cluster: Cluster | None, kills: int, profiles: int, workers: int, outages: int
) -> Outcome:
    """A batch of `profiles` under random kills, and with a cluster outages, compared with undisturbed profiles."""
    chance = random.Random(0)
    model = folder / "models" / "small"
    write_small_model(model, 3)
    expected = [undisturbed(model, seed, folder / f"undisturbed-{seed}") for seed in range(profiles)]
    with installation(folder, cluster.url if cluster else "") as (settings, jobs):
        witness, fleet = Witness(settings.data_dir), Fleet(settings)
        for _ in range(workers):
            fleet.start()
        started = time.monotonic()
        entries = [
            {"model": "small", "settings": GRID | {"seed": seed}, "budgets": ["3.3bpw"]}
            for seed in range(profiles)
        ]
        job = jobs.submit("batch", {"jobs": entries}, None)
        made, failures = 0, 0
        while made < kills and not jobs.read(job.id).is_finished:
            time.sleep(chance.uniform(0.5, 8.0))
            if jobs.read(job.id).is_finished:
                break
            fleet.kill(chance.choice(fleet.processes))
            fleet.start()
            made += 1
            if cluster is not None and failures < outages:
                cluster.stop()
                time.sleep(OUTAGE_SECONDS)
                cluster.start()
                failures += 1
        record = finished(jobs, job.id)
        seconds = time.monotonic() - started
        fleet.end()
        witness.close()
        items = (record.result or {}).get("items", [])
        found = [read_profile(settings, item) for item in items]
        measured = measured_twice(jobs, job.id)
    return Outcome(
        database="sqlite" if cluster is None else "postgresql",
        kills=made,
        outages=failures,
        profiles=profiles,
        done=sum("plan_id" in item for item in items) if record.state == "done" else 0,
        blocks=witness.finished_blocks,
        blocks_run_twice=len({key.rsplit("/", 1)[0] for key in witness.rewritten}),
        layers_measured_twice=measured,
        different_profiles=sum(a != b for a, b in zip(expected, found, strict=True)),
        seconds=seconds,
    )


def read_profile(settings: Settings, item: dict[str, Any]) -> dict[str, bytes]:
    folder = settings.profiles_dir / str(item.get("profile_id"))
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).exists()}


def measured_twice(jobs: Jobs, job_id: str) -> int:
    """Layers that two `block` events of one entry name; entries are told apart by their run of events."""
    seen: dict[str, int] = {}
    for event in jobs.events(job_id):
        if event.kind == "block":
            for layer in event.data["measured"]:
                key = f"{event.data['run']}/{layer}"
                seen[key] = seen.get(key, 0) + 1
    return sum(count > 1 for count in seen.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--profiles", type=int, default=12)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--outages", type=int, default=0, help="times that PostgreSQL is stopped for a while")
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    given = parser.parse_args()
    cluster = Cluster() if given.database == "postgresql" else None
    try:
        with tempfile.TemporaryDirectory(prefix="bitrank-faults-") as folder:
            outcome = experiment(
                Path(folder), cluster, given.kills, given.profiles, given.workers, given.outages
            )
    finally:
        if cluster is not None:
            cluster.remove()
    print(json.dumps({name: getattr(outcome, name) for name in Outcome.__slots__}, indent=1))


if __name__ == "__main__":
    main()
