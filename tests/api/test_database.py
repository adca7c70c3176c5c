"""Schema and migrations, on SQLite and, where its server is installed, on PostgreSQL."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from road import Road
from sqlalchemy import make_url, select
from sqlalchemy.exc import SQLAlchemyError

from allocator.plan import load_plan
from api.problems import ProblemError
from api.settings import Settings, SettingsError
from api.storage import plans as plan_store
from api.storage.database import (
    Base,
    Database,
    DatabaseError,
    JobRow,
    PlanRow,
    make_engine,
    migrate,
    open_database,
)
from api.storage.pagination import decode_cursor, encode_cursor
from api.storage.plans import PlanStore
from api.storage.profiles import ProfileStore

pytestmark = pytest.mark.alone


def postgres_programs() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return found[-1].parent if found else None


@pytest.fixture(scope="module")
def postgres_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A PostgreSQL server of this session's own, on a socket in a folder of its own."""
    programs = postgres_programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed")
    folder = tmp_path_factory.mktemp("pg")
    user = {"user": "postgres"} if os.getuid() == 0 else {}
    if user:
        for path in (folder, *list(folder.parents)[:3]):
            path.chmod(0o755)
        shutil.chown(folder, "postgres")

    def call(name: str, *arguments: str) -> None:
        subprocess.run([programs / name, *arguments], check=True, capture_output=True, cwd=folder, **user)  # type: ignore[call-overload]

    call("initdb", "-D", str(folder / "data"), "-A", "trust", "-U", "bitrank", "-N")
    options = f"-k {folder} -c listen_addresses='' -c fsync=off"
    call("pg_ctl", "-D", str(folder / "data"), "-w", "-o", options, "-l", str(folder / "log"), "start")
    yield f"postgresql://bitrank@/postgres?host={folder}"
    call("pg_ctl", "-D", str(folder / "data"), "-m", "immediate", "stop")


