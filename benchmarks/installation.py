"""An installation to be disturbed: a small model, empty data, and what one undisturbed process makes of the model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from api.jobs.client import Jobs
from api.jobs.repository import Ledger
from api.schemas.jobs import JobRecord
from api.settings import Settings
from api.storage.database import JobEventRow, now, open_database

GRID = {"tokens": 512, "bits": [2, 3, 4], "ranks": [0, 4], "group_sizes": [64]}
BUDGET = "3.3bpw"
FILES = ("profile.json", "measurements.parquet", "calibration.safetensors", "token_weights.safetensors")
TIMEOUT_SECONDS = 1_800.0


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

    from profiler.model.checkpoint import find_model
    from profiler.statistics.calibration import silent
    from profiler.sweep.run import ProfileSettings, build_profile

    grid = {name: value if name == "tokens" else tuple(value) for name, value in GRID.items()}  # type: ignore[arg-type]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        build_profile(find_model(str(model)), output, ProfileSettings(seed=seed, **grid), silent)  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(threads)
    return {name: (output / name).read_bytes() for name in FILES}


def undisturbed_plan(profile: Path) -> str:
    """The id of the plan of `BUDGET`, which is the digest of its document."""
    from api.services.usecases import plan_budget
    from api.storage.plans import ID_LENGTH
    from profiler.documents.profile import load_profile

    document = plan_budget(load_profile(profile), BUDGET, "optimal").document()
    return sha256(document).hexdigest()[:ID_LENGTH]


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


def eventful_job(data_dir: Path) -> str:
    """A job that goes on, with more events than the buffers of a connection hold."""
    database = open_database(Settings(data_dir=data_dir))
    ledger = Ledger(database)
    job = ledger.insert("profile", {}, None, quota=1_000)
    ledger.start(job.id)
    data = {"stage": "x" * 1_000}
    with database.transaction() as session:
        session.add_all(
            JobEventRow(job_id=job.id, sequence=3 + n, kind="progress", data=data, created_at=now())
            for n in range(10_000)
        )
    database.close()
    return job.id


def finished(jobs: Jobs, job_id: str) -> JobRecord:
    """The job when it has ended."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not (record := jobs.read(job_id)).is_finished:
        if time.monotonic() > deadline:
            raise TimeoutError(f"job {job_id} did not end: {record.state}, {record.progress}")
        time.sleep(0.1)
    return record


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
