"""The opaque cursor of a page: where in (created_at, id) order the next page starts."""

from __future__ import annotations

import base64
import binascii
from datetime import UTC, datetime

from api.problems import ProblemError


def encode_cursor(created_at: datetime, id: str) -> str:
    return base64.urlsafe_b64encode(f"{created_at.isoformat()} {id}".encode()).decode().rstrip("=")


def decode_cursor(cursor: str) -> tuple[datetime, str]:
    """Raises `ProblemError` (invalid-request) for a text that `encode_cursor` did not make."""
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        moment, _, id = base64.b64decode(padded, altchars=b"-_", validate=True).decode().partition(" ")
        created_at = datetime.fromisoformat(moment)
    except (ValueError, binascii.Error):
        raise ProblemError("invalid-request", "this is no cursor; take it from the page before") from None
    if created_at.tzinfo is None or "\0" in id:
        raise ProblemError("invalid-request", "this is no cursor; take it from the page before")
    return created_at.astimezone(UTC), id
