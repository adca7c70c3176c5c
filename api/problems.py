"""Errors as RFC 9457 problem documents, each with a stable `type`.

What lives here: the catalogue of problems, the exception that carries one, and the handlers that turn every error of
the service and of the floors below into `application/problem+json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.responses import Response

from allocator.errors import (
    BitrankError,
    BudgetAboveOriginalError,
    BudgetSyntaxError,
    ConstraintError,
    ExportError,
    InfeasibleError,
    StrategyError,
    TargetError,
)

MEDIA_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:bitrank:problem:"

TITLES: dict[str, tuple[int, str]] = {
    "bad-request": (400, "The request cannot be read"),
    "host-not-allowed": (400, "The Host header names another host"),
    "unauthenticated": (401, "An API key is needed"),
    "forbidden": (403, "The API key may not do this"),
    "not-found": (404, "There is nothing at this address"),
    "unknown-model": (404, "The model is not known"),
    "unknown-profile": (404, "The profile is not known"),
    "unknown-plan": (404, "The plan is not known"),
    "unknown-layer": (404, "No layer has this name"),
    "unknown-job": (404, "The job is not known"),
    "unknown-evaluation": (404, "The evaluation is not known"),
    "not-measured": (404, "The profile lacks this measurement"),
    "method-not-allowed": (405, "This address does not take the method"),
    "not-acceptable": (406, "No representation is acceptable"),
    "request-timeout": (408, "The request took too long to arrive"),
    "conflict": (409, "The request conflicts with another"),
    "too-large": (413, "The request body is too large"),
    "unsupported-media-type": (415, "The body has the wrong media type"),
    "invalid-request": (422, "The request does not fit the schema"),
    "budget-syntax": (422, "The budget cannot be read"),
    "budget-above-original": (422, "The budget is above the original size"),
    "infeasible": (422, "No plan fits the budget"),
    "strategy": (422, "The strategy cannot be followed"),
    "constraint": (422, "The constraints contradict each other or the model"),
    "target": (422, "The target is not known"),
    "export": (422, "The plan cannot be written in this format"),
    "unusable": (422, "What the request names cannot be used"),
    "idempotency-key-reused": (422, "The Idempotency-Key belongs to another request"),
    "too-many-requests": (429, "Too many requests"),
    "queue-full": (429, "Too many unfinished jobs"),
    "head-too-large": (431, "The head of the request is too large"),
    "internal": (500, "The service failed"),
    "unavailable": (503, "The service cannot answer now"),
}
"""Status and title by the last part of `type`. Entries are added, never renamed."""

BY_STATUS = {
    400: "bad-request",
    401: "unauthenticated",
    403: "forbidden",
    404: "not-found",
    405: "method-not-allowed",
    406: "not-acceptable",
    408: "request-timeout",
    409: "conflict",
    413: "too-large",
    415: "unsupported-media-type",
    422: "invalid-request",
    429: "too-many-requests",
    431: "head-too-large",
    503: "unavailable",
}
BY_ERROR: tuple[tuple[type[BitrankError], str], ...] = (
    (BudgetSyntaxError, "budget-syntax"),
    (BudgetAboveOriginalError, "budget-above-original"),
    (InfeasibleError, "infeasible"),
    (StrategyError, "strategy"),
    (ConstraintError, "constraint"),
    (TargetError, "target"),
    (ExportError, "export"),
    (BitrankError, "unusable"),
)


class Problem(BaseModel):
    """An error, after RFC 9457. Some types have further members, like `smallest_bytes` or `errors`."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "example": {
                "type": TYPE_PREFIX + "infeasible",
                "title": TITLES["infeasible"][1],
                "status": 422,
                "detail": "budget 1MiB is 1,048,576 bytes, but the smallest feasible plan takes 3,306,624 bytes",
                "smallest_bytes": 3306624,
            }
        },
    )

    type: str
    title: str
    status: int
    detail: str


@dataclass
class ProblemError(Exception):
    """A problem on its way to the client. `kind` is a key of `TITLES`; `extra` are further members."""

    kind: str
    detail: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def status(self) -> int:
        return TITLES[self.kind][0]

    def document(self) -> dict[str, Any]:
        return {
            "type": TYPE_PREFIX + self.kind,
            "title": TITLES[self.kind][1],
            "status": self.status,
            "detail": self.detail,
            **self.extra,
        }

    def response(self) -> Response:
        body = json.dumps(self.document(), ensure_ascii=False).encode("utf-8", "replace")
        return Response(body, self.status, dict(self.headers), MEDIA_TYPE)


def problem_of(error: BitrankError) -> ProblemError:
    """The problem that an error of the floors below is."""
    kind = next(kind for cls, kind in BY_ERROR if isinstance(error, cls))
    extra = {"smallest_bytes": error.smallest_bytes} if isinstance(error, InfeasibleError) else {}
    return ProblemError(kind, " ".join(str(error).split()), extra)


def database_away() -> ProblemError:
    detail = "the database does not answer; try again soon"
    return ProblemError("unavailable", detail, headers={"Retry-After": "5"})


def problem_of_http(error: HTTPException) -> ProblemError:
    kind = BY_STATUS.get(error.status_code, "bad-request" if error.status_code < 500 else "internal")
    return ProblemError(kind, str(error.detail), headers=error.headers or {})


def problem_of_validation(error: RequestValidationError) -> ProblemError:
    """Names each field and what is wrong with it, never the value: that may be a secret, or not JSON."""
    if any(e["type"] == "json_invalid" for e in error.errors()):
        return ProblemError("bad-request", "the body is not valid JSON; send one JSON document")
    errors = [{"field": ".".join(str(p) for p in e["loc"]), "message": str(e["msg"])} for e in error.errors()]
    first = errors[0]
    return ProblemError("invalid-request", f"{first['field']}: {first['message']}", {"errors": errors[:20]})


def install_handlers(app: FastAPI) -> None:
    """Every error that leaves a route becomes a problem document."""

    async def on_problem(request: Request, error: Exception) -> Response:
        assert isinstance(error, ProblemError)
        return error.response()

    async def on_bitrank(request: Request, error: Exception) -> Response:
        assert isinstance(error, BitrankError)
        return problem_of(error).response()

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return problem_of_http(error).response()

    async def on_validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return problem_of_validation(error).response()

    app.add_exception_handler(ProblemError, on_problem)
    app.add_exception_handler(BitrankError, on_bitrank)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestValidationError, on_validation)


def responses(*kinds: str) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI entries of the problems a route can answer with, beside those every route can."""
    statuses = sorted(
        {TITLES[kind][0] for kind in (*kinds, "unauthenticated", "forbidden", "too-many-requests")}
    )
    return {
        status: {
            "description": "; ".join(sorted({t for s, t in TITLES.values() if s == status})),
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
        for status in statuses
    }
