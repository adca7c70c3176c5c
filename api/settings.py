"""What the service is told by its environment: addresses, folders and limits. Nothing here opens anything."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from allocator.errors import BitrankError

PREFIX = "BITRANK_"


class SettingsError(BitrankError):
    """An environment variable cannot be used; the message names it and says what it takes."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The service's settings. Every field but `host` and `port` is read from `BITRANK_<FIELD>`, or from the file that
    `BITRANK_<FIELD>_FILE` names, so that a secret need not lie in the environment.

    data_dir holds profiles/, checkpoints/ and, by default, the database. database_password goes with a database_url
    that has none. store is an fsspec URL where machines that
    share no disk find each other's outputs. model_roots are the folders whose
    models may be named in a request. requests_per_second and burst limit each API key; queue_quota is the most
    unfinished jobs of one owner. head_seconds and body_seconds are how long the head and the body of a request may
    take to arrive, unread_seconds how long a client may leave an answer unread.
    """

    data_dir: Path = Path.home() / ".local" / "share" / "bitrank"
    database_url: str = ""
    database_password: str = ""
    store: str = ""
    model_roots: tuple[Path, ...] = ()
    hub: bool = True
    host: str = "127.0.0.1"
    port: int = 8000
    allowed_hosts: tuple[str, ...] = ()
    max_connections: int = 4_096
    max_body_bytes: int = 1_048_576
    head_seconds: float = 10.0
    body_seconds: float = 20.0
    unread_seconds: float = 30.0
    max_batch_items: int = 1_000
    max_curve_points: int = 200_000
    max_event_streams: int = 256
    event_streams_per_key: int = 32
    requests_per_second: float = 200.0
    burst: int = 400
    queue_quota: int = 100
    cached_profiles: int = 8
    cached_plans: int = 1_024
    idempotency_hours: float = 24.0
    log_level: str = "info"

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """Read every variable that is set. Raises `SettingsError` naming one that cannot be read."""
        values: dict[str, object] = {}
        for field in fields(cls):
            name = PREFIX + field.name.upper()
            if field.name not in ("host", "port") and (text := _given(name, environment)):
                values[field.name] = _read(name, str(field.type), text)
        return cls(**values)  # type: ignore[arg-type]

    @property
    def url(self) -> str:
        """The database: the one given, with its password, or a file of the data directory."""
        if not self.database_url:
            return f"sqlite:///{self.data_dir / 'bitrank.db'}"
        if not self.database_password:
            return self.database_url
        from sqlalchemy import make_url

        url = make_url(self.database_url).set(password=self.database_password)
        return url.render_as_string(hide_password=False)

    @property
    def profiles_dir(self) -> Path:
        return self.data_dir / "profiles"

    @property
    def checkpoints_dir(self) -> Path:
        return self.data_dir / "checkpoints"

    @property
    def needs_keys(self) -> bool:
        """Whether requests must carry an API key: everywhere but on loopback."""
        return not is_loopback(self.host)

    def __repr__(self) -> str:
        """Without the URLs, which may hold a password."""
        return f"Settings(data_dir={self.data_dir}, host={self.host}, port={self.port})"


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _given(name: str, environment: Mapping[str, str]) -> str | None:
    """The variable, or the contents of the file that its twin with _FILE names."""
    file = environment.get(f"{name}_FILE")
    if environment.get(name) or not file:
        return environment.get(name)
    try:
        return Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{name}_FILE names {file}, which cannot be read ({error}); check it") from error


def _read(name: str, kind: str, text: str) -> object:
    if kind == "Path":
        return Path(text).expanduser()
    if kind == "tuple[Path, ...]":
        return tuple(Path(part).expanduser() for part in text.split(os.pathsep) if part)
    if kind == "tuple[str, ...]":
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if kind == "bool":
        return _boolean(name, text)
    return _number(name, kind, text) if kind in ("int", "float") else text


def _boolean(name: str, text: str) -> bool:
    if text.lower() not in ("1", "0", "true", "false", "yes", "no"):
        raise SettingsError(f"{name}={text!r} is neither yes nor no; write 1 or 0")
    return text.lower() in ("1", "true", "yes")


def _number(name: str, kind: str, text: str) -> float:
    try:
        number = int(text) if kind == "int" else float(text)
    except ValueError:
        raise SettingsError(f"{name}={text!r} is not a number; give one above zero") from None
    if not 0 < number < float("inf"):
        raise SettingsError(f"{name}={text!r} is out of range; give a number above zero")
    return number
