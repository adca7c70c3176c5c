"""The database: tables, sessions, migrations. SQLite (WAL) by default, PostgreSQL by its URL.

What lives here: what is stored of models, profiles, plans, jobs, evaluations, API keys and answered requests.
Large arrays stay in files of the data directory; a row says where. Reading and writing for a purpose is done by
the files named for it (`plans.py`, `client.py`, `api_keys.py`, …).
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    Engine,
    Float,
    Index,
    Integer,
    LargeBinary,
    String,
    create_engine,
    event,
    make_url,
    text,
)
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker
from sqlalchemy.types import TypeDecorator

from allocator.errors import BitrankError
from api.settings import Settings

MIGRATIONS = Path(__file__).parents[1] / "migrations"
BUSY_SECONDS = 30
MIGRATION_LOCK = 0x62697472
"""Of PostgreSQL's advisory locks: the one held while the schema changes."""


class DatabaseError(BitrankError):
    """The database cannot be opened or brought up to date; the message says which and what to do."""


class UtcDateTime(TypeDecorator[datetime]):
    """A moment, with its time zone, on databases that keep none."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None or value.tzinfo is not None:
            return value
        return value.replace(tzinfo=UTC)


def now() -> datetime:
    return datetime.now(UTC)


class Base(DeclarativeBase):
    """The tables. `Base.metadata` is what migrations are compared with."""


class ModelRow(Base):
    """A model that was profiled, under the name requests use."""

    __tablename__ = "models"

    id: Mapped[str] = mapped_column(String(512), primary_key=True)
    revision: Mapped[str | None] = mapped_column(String(128))
    weights_sha256: Mapped[str] = mapped_column(String(64))
    architecture: Mapped[str] = mapped_column(String(128))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)


class ProfileRow(Base):
    """A finished profile; its files lie in `<data_dir>/profiles/<id>/`."""

    __tablename__ = "profiles"
    __table_args__ = (Index("profiles_of_model", "model", "created_at"),)

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    model: Mapped[str] = mapped_column(String(512))
    weights_sha256: Mapped[str] = mapped_column(String(64))
    layer_count: Mapped[int] = mapped_column(Integer)
    original_bytes: Mapped[int] = mapped_column(BigInteger)
    smallest_bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)


class PlanRow(Base):
    """A plan; `document` is plan.json, byte for byte."""

    __tablename__ = "plans"
    __table_args__ = (Index("plans_of_profile", "profile_id"),)

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    profile_id: Mapped[str] = mapped_column(String(64))
    predicted_kl: Mapped[float] = mapped_column(Float)
    document: Mapped[bytes] = mapped_column(LargeBinary)
    owner: Mapped[str | None] = mapped_column(String(64))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)


class JobRow(Base):
    """A piece of work for a worker; `state` is queued, running, done, failed or cancelled."""

    __tablename__ = "jobs"
    __table_args__ = (
        Index("jobs_by_time", "created_at", "id"),
        Index("jobs_of_owner", "owner", "state"),
        Index("jobs_by_state", "state"),
    )

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    kind: Mapped[str] = mapped_column(String(16))
    state: Mapped[str] = mapped_column(String(16))
    request: Mapped[dict[str, Any]] = mapped_column(JSON)
    result: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    progress: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    owner: Mapped[str | None] = mapped_column(String(64))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now, onupdate=now)


class JobEventRow(Base):
    """One event of a job; `sequence` counts from 1 within the job."""

    __tablename__ = "job_events"

    job_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    sequence: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    kind: Mapped[str] = mapped_column(String(32))
    data: Mapped[dict[str, Any]] = mapped_column(JSON)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)


class EvaluationRow(Base):
    """A measurement, beside the prediction where the model was made from a plan. KL in nats/token."""

    __tablename__ = "evaluations"
    __table_args__ = (Index("evaluations_of_plan", "plan_id"),)

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    plan_id: Mapped[str | None] = mapped_column(String(32))
    model: Mapped[str] = mapped_column(String(512))
    reference: Mapped[str] = mapped_column(String(512))
    predicted_kl: Mapped[float | None] = mapped_column(Float)
    measured_kl: Mapped[float] = mapped_column(Float)
    result: Mapped[dict[str, Any]] = mapped_column(JSON)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)


class ApiKeyRow(Base):
    """An API key, of which only the digest is stored."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(128))
    sha256: Mapped[str] = mapped_column(String(64), unique=True)
    scopes: Mapped[list[str]] = mapped_column(JSON)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)
    revoked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class IdempotencyRow(Base):
    """A POST that carried an Idempotency-Key, and its answer once there is one (`status` 0 until then).

    `job_id` is the id of the job that it makes, if it makes one, whoever carries it out.
    """

    __tablename__ = "idempotency"
    __table_args__ = (Index("idempotency_by_time", "created_at"),)

    owner: Mapped[str] = mapped_column(String(64), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    request_sha256: Mapped[str] = mapped_column(String(64))
    job_id: Mapped[str] = mapped_column(String(64), server_default="")
    status: Mapped[int] = mapped_column(Integer, default=0)
    headers: Mapped[dict[str, str]] = mapped_column(JSON, default=dict)
    body: Mapped[bytes] = mapped_column(LargeBinary, default=b"")
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)


