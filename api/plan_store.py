"""Plans the service made, by id: plan.json byte for byte. Planning is in `usecases.py`."""

from __future__ import annotations

from collections import OrderedDict
from hashlib import sha256
from threading import Lock

from sqlalchemy import select
from sqlalchemy.dialects import postgresql, sqlite

from allocator.plan import Plan
from api.database import Database, PlanRow, now
from api.problems import ProblemError
from api.settings import Settings

ID_LENGTH = 32


class PlanStore:
    """Plans are content-addressed: the id is the first 32 hexadecimal digits of the document's sha256."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._database = database
        self._capacity = settings.cached_plans
        self._cached: OrderedDict[str, bytes] = OrderedDict()
        self._lock = Lock()

    def save(self, plan: Plan, owner: str | None) -> tuple[str, bytes]:
        """Store a plan; returns its id and document. The same plan has the same id, and is stored once."""
        plan_id, document = addressed(plan)
        build = sqlite.insert if self._database.is_sqlite else postgresql.insert
        statement = build(PlanRow).values(
            id=plan_id,
            profile_id=plan.profile_sha256,
            predicted_kl=plan.predicted_kl,
            document=document,
            owner=owner,
            created_at=now(),
        )
        with self._database.engine.begin() as connection:
            connection.execute(statement.on_conflict_do_nothing(index_elements=["id"]))
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

    def _remember(self, plan_id: str, document: bytes) -> None:
        with self._lock:
            self._cached[plan_id] = document
            self._cached.move_to_end(plan_id)
            while len(self._cached) > self._capacity:
                self._cached.popitem(last=False)


def addressed(plan: Plan) -> tuple[str, bytes]:
    """The id of a plan, and plan.json."""
    document = (plan.model_dump_json(indent=1) + "\n").encode()
    return sha256(document).hexdigest()[:ID_LENGTH], document
