"""Profiles the service knows: their rows, their directories, the parsed ones in memory.

What lives here: registering a finished profile, finding one by model, and a bounded cache of parsed profiles.
Measuring is the profiler's; running it as a job is in `client.py`.
"""

from __future__ import annotations

import shutil
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from threading import Lock
from time import monotonic
from typing import TYPE_CHECKING

from sqlalchemy import and_, or_, select
from sqlalchemy.exc import IntegrityError

from allocator.errors import BitrankError
from api.problems import ProblemError
from api.settings import Settings
from api.storage.artifacts import open_store, whole
from api.storage.database import Database, ModelRow, ProfileRow
from api.storage.pagination import decode_cursor, encode_cursor

if TYPE_CHECKING:
    from profiler.documents.profile import Profile

FOUND_SECONDS = 1.0
"""How long the newest profile of a model is remembered."""


class ProfileStore:
    """The profiles under `<data_dir>/profiles/<sha256>/`, fetched there where another machine made them."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._folder = settings.profiles_dir
        self._database = database
        self._store = open_store(settings)
        self._capacity = settings.cached_profiles
        self._cached: OrderedDict[str, Profile] = OrderedDict()
        self._found: dict[str, tuple[float, str]] = {}
        self._lock = Lock()

    def register(self, directory: Path, model: str | None = None) -> str:
        """Take a finished profile directory in, by copy, under the name `model`; returns its id.

        Registering the same profile again changes nothing. Raises `ProfileError` when it is not whole.
        """
        from profiler.documents.profile import load_profile

        profile = load_profile(directory)
        target = self.directory(profile.sha256)
        if not target.exists():
            with whole(target) as temporary:
                shutil.copytree(directory, temporary, ignore=shutil.ignore_patterns(".*"))
        self._store.publish(_address(profile.sha256), target, sorted(target.iterdir()))
        self._insert(profile, model or _name(profile))
        return profile.sha256

    def _insert(self, profile: Profile, model: str) -> None:
        document, menu = profile.document, profile.menu
        row = ProfileRow(
            id=profile.sha256,
            model=model,
            weights_sha256=document.model.weights_sha256,
            layer_count=len(document.layers),
            original_bytes=menu.original_bytes,
            smallest_bytes=menu.smallest_bytes,
        )
        known = ModelRow(
            id=model,
            revision=document.model.revision,
            weights_sha256=document.model.weights_sha256,
            architecture=document.architecture,
        )
        try:
            with self._database.transaction() as session:
                session.merge(known)
                if session.get(ProfileRow, profile.sha256) is None:
                    session.add(row)
        except IntegrityError:
            pass  # another process registered the same profile meanwhile
        self._found.clear()

    def directory(self, profile_id: str) -> Path:
        return self._folder / profile_id

    def find(self, model: str) -> str | None:
        """The id of the newest profile of `model`, None where there is none. May lag by `FOUND_SECONDS`."""
        expiry, known = self._found.get(model, (0.0, ""))
        if monotonic() < expiry:
            return known
        newest = ProfileRow.created_at.desc()
        query = select(ProfileRow.id).where(ProfileRow.model == model).order_by(newest).limit(1)
        with self._database.engine.connect() as connection:
            found = connection.execute(query).scalar()
        if found is not None:
            self._found[model] = (monotonic() + FOUND_SECONDS, found)
        return found

    def row(self, profile_id: str) -> ProfileRow:
        """Raises `ProblemError` (unknown-profile)."""
        with self._database.transaction() as session:
            found = session.get(ProfileRow, profile_id)
        if found is None:
            raise _unknown(profile_id)
        return found

    def list(self, model: str | None, cursor: str | None, limit: int) -> tuple[list[ProfileRow], str | None]:
        """A page of profiles, newest first, and the cursor of the next page."""
        query = select(ProfileRow).order_by(ProfileRow.created_at.desc(), ProfileRow.id.desc())
        if model is not None:
            query = query.where(ProfileRow.model == model)
        if cursor is not None:
            created_at, id = decode_cursor(cursor)
            same_moment = and_(ProfileRow.created_at == created_at, ProfileRow.id < id)
            query = query.where(or_(ProfileRow.created_at < created_at, same_moment))
        with self._database.transaction() as session:
            rows = list(session.scalars(query.limit(limit + 1)))
        last = rows[limit - 1] if len(rows) > limit else None
        return rows[:limit], encode_cursor(last.created_at, last.id) if last else None

    def load(self, profile_id: str) -> Profile:
        """The parsed profile, from memory where it was used lately. Raises `ProblemError` (unknown-profile)."""
        if profile_id not in self._cached:
            self._bring(profile_id)
        with self._lock:
            if profile_id in self._cached:
                self._cached.move_to_end(profile_id)
                return self._cached[profile_id]
            profile = self._read(profile_id)
            self._cached[profile_id] = profile
            while len(self._cached) > self._capacity:
                self._cached.popitem(last=False)
            return profile

    def warm(self) -> None:
        """Parse the newest profiles, as many as are kept in memory, so that no request waits for it."""
        rows, _ = self.list(None, None, self._capacity)
        for row in reversed(rows):
            with suppress(BitrankError, ProblemError):
                self.load(row.id)

    def _bring(self, profile_id: str) -> None:
        """The directory of a profile that another machine made, outside the lock: others need not wait for it."""
        self.row(profile_id)
        if not self.directory(profile_id).exists():
            self._store.restore(_address(profile_id), self.directory(profile_id))

    def _read(self, profile_id: str) -> Profile:
        from profiler.documents.profile import load_profile

        profile = load_profile(self.directory(profile_id))
        _ = profile.menu
        return profile


def _name(profile: Profile) -> str:
    """The name of a profile made by the command line: a hub id or `demo` as it is, a directory by its last part."""
    model = profile.document.model.id
    return Path(model).name if Path(model).is_absolute() or model.count("/") > 1 else model


def _address(profile_id: str) -> str:
    return f"profiles/{profile_id}"


def _unknown(profile_id: str) -> ProblemError:
    return ProblemError("unknown-profile", f"no profile {profile_id[:64]!r}; GET /v1/profiles lists them")