class Database:
    """An engine and its sessions."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._sessions = sessionmaker(engine, expire_on_commit=False)

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """A session that commits at the end, or rolls back when the block raises."""
        with self._sessions.begin() as session:
            yield session

    @property
    def is_sqlite(self) -> bool:
        return self.engine.dialect.name == "sqlite"

    def ping(self) -> None:
        """Raise unless the database answers."""
        with self.engine.connect() as connection:
            connection.execute(text("SELECT 1"))

    def close(self) -> None:
        self.engine.dispose()


def open_database(settings: Settings) -> Database:
    """Connect and bring the schema up to date. Raises `DatabaseError`."""
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    engine = make_engine(settings.url)
    try:
        migrate(engine)
    except SQLAlchemyError as error:
        raise unusable(settings.url, error) from error
    return Database(engine)


def unusable(url: str, error: SQLAlchemyError) -> DatabaseError:
    """What to tell someone whose database failed so."""
    place = make_url(url).render_as_string(hide_password=True)
    reason = str(getattr(error, "orig", error)).strip().splitlines()[0]
    return DatabaseError(
        f"cannot use the database {place} ({reason}); check BITRANK_DATABASE_URL and that it runs"
    )


def make_engine(url: str) -> Engine:
    """An engine for SQLite or PostgreSQL (through psycopg). Raises `DatabaseError` for any other."""
    if url.startswith(("postgresql://", "postgres://")):
        url = "postgresql+psycopg://" + url.split("://", 1)[1]
    if url.startswith("postgresql+psycopg://"):
        return create_engine(url, pool_pre_ping=True, pool_size=8, max_overflow=16, pool_recycle=600)
    if not url.startswith("sqlite:///"):
        scheme = url.split(":", 1)[0]
        raise DatabaseError(f"databases of the kind {scheme!r} are not supported; use sqlite or postgresql")
    engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False})
    event.listen(engine, "connect", _prepare_sqlite)
    return engine


def _prepare_sqlite(connection: Any, record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def migrate(engine: Engine) -> None:
    """Bring the schema to the newest revision; of several processes one does it and the others wait."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    with _alone(engine), engine.connect() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        connection.commit()


@contextmanager
def _alone(engine: Engine) -> Iterator[None]:
    if engine.dialect.name == "sqlite":
        with Path(f"{engine.url.database}.lock").open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        return
    with engine.connect() as connection:
        connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": MIGRATION_LOCK})
        try:
            yield
        finally:
            connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": MIGRATION_LOCK})
