"""What a client may take: bytes and seconds of a request body, requests per second, and which Host it may name."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from time import monotonic

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.problems import ProblemError, problem_of_http
from api.settings import Settings

MOST_BUCKETS = 10_000
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]", "::1")


class BodyLimit:
    """Middleware: a request body of at most `max_body_bytes` that arrives within `body_seconds`."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._most = settings.max_body_bytes
        self._seconds = settings.body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            return await self._app(scope, receive, send)
        length = Headers(scope=scope).get("content-length", "0")
        if not (length.isascii() and length.isdigit()) or len(length) > 18 or int(length) > self._most:
            return await problem_of_http(self._too_large()).response()(scope, receive, send)
        deadline, total, complete = monotonic() + self._seconds, 0, False

        async def bounded() -> Message:
            nonlocal total, complete
            if complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - monotonic()))
            except TimeoutError:
                raise HTTPException(
                    408, f"the body did not arrive within {self._seconds:g} s; send it faster"
                ) from None
            total += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if total > self._most:
                raise self._too_large()
            return message

        await self._app(scope, bounded, send)

    def _too_large(self) -> HTTPException:
        detail = f"a request body may have {self._most:,} bytes at most; send less"
        return HTTPException(413, detail)


class HostCheck:
    """Middleware: on loopback only loopback names are taken as Host, so that no web page reaches the service by
    a name of its own that it points here. Elsewhere only `allowed_hosts` and, for health checks, loopback names, where
    hosts are given."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._allowed = set(settings.allowed_hosts)
        if self._allowed or not settings.needs_keys:
            self._allowed |= {*LOOPBACK_NAMES, settings.host}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._allowed:
            host = Headers(scope=scope).get("host", "")
            name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
            if name.lower() not in self._allowed:
                problem = ProblemError(
                    "host-not-allowed", "this Host is not served; name it in BITRANK_ALLOWED_HOSTS"
                )
                return await problem.response()(scope, receive, send)
        await self._app(scope, receive, send)


class RateLimit:
    """A token bucket per API key, of this process; requests without a key are not counted."""

    def __init__(self, per_second: float, burst: int) -> None:
        self._rate = per_second
        self._burst = float(burst)
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, key: str | None) -> None:
        """Raises `ProblemError` (too-many-requests) when the key's bucket is empty."""
        if key is None:
            return
        moment = monotonic()
        tokens, since = self._buckets.pop(key, (self._burst, moment))
        tokens = min(self._burst, tokens + (moment - since) * self._rate)
        self._buckets[key] = (max(0.0, tokens - 1), moment)
        while len(self._buckets) > MOST_BUCKETS:
            self._buckets.popitem(last=False)
        if tokens < 1:
            wait = max(1, round((1 - tokens) / self._rate))
            raise ProblemError(
                "too-many-requests",
                f"more than {self._rate:g} requests per second with this API key; wait {wait} s",
                {},
                {"Retry-After": str(wait)},
            )


class Places:
    """Places for event streams, of this process: so many in all, so many for one API key; used on the event loop."""

    def __init__(self, most: int, most_per_key: int) -> None:
        self._most, self._most_per_key = most, most_per_key
        self._taken: Counter[str | None] = Counter()

    def take(self, key: str | None) -> None:
        """Raises `ProblemError` when none is left at all (unavailable) or for this key (too-many-requests)."""
        if self._taken.total() >= self._most:
            detail = f"{self._most} event streams are open already; read the job itself instead"
            raise ProblemError("unavailable", detail, {}, {"Retry-After": "5"})
        if key is not None and self._taken[key] >= self._most_per_key:
            detail = (
                f"{self._most_per_key} event streams are open with this API key; read the job itself instead"
            )
            raise ProblemError("too-many-requests", detail, {}, {"Retry-After": "5"})
        self._taken[key] += 1

    def give_back(self, key: str | None) -> None:
        self._taken[key] -= 1
        self._taken += Counter()  # forgets keys without a stream
