"""Outputs at an fsspec URL: what one machine finished, another finds, whole and unchanged."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest
from road import Road
from service_process import ServiceProcess

from allocator.plan import load_plan
from api.jobs.client import Jobs
from api.services.usecases import execute
from api.settings import Settings, SettingsError
from api.storage.artifacts import Store, open_store
from api.storage.database import open_database
from api.storage.profiles import ProfileStore
from benchmarks.cluster import Cluster, binary
from benchmarks.fleet import Fleet
from benchmarks.installation import GRID, finished, read_profile, undisturbed, write_small_model
from profiler.documents.profile import TOKEN_WEIGHTS
from profiler.statistics.calibration import silent

pytestmark = pytest.mark.alone

NAME = "profiles/abc"
SMALL = {"model": "small", "settings": GRID}


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"{request.param}://{tmp_path}/store-{uuid4().hex}"


@pytest.fixture
def store(url: str) -> Store:
    return open_store(Settings(store=url))


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A finished output of two files."""
    folder = tmp_path / "made"
    (folder / "below").mkdir(parents=True)
    (folder / "profile.json").write_text("one")
    (folder / "below" / "layer.json").write_text("two")
    return folder


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files(folder)}


def test_what_is_published_is_restored_to_the_byte(store: Store, made: Path, tmp_path: Path) -> None:
    assert not store.has(NAME)
    assert not store.restore(NAME, tmp_path / "back")
    store.publish(NAME, made, files(made))
    assert store.has(NAME)
    assert store.restore(NAME, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(made)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_fetching_brings_only_what_is_not_here(store: Store, made: Path, tmp_path: Path) -> None:
    store.publish(NAME, made, files(made))
    here = tmp_path / "here"
    here.mkdir()
    (here / "profile.json").write_text("one")
    before = (here / "profile.json").stat().st_mtime_ns
    assert store.fetch(NAME, here)
    assert contents(here) == contents(made)
    assert (here / "profile.json").stat().st_mtime_ns == before


def test_a_local_file_that_differs_gives_way_to_the_published_one(
    store: Store, made: Path, tmp_path: Path
) -> None:
    store.publish(NAME, made, files(made))
    here = tmp_path / "here"
    here.mkdir()
    (here / "profile.json").write_text("of other hardware")
    assert store.fetch(NAME, here)
    assert contents(here) == contents(made)


def test_the_first_publication_stays(store: Store, made: Path, tmp_path: Path) -> None:
    store.publish(NAME, made, files(made))
    before = contents(made)
    (made / "profile.json").write_text("later")
    store.publish(NAME, made, files(made))
    store.restore(NAME, tmp_path / "back")
    assert contents(tmp_path / "back") == before


def test_an_output_whose_publication_was_cut_off_is_not_there(
    store: Store, made: Path, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError):
        store.publish(NAME, made, [*files(made), made / "never-written"])
    assert not store.has(NAME)
    assert not store.fetch(NAME, tmp_path / "here")
    store.publish(NAME, made, files(made))
    assert store.restore(NAME, tmp_path / "here")


def test_what_was_altered_in_the_store_is_refused_and_nothing_is_left(made: Path, tmp_path: Path) -> None:
    store = open_store(Settings(store=f"file://{tmp_path}/store"))
    store.publish(NAME, made, files(made))
    (tmp_path / "store" / NAME / "profile.json").write_text("altered")
    with pytest.raises(OSError, match="not what was published"):
        store.restore(NAME, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_what_is_removed_is_gone(store: Store, made: Path) -> None:
    store.publish(NAME, made, files(made))
    store.remove(NAME)
    store.remove(NAME)
    assert not store.has(NAME)
    store.publish(NAME, made, files(made))
    assert store.has(NAME)


@pytest.mark.parametrize("url", ["carrier-pigeon://user:secret@roof", "oss://bucket/x"])
def test_a_store_that_cannot_be_reached_is_one_clear_sentence(url: str) -> None:
    with pytest.raises(SettingsError, match="BITRANK_STORE") as refused:
        open_store(Settings(store=url))
    assert "secret" not in str(refused.value)


@pytest.fixture
def database_url(tmp_path: Path) -> Iterator[str]:
    """PostgreSQL where it is installed, as machines apart would use; else a SQLite file beside the data directories."""
    try:
        binary("initdb")
    except FileNotFoundError:
        yield f"sqlite:///{tmp_path}/shared.db"
        return
    cluster = Cluster()
    yield cluster.url
    cluster.remove()


def test_machines_without_a_shared_disk_share_one_model(database_url: str, tmp_path: Path) -> None:
    """A profile is begun on one machine, whose disk is lost, finished on a second, and served by a third."""
    write_small_model(tmp_path / "models" / "small", 3)
    first, second, third = (
        Settings(
            data_dir=tmp_path / machine,
            database_url=database_url,
            store=f"file://{tmp_path}/store",
            model_roots=(tmp_path / "models",),
            hub=False,
        )
        for machine in ("first", "second", "third")
    )
    database = open_database(third)
    jobs = Jobs(third, database)
    jobs.launch()
    fleet = Fleet(first)
    worker = fleet.start()
    job = jobs.submit("profile", SMALL, None)
    while not any(event.kind == "block" for event in jobs.events(job.id)):
        assert not jobs.read(job.id).is_finished
    fleet.kill(worker, signal.SIGKILL)
    first.data_dir.rename(tmp_path / "lost")

    rest = Fleet(second)
    rest.start()
    try:
        record = finished(jobs, job.id)
        assert record.state == "done" and record.result is not None, record.error
        swept = [event.data for event in jobs.events(job.id) if event.kind == "block"]
        assert sorted(data["block"] for data in swept) == [0, 1, 2]
        assert len({data["executor"] for data in swept}) == 2

        expected = undisturbed(tmp_path / "models" / "small", 0, tmp_path / "undisturbed")
        assert read_profile(second, record.result) == expected
        made = second.profiles_dir / record.result["profile_id"] / TOKEN_WEIGHTS
        assert made.read_bytes() == (tmp_path / "undisturbed" / TOKEN_WEIGHTS).read_bytes()
        left = {path.name for path in (tmp_path / "store" / "runs").glob("*/*")}
        assert left == {"profile", "profile.json"}
        assert read_profile_over_http(third, record.result["profile_id"]) == 3 * 7

        plan = finished(jobs, jobs.submit("plan", SMALL | {"budget": "3.3bpw"}, None).id)
        assert plan.result is not None
        plan_id = plan.result["plan_id"]
        compressed = finished(jobs, jobs.submit("compression", {"plan": plan_id}, None).id)
        assert compressed.state == "done", compressed.error
        second.data_dir.rename(tmp_path / "lost too")
        rest.end()
        rest = Fleet(replace(second, data_dir=tmp_path / "fourth"))
        rest.start()
        measured = finished(jobs, jobs.submit("evaluation", {"plan": plan_id, "tokens": 256}, None).id)
        assert measured.state == "done" and measured.result is not None, measured.error
        assert measured.result["kl_nats"] > 0
    finally:
        rest.end()
        jobs.close()
        database.close()


def test_a_profile_from_the_store_is_compressed_to_the_same_bytes(road: Road, tmp_path: Path) -> None:
    """Every file of a profile is carried along, the weights of its tokens too."""
    here, there = (
        Settings(
            data_dir=tmp_path / machine,
            database_url=f"sqlite:///{tmp_path}/shared.db",
            store=f"file://{tmp_path}/store",
        )
        for machine in ("here", "there")
    )
    database = open_database(here)
    profile_id = ProfileStore(here, database).register(road.profile, "model")
    here.data_dir.rename(tmp_path / "lost")
    brought = ProfileStore(there, database).load(profile_id)
    database.close()
    kept = {name: data for name, data in contents(road.profile).items() if not name.startswith(".")}
    assert TOKEN_WEIGHTS in kept
    assert contents(brought.path) == kept
    execute(load_plan(road.plan), brought, tmp_path / "checkpoint", silent)
    assert contents(tmp_path / "checkpoint") == contents(road.checkpoint)


def read_profile_over_http(settings: Settings, profile_id: str) -> int:
    """The number of layers that a server with an empty data directory tells of."""
    service = ServiceProcess(
        settings.data_dir,
        BITRANK_DATABASE_URL=settings.database_url,
        BITRANK_STORE=settings.store,
    )
    try:
        return len(service.client.get(f"/v1/profiles/{profile_id}").json()["layers"])
    finally:
        service.stop()
