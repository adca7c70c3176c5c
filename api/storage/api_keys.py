"""API keys: made, listed, revoked and recognised. Only the sha256 of a key is stored; a key has 256 random bits."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from hashlib import sha256
from threading import Lock
from time import monotonic

from sqlalchemy import func, select

from allocator.errors import BitrankError
from api.storage.database import ApiKeyRow, Database, now

SCOPES = ("read", "plan", "compress")
REMEMBERED_SECONDS = 2.0
"""How long a recognised key is taken for valid without a look at the database: the most a revocation lags."""
MOST_REMEMBERED = 1_024


class UnusableKeyError(BitrankError):
    """A key cannot be made or revoked; the message says why."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks: a key's id (None on loopback without a key) and what it may do."""

    id: str | None
    scopes: frozenset[str]


ANYONE = Principal(None, frozenset(SCOPES))


class KeyStore:
    """The API keys of one database."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._recognised: dict[str, tuple[float, Principal | None]] = {}
        self._lock = Lock()

    def create(self, name: str, scopes: tuple[str, ...]) -> tuple[str, str]:
        """Make a key; returns its id and the key itself, which is shown once and never stored."""
        unknown = sorted(set(scopes) - set(SCOPES))
        if unknown or not scopes:
            raise UnusableKeyError(f"scopes {unknown or 'are missing'}; choose from {', '.join(SCOPES)}")
        id, key = secrets.token_hex(6), "br_" + secrets.token_urlsafe(32)
        row = ApiKeyRow(id=id, name=name[:128], sha256=_digest(key), scopes=sorted(set(scopes)))
        with self._database.transaction() as session:
            session.add(row)
        return id, key

    def list(self) -> list[ApiKeyRow]:
        with self._database.transaction() as session:
            return list(session.scalars(select(ApiKeyRow).order_by(ApiKeyRow.created_at)))

    def any_valid(self) -> bool:
        query = select(func.count()).select_from(ApiKeyRow).where(ApiKeyRow.revoked_at.is_(None))
        with self._database.transaction() as session:
            return bool(session.scalar(query))

    def revoke(self, id: str) -> None:
        """Raises `BitrankError` when there is no such key."""
        with self._database.transaction() as session:
            row = session.get(ApiKeyRow, id)
            if row is None:
                raise UnusableKeyError(f"no API key {id!r}; `bitrank keys list` shows them")
            row.revoked_at = row.revoked_at or now()

    def remembered(self, key: str) -> tuple[bool, Principal | None]:
        """Whether the answer of `recognise` is still fresh, and that answer."""
        expiry, principal = self._recognised.get(_digest(key), (0.0, None))
        return monotonic() < expiry, principal

    def recognise(self, key: str) -> Principal | None:
        """The principal of a valid key, None for any other text."""
        digest = _digest(key)
        query = select(ApiKeyRow).where(ApiKeyRow.sha256 == digest, ApiKeyRow.revoked_at.is_(None))
        with self._database.transaction() as session:
            row = session.scalar(query)
        principal = None if row is None else Principal(row.id, frozenset(row.scopes))
        with self._lock:
            if len(self._recognised) >= MOST_REMEMBERED:
                self._recognised.clear()
            self._recognised[digest] = (monotonic() + REMEMBERED_SECONDS, principal)
        return principal


def _digest(key: str) -> str:
    return sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
