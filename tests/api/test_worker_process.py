"""Workers among each other, and what is said where the database cannot be used."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from dbos._utils import retriable_sqlite_exception
from sqlalchemy.exc import OperationalError

from api.jobs.dbos_engine import prepare_engine, wait_out_full_disks
from api.jobs.worker import Heartbeats
from api.settings import Settings
from api.storage.database import DatabaseError, make_engine
from benchmarks.faults import locked

pytestmark = pytest.mark.alone

DEAD_SECONDS = 1.0


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    found = Settings(data_dir=tmp_path)
    prepare_engine(found)
    return found


@pytest.fixture
def two(settings: Settings) -> Iterator[tuple[Heartbeats, Heartbeats]]:
    """Two workers that have seen each other."""
    pair = Heartbeats(settings, DEAD_SECONDS), Heartbeats(settings, DEAD_SECONDS)
    for heartbeats in pair:
        heartbeats.bury()
    yield pair
    for heartbeats in pair:
        heartbeats.leave()


def looks(heartbeats: Heartbeats, seconds: float) -> set[str]:
    """Who is alive in the eyes of one that beats and looks for a while."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        heartbeats.bury()
        time.sleep(0.1)
    return heartbeats.alive()


def test_a_worker_whose_counter_stands_still_is_buried(two: tuple[Heartbeats, Heartbeats]) -> None:
    watching, silent = two
    assert looks(watching, 2 * DEAD_SECONDS) == {watching.id}
    assert not silent.beat()


def test_no_one_is_buried_for_a_database_that_could_be_read_but_not_written(
    settings: Settings, two: tuple[Heartbeats, Heartbeats]
) -> None:
    watching, waiting = two
    with locked(settings):
        looking = [threading.Thread(target=looks, args=(one, 3 * DEAD_SECONDS)) for one in two]
        for thread in looking:
            thread.start()
        time.sleep(4 * DEAD_SECONDS)
    for thread in looking:
        thread.join()
    assert watching.alive() == {watching.id, waiting.id}
    assert waiting.beat() and watching.beat()


def test_a_worker_that_cannot_use_the_database_says_so_in_one_sentence(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, database_url="postgresql://bitrank:secret@127.0.0.1:1/none")
    with pytest.raises(DatabaseError, match="check BITRANK_DATABASE_URL") as refused:
        prepare_engine(settings)
    assert "secret" not in str(refused.value)


def test_a_full_disk_is_something_the_engine_waits_for(tmp_path: Path) -> None:
    wait_out_full_disks()
    engine = make_engine(f"sqlite:///{tmp_path / 'small.db'}")
    with engine.begin() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count=4")
        connection.exec_driver_sql("CREATE TABLE large (data BLOB)")
        with pytest.raises(OperationalError, match="disk is full") as full:
            connection.exec_driver_sql("INSERT INTO large VALUES (zeroblob(1000000))")
    assert retriable_sqlite_exception(full.value)
