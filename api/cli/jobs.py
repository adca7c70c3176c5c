"""The commands of jobs: `bitrank worker`, `bitrank batch` and `bitrank jobs`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from api.jobs.client import Jobs
    from api.schemas.jobs import JobRecord
    from api.settings import Settings

jobs = typer.Typer(help="Jobs of the service: list, show, cancel.", no_args_is_help=True)

DataDir = Annotated[
    Path | None, typer.Option(help="Folder of database and profiles; BITRANK_DATA_DIR if absent.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="A job's id, from `bitrank jobs list`.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(worker)
    app.command()(batch)
    app.add_typer(jobs, name="jobs")


def worker(
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N; one worker per GPU.")] = "cpu",
    data_dir: DataDir = None,
    dead_after: Annotated[
        float, typer.Option(min=2.0, help="Seconds without a heartbeat after which another worker is dead.")
    ] = 10.0,
    while_stdin_is_open: Annotated[
        bool, typer.Option("--while-stdin-is-open", help="End when standard input closes.", hidden=True)
    ] = False,
) -> None:
    """Compute jobs until interrupted, beside any number of other workers on the same database and data."""
    import os
    import signal
    import threading

    from api.jobs.worker import Worker
    from api.observability.logging_setup import configure_logging, log
    from api.observability.tracing import flush_traces, start_tracing

    settings = _settings(data_dir)
    configure_logging(settings.log_level)
    start_tracing("bitrank-worker")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    if while_stdin_is_open:
        threading.Thread(target=_until_stdin_closes, args=(stop,), daemon=True).start()
    working = Worker(settings, device, dead_after)
    log.info("working", worker=working.id, device=device)
    working.run(stop)
    flush_traces()
    os._exit(0)  # a computation under way would not end for minutes, and is another worker's by now


def _until_stdin_closes(stop: Any) -> None:
    import os

    while os.read(sys.stdin.fileno(), 1):
        pass
    stop.set()


def batch(
    file: Annotated[
        Path, typer.Argument(metavar="JOBS", help="YAML or JSON: `jobs`, each a `model` and its `budgets`.")
    ],
    workers: Annotated[
        int, typer.Option(min=0, help="Worker processes to start here; 0 leaves it to others.")
    ] = 1,
    detach: Annotated[
        bool, typer.Option("--detach", help="Only submit; follow with `bitrank jobs`.")
    ] = False,
    data_dir: DataDir = None,
    json_output: Json = False,
) -> None:
    """Plan every model under each of its budgets, as one durable job; one that fails never stops the others."""
    request = read_batch(file)
    with _launched(data_dir, 0 if detach else workers) as service:
        record = service.submit("batch", request, None)
        if not detach:
            record = _follow(service, record.id)
    _print_record(record, json_output)
    items = (record.result or {}).get("items", [])
    if record.state in ("failed", "cancelled") or any("error" in item for item in items):
        raise typer.Exit(1)


def read_batch(file: Path) -> dict[str, Any]:
    """The request in a batch file; a model that is a directory becomes one for every worker of this machine.

    Raises `BitrankError` naming what is wrong with the file.
    """
    import yaml  # type: ignore[import-untyped]

    from allocator.errors import BitrankError

    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BitrankError(f"cannot read {file} as YAML ({' '.join(str(error).split())})") from error
    entries = document.get("jobs") if isinstance(document, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise BitrankError(f"{file} has no list `jobs`; give each job a `model` and `budgets`")
    return {"jobs": [_placed(entry) for entry in entries]}


def _placed(entry: dict[str, Any]) -> dict[str, Any]:
    path = Path(str(entry.get("model", "")))
    if str(path) == "." or not path.is_dir():
        return entry
    return entry | {"model": path.resolve().name, "directory": str(path.resolve())}


@jobs.command("list")
def list_jobs(
    state: Annotated[str | None, typer.Option(help="queued, running, done, failed or cancelled.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1_000, help="Most jobs to show.")] = 20,
    data_dir: DataDir = None,
    json_output: Json = False,
) -> None:
    """The newest jobs."""
    with _launched(data_dir, 0) as service:
        page = service.list(None, limit, state)  # type: ignore[arg-type]
    if json_output:
        print(page.model_dump_json(indent=1))
        return
    for record in page.jobs:
        print(f"{record.id}  {record.kind:12} {_state(record)}")


@jobs.command("show")
def show_job(job: JobId, data_dir: DataDir = None, json_output: Json = False) -> None:
    """One job: its state, progress and result."""
    with _launched(data_dir, 0) as service:
        _print_record(service.read(job), json_output)


@jobs.command("cancel")
def cancel_job(job: JobId, data_dir: DataDir = None) -> None:
    """Stop a job within seconds. What it finished is kept for the next job that needs it."""
    with _launched(data_dir, 0) as service:
        print(f"job {job} is {service.cancel(job).state}")


@jobs.command("follow")
def follow_job(job: JobId, data_dir: DataDir = None, json_output: Json = False) -> None:
    """Show a job's progress until it ends."""
    with _launched(data_dir, 0) as service:
        record = _follow(service, job)
    _print_record(record, json_output)
    if record.state != "done":
        raise typer.Exit(1)


def _follow(service: Jobs, job_id: str) -> JobRecord:
    import time

    shown = ""
    while not (record := service.read(job_id)).is_finished:
        if (line := _state(record)) != shown:
            print(line, file=sys.stderr, flush=True)
            shown = line
        time.sleep(0.5)
    return record


def _state(record: JobRecord) -> str:
    if record.error is not None:
        return f"{record.state}: {record.error['detail']}"
    progress = record.progress
    if record.state != "running" or not progress.total:
        return record.state
    left = "" if progress.eta_seconds is None else f", {progress.eta_seconds:.0f} s left"
    return f"{record.state}: {progress.stage} {progress.done}/{progress.total}{left}"


def _print_record(record: JobRecord, json_output: bool) -> None:
    if json_output:
        print(record.model_dump_json(indent=1))
        return
    print(f"{record.id}  {record.kind}  {_state(record)}")
    for item in (record.result or {}).get("items", []):
        outcome = item["error"]["detail"] if "error" in item else f"plan {item['plan_id']}"
        print(f"{item['model']:24} {item['budget']:>12}  {outcome}")
    for name, value in (record.result or {}).items():
        if name != "items":
            print(f"{name}: {value}")


@contextmanager
def _launched(data_dir: Path | None, workers: int) -> Iterator[Jobs]:
    from allocator.errors import BitrankError
    from api.jobs.client import Jobs
    from api.problems import ProblemError
    from api.storage.database import open_database

    settings = _settings(data_dir)
    database = open_database(settings)
    service = Jobs(settings, database)
    service.launch(workers)
    try:
        yield service
    except ProblemError as error:
        raise BitrankError(error.detail) from error
    finally:
        service.close()
        database.close()


def _settings(data_dir: Path | None) -> Settings:
    from dataclasses import replace

    from api.settings import Settings

    found = Settings.from_environment()
    return found if data_dir is None else replace(found, data_dir=data_dir.resolve())


if __name__ == "__main__":
    alone = typer.Typer(pretty_exceptions_enable=False)
    register(alone)
    alone()
