"""Plans the service made, by id: plan.json byte for byte. Planning is in `usecases.py`."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from threading import Lock
from typing import Any

from sqlalchemy import select
from sqlalchemy.dialects import postgresql, sqlite
from starlette.concurrency import run_in_threadpool

from allocator.plan import Plan
from api.database import Database, PlanRow, now
from api.problems import ProblemError
from api.settings import Settings

ID_LENGTH = 32
MOST_CACHED_BYTES = 64 * 2**20
TABLE = PlanRow.__table__
INSERT = {
    dialect.__name__.rpartition(".")[2]: dialect.insert(TABLE).on_conflict_do_nothing(index_elements=["id"])
    for dialect in (sqlite, postgresql)
}


@dataclass(frozen=True, slots=True)
class Draft:
    """A plan as it will be stored: content-addressed, the id is the first 32 hexadecimal digits of the sha256."""

    id: str
    document: bytes
    profile_id: str
    predicted_kl: float

    @classmethod
    def of(cls, plan: Plan) -> Draft:
        document = plan.document()
        return cls(
            sha256(document).hexdigest()[:ID_LENGTH], document, plan.profile_sha256, plan.predicted_kl
        )

    def row(self, owner: str | None) -> dict[str, Any]:
        return {
            "id": self.id,
            "profile_id": self.profile_id,
            "predicted_kl": self.predicted_kl,
            "document": self.document,
            "owner": owner,
            "created_at": now(),
        }


@dataclass(slots=True)
class Commit:
    """Rows that go to the database in one transaction, and the error that met them."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    error: Exception | None = None


class PlanStore:
    """The plans of one database. A plan is stored once, whoever asks for it again."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._database = database
        self._insert = INSERT[database.engine.dialect.name]
        self._capacity = settings.cached_plans
        self._cached: OrderedDict[str, bytes] = OrderedDict()
        self._cached_bytes = 0
        self._lock = Lock()
        self._next = Commit()
        self._committing = asyncio.Lock()

    def save(self, plan: Plan, owner: str | None) -> tuple[str, bytes]:
        """Store a plan; returns its id and document once they are in the database."""
        draft = Draft.of(plan)
        self._write([draft.row(owner)])
        self._remember(draft.id, draft.document)
        return draft.id, draft.document

    async def keep(self, draft: Draft, owner: str | None) -> None:
        """`save` for the event loop: drafts that arrive during a commit share the next one."""
        commit = self._next
        commit.rows.append(draft.row(owner))
        async with self._committing:
            if commit is self._next:
                self._next = Commit()
                await run_in_threadpool(self._try_to_write, commit)
        if commit.error is not None:
            raise commit.error
        self._remember(draft.id, draft.document)

    def cached(self, plan_id: str) -> bytes | None:
        """The document, if it is in memory: for answers that must not wait for the database."""
        return self._cached.get(plan_id)

    def read(self, plan_id: str) -> bytes:
        """plan.json. Raises `ProblemError` (unknown-plan)."""
        found = self._cached.get(plan_id)
        if found is None:
            with self._database.engine.connect() as connection:
                found = connection.execute(select(PlanRow.document).where(PlanRow.id == plan_id)).scalar()
            if found is None:
                raise ProblemError("unknown-plan", f"no plan {plan_id[:64]!r}; POST /v1/plans makes one")
            self._remember(plan_id, found)
        return found

    def plan(self, plan_id: str) -> Plan:
        """The parsed plan. Raises `ProblemError` (unknown-plan)."""
        return Plan.model_validate_json(self.read(plan_id))

    def _try_to_write(self, commit: Commit) -> None:
        try:
            self._write(commit.rows)
        except Exception as error:
            commit.error = error

    def _write(self, rows: Sequence[dict[str, Any]]) -> None:
        with self._database.engine.begin() as connection:
            connection.execute(self._insert, rows)

    def _remember(self, plan_id: str, document: bytes) -> None:
        with self._lock:
            self._cached_bytes += len(document) - len(self._cached.pop(plan_id, b""))
            self._cached[plan_id] = document
            while len(self._cached) > self._capacity or self._cached_bytes > MOST_CACHED_BYTES:
                self._cached_bytes -= len(self._cached.popitem(last=False)[1])