@pytest.fixture(params=["sqlite", "postgresql"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    url = "" if request.param == "sqlite" else request.getfixturevalue("postgres_url")
    return Settings(data_dir=tmp_path, database_url=url)


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    opened = open_database(settings)
    yield opened
    with opened.engine.begin() as connection:
        for table in Base.metadata.sorted_tables:
            connection.execute(table.delete())
    opened.close()


def test_migrations_make_the_schema_that_the_models_describe(database: Database) -> None:
    with database.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_migrating_again_changes_nothing(database: Database) -> None:
    with database.transaction() as session:
        session.add(JobRow(id="a", kind="plan", state="queued", request={"model": "demo"}))
    migrate(database.engine)
    with database.transaction() as session:
        assert session.scalars(select(JobRow.id)).all() == ["a"]


def test_processes_that_start_together_migrate_once(tmp_path: Path) -> None:
    engines = [make_engine(f"sqlite:///{tmp_path / 'bitrank.db'}") for _ in range(6)]
    errors: list[Exception] = []

    def start(index: int) -> None:
        try:
            migrate(engines[index])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=start, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_times_come_back_with_their_zone(database: Database) -> None:
    with database.transaction() as session:
        session.add(JobRow(id="b", kind="plan", state="queued", request={}))
    with database.transaction() as session:
        created_at = session.get_one(JobRow, "b").created_at
    assert created_at.tzinfo is not None
    assert abs(datetime.now(UTC) - created_at) < timedelta(minutes=1)


def test_a_failed_transaction_leaves_nothing(database: Database) -> None:
    with pytest.raises(RuntimeError), database.transaction() as session:
        session.add(JobRow(id="c", kind="plan", state="queued", request={}))
        session.flush()
        raise RuntimeError
    with database.transaction() as session:
        assert session.get(JobRow, "c") is None


def test_a_plan_is_stored_once_and_read_to_the_byte(
    settings: Settings, database: Database, road: Road
) -> None:
    store, plan = PlanStore(settings, database), load_plan(road.plan)
    plan_id, document = store.save(plan, None)
    assert store.save(plan, "other") == (plan_id, document)
    assert document == road.plan.read_bytes()
    fresh = PlanStore(settings, database)
    assert fresh.read(plan_id) == document
    with database.transaction() as session:
        assert len(session.scalars(select(PlanRow)).all()) == 1
    with pytest.raises(ProblemError):
        fresh.read("0" * 32)


def test_plans_saved_at_once_are_all_stored(settings: Settings, database: Database, road: Road) -> None:
    store, plan = PlanStore(settings, database), load_plan(road.plan)
    plans = [plan.model_copy(update={"total_bytes": number}) for number in range(64)]
    with ThreadPoolExecutor(16) as threads:
        saved = list(threads.map(lambda plan: store.save(plan, None), [*plans, *plans]))
    fresh = PlanStore(settings, database)
    assert saved == [(plan_id, fresh.read(plan_id)) for plan_id, _ in saved]
    assert len({plan_id for plan_id, _ in saved}) == 64


def test_a_plan_that_cannot_be_stored_is_not_said_to_be(
    settings: Settings, database: Database, road: Road
) -> None:
    store, plan = PlanStore(settings, database), load_plan(road.plan)
    plans = [plan.model_copy(update={"total_bytes": number}) for number in range(16)]
    Base.metadata.drop_all(database.engine, [PlanRow.__table__])
    with ThreadPoolExecutor(16) as threads:
        futures = [threads.submit(store.save, plan, None) for plan in plans]
    assert all(isinstance(future.exception(), SQLAlchemyError) for future in futures)
    Base.metadata.create_all(database.engine)
    plan_id, document = store.save(plan, None)
    assert PlanStore(settings, database).read(plan_id) == document


def test_plans_in_memory_are_bounded_in_number_and_bytes(
    settings: Settings, database: Database, road: Road, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = load_plan(road.plan)
    size = len(plan.document())
    store = PlanStore(replace(settings, cached_plans=4), database)
    saved = [store.save(plan.model_copy(update={"gap": number}), None)[0] for number in range(8)]
    assert [store.cached(plan_id) is not None for plan_id in saved] == [False] * 4 + [True] * 4
    monkeypatch.setattr(plan_store, "MOST_CACHED_BYTES", 2 * size)
    store.read(saved[0])
    assert sum(store.cached(plan_id) is not None for plan_id in saved) in (1, 2)


def test_sqlite_has_what_it_committed_on_the_disk(tmp_path: Path) -> None:
    database = open_database(Settings(data_dir=tmp_path))
    with database.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
    database.close()


def test_a_profile_is_registered_once_and_found_by_its_model(
    settings: Settings, database: Database, road: Road
) -> None:
    store = ProfileStore(settings, database)
    first, second = (store.register(road.profile, "team/model") for _ in range(2))
    assert first == second == store.find("team/model")
    assert store.find("other") is None
    rows, cursor = store.list(None, None, 10)
    assert ([row.id for row in rows], cursor) == ([first], None)
    assert store.load(first).sha256 == first
    assert [path.name for path in settings.profiles_dir.iterdir()] == [first]


def test_an_unknown_kind_of_database_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatabaseError, match="sqlite or postgresql"):
        open_database(Settings(data_dir=tmp_path, database_url="mysql://root:secret@host/x"))


def test_a_database_that_is_away_is_named_without_its_password(tmp_path: Path) -> None:
    url = f"postgresql://ann:secret@/x?host={tmp_path}"
    with pytest.raises(DatabaseError) as refused:
        open_database(Settings(data_dir=tmp_path, database_url=url))
    assert "secret" not in str(refused.value)
    assert "secret" not in repr(Settings(database_url=url))


def test_a_cursor_reads_back_and_refuses_anything_else() -> None:
    moment = datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC)
    assert decode_cursor(encode_cursor(moment, "id 1")) == (moment, "id 1")
    for text in ("", "x", "????", "é", encode_cursor(moment, "a")[:-4] + "!!!!", "MjAyNi0wMS0wMg"):
        with pytest.raises(ProblemError):
            decode_cursor(text)


def test_settings_come_from_the_environment() -> None:
    found = Settings.from_environment(
        {"BITRANK_DATA_DIR": "/d", "BITRANK_MODEL_ROOTS": f"/a{os.pathsep}/b", "BITRANK_BURST": "7"}
    )
    assert (found.data_dir, found.model_roots, found.burst) == (Path("/d"), (Path("/a"), Path("/b")), 7)
    for name, value in (("BURST", "many"), ("BURST", "0"), ("BODY_SECONDS", "nan"), ("HUB", "maybe")):
        with pytest.raises(SettingsError, match=name):
            Settings.from_environment({f"BITRANK_{name}": value})


def test_a_secret_may_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("p@ss word\n")
    environment = {
        "BITRANK_DATABASE_URL": "postgresql://ann@host/x",
        "BITRANK_DATABASE_PASSWORD_FILE": str(tmp_path / "password"),
    }
    found = Settings.from_environment(environment)
    assert make_url(found.url).password == "p@ss word"
    assert make_url(found.url).host == "host"
    assert "p@ss" not in repr(found)
    with pytest.raises(SettingsError, match="BITRANK_STORE_FILE"):
        Settings.from_environment({"BITRANK_STORE_FILE": str(tmp_path / "absent")})


@pytest.mark.parametrize(("host", "needed"), [("127.0.0.1", False), ("::1", False), ("localhost", False)])
def test_loopback_needs_no_key(host: str, needed: bool) -> None:
    assert Settings(host=host).needs_keys is needed
    assert Settings(host="0.0.0.0").needs_keys and Settings(host="example.org").needs_keys
