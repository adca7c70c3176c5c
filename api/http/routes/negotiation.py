"""ETag, If-None-Match and Accept: what the routes share of HTTP."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, Header
from starlette.responses import Response

from api.problems import ProblemError

IfNoneMatch = Annotated[
    str | None, Header(description="Answer 304 when the ETag is one of these.", max_length=4096)
]
NOT_MODIFIED: dict[int | str, dict[str, Any]] = {
    304: {"description": "The representation is the one you have."}
}


def etag_matches(header: str | None, etag: str) -> bool:
    """Weak comparison, as RFC 9110 asks of If-None-Match."""
    if header is None:
        return False
    given = [part.strip().removeprefix("W/") for part in header.split(",")]
    return "*" in given or etag.removeprefix("W/") in given


def tagged(content: bytes, media_type: str, etag: str, if_none_match: str | None, **headers: str) -> Response:
    """The content under an ETag, or 304 without it."""
    headers = {"ETag": etag, "Cache-Control": "private, no-cache", "Vary": "Accept, Authorization"} | headers
    if etag_matches(if_none_match, etag):
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=media_type)


def accepted(accept: str | None, offered: tuple[str, ...]) -> str:
    """The offered media type that an Accept header likes best, the first one among equals.

    Raises `ProblemError` (not-acceptable).
    """
    if not accept:
        return offered[0]
    liked = [(-_quality(accept, media_type), index) for index, media_type in enumerate(offered)]
    best, index = min(liked)
    if best == 0:
        raise ProblemError("not-acceptable", f"Accept names none of {', '.join(offered)}")
    return offered[index]


def _quality(accept: str, media_type: str) -> float:
    """The quality of the most specific range that covers the type, 0 where none does."""
    specific, quality = -1, 0.0
    for part in accept.split(","):
        name, *parameters = (piece.strip().lower() for piece in part.split(";"))
        rank = {media_type: 2, media_type.split("/")[0] + "/*": 1, "*/*": 0}.get(name, -1)
        if rank > specific:
            specific, quality = rank, _weight(parameters)
    return quality


def _weight(parameters: list[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                return min(1.0, max(0.0, float(value)))
            except ValueError:
                return 0.0
    return 1.0


async def _idempotency_key(
    idempotency_key: Annotated[
        str | None,
        Header(
            min_length=1,
            max_length=255,
            pattern=r"^[!-~]([ -~]*[!-~])?$",
            description="Any unique printable ASCII. Sent again with the same request, the first answer is repeated.",
        ),
    ] = None,
) -> str | None:
    return idempotency_key


IDEMPOTENT = Depends(_idempotency_key)
"""Documents the header; `idempotency.py` does the work."""
