"""Who may do what: recognises API keys on every request, and asks for a scope on every route.

On loopback a request needs no key and may do everything; one that carries a key is held to it. Elsewhere every
address but the probes, the documentation and the page needs one. Keys themselves are in `api_keys.py`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import Depends, Request
from fastapi.security import HTTPBearer
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from api.http.middleware.limits import RateLimit
from api.problems import ProblemError
from api.settings import Settings
from api.storage.api_keys import ANYONE, KeyStore, Principal

OPEN = ("/healthz", "/readyz", "/", "/docs", "/openapi.json", "/favicon.ico")
BEARER = HTTPBearer(
    auto_error=False, scheme_name="ApiKey", description="An API key made by `bitrank keys create`."
)
CHALLENGE = {"WWW-Authenticate": 'Bearer realm="bitrank"'}


class Authentication:
    """Middleware: puts the `Principal` into the request's state, refuses wrong keys and too many requests."""

    def __init__(self, app: ASGIApp, settings: Settings, keys: KeyStore) -> None:
        self._app = app
        self._needs_keys = settings.needs_keys
        self._keys = keys
        self._limit = RateLimit(settings.requests_per_second, settings.burst)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        try:
            principal = await self._principal(scope)
            self._limit.take(principal.id)
        except ProblemError as problem:
            return await problem.response()(scope, receive, send)
        scope.setdefault("state", {})["principal"] = principal
        await self._app(scope, receive, send)

    async def _principal(self, scope: Scope) -> Principal:
        given = Headers(scope=scope).get("authorization")
        if given is None:
            if not self._needs_keys or scope["path"] in OPEN or scope["path"].startswith("/static/"):
                return ANYONE
            raise ProblemError(
                "unauthenticated", "send Authorization: Bearer KEY with an API key", {}, CHALLENGE
            )
        scheme, _, key = given.partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise ProblemError(
                "unauthenticated", "the only scheme is Authorization: Bearer KEY", {}, CHALLENGE
            )
        fresh, principal = self._keys.remembered(key.strip())
        if not fresh:
            principal = await run_in_threadpool(self._keys.recognise, key.strip())
        if principal is None:
            raise ProblemError("unauthenticated", "this API key is unknown or revoked", {}, CHALLENGE)
        return principal


def requires(*scopes: str) -> Callable[..., Awaitable[Principal]]:
    """A dependency: the principal, who must have one of `scopes`."""

    async def principal(request: Request, _: object = Depends(BEARER)) -> Principal:
        found: Principal = request.state.principal
        if not found.scopes.intersection(scopes):
            needed = " or ".join(scopes)
            raise ProblemError("forbidden", f"this API key lacks the scope {needed}; use one that has it")
        return found

    return principal
