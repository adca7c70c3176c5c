"""Plans the service made, by id: plan.json byte for byte. Planning is in `usecases.py`."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from hashlib import sha256
from threading import Lock
from typing import Any

from sqlalchemy import select
from sqlalchemy.dialects import postgresql, sqlite

from allocator.plan import Plan
from api.problems import ProblemError
from api.settings import Settings
from api.storage.database import Database, PlanRow, now

ID_LENGTH = 32
MOST_CACHED_BYTES = 64 * 2**20
TABLE = PlanRow.__table__
INSERT = {
    dialect.__name__.rpartition(".")[2]: dialect.insert(TABLE).on_conflict_do_nothing(index_elements=["id"])
    for dialect in (sqlite, postgresql)
}


@dataclass(slots=True)
class Commit:
    """Rows that go to the database in one transaction, and the error that met them."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    error: Exception | None = None


class PlanStore:
    """Plans are content-addressed: the id is the first 32 hexadecimal digits of the document's sha256."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._database = database
        self._insert = INSERT[database.engine.dialect.name]
        self._capacity = settings.cached_plans
        self._cached: OrderedDict[str, bytes] = OrderedDict()
        self._cached_bytes = 0
        self._lock = Lock()
        self._next = Commit()
        self._committing = Lock()

    def save(self, plan: Plan, owner: str | None) -> tuple[str, bytes]:
        """Store a plan; returns its id and document. The same plan has the same id, and is stored once.

        Plans that arrive while others are written wait and share the next transaction.
        """
        document = plan.document()
        plan_id = sha256(document).hexdigest()[:ID_LENGTH]
        self._write(
            {
                "id": plan_id,
                "profile_id": plan.profile_sha256,
                "predicted_kl": plan.predicted_kl,
                "document": document,
                "owner": owner,
                "created_at": now(),
            }
        )
        self._remember(plan_id, document)
        return plan_id, document

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

    def _write(self, row: dict[str, Any]) -> None:
        with self._lock:
            commit = self._next
            commit.rows.append(row)
        with self._committing:
            if commit is self._next:
                self._commit(commit)
        if commit.error is not None:
            raise commit.error

    def _commit(self, commit: Commit) -> None:
        with self._lock:
            self._next = Commit()
        try:
            with self._database.engine.begin() as connection:
                connection.execute(self._insert, commit.rows)
        except Exception as error:
            commit.error = error

    def _remember(self, plan_id: str, document: bytes) -> None:
        with self._lock:
            self._cached_bytes += len(document) - len(self._cached.pop(plan_id, b""))
            self._cached[plan_id] = document
            while len(self._cached) > self._capacity or self._cached_bytes > MOST_CACHED_BYTES:
                self._cached_bytes -= len(self._cached.popitem(last=False)[1])
