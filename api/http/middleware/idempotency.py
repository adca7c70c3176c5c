"""Idempotency-Key: a POST that is sent twice with one key is carried out once and answered twice.

What lives here: the middleware. The first answer is stored (below status 500) for `idempotency_hours` and repeated;
the same key with another request is refused, and so is a second request while the first is under way. A request
whose server died is carried out again by the next one, and makes the same job: its id is chosen with the claim.
"""

from __future__ import annotations

from datetime import timedelta
from hashlib import sha256
from uuid import uuid4

from sqlalchemy import delete
from sqlalchemy.exc import IntegrityError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.problems import ProblemError, problem_of_http
from api.settings import Settings
from api.storage.database import Database, IdempotencyRow, now

HEADER = "idempotency-key"
REPEATED = ("content-type", "location", "etag", "retry-after")
STALE_SECONDS = 30
"""A claim without an answer for so long is a dead server's: the next request takes it over."""
MOST_STORED_BYTES = 4 * 2**20


class Idempotency:
    """Middleware for every POST that carries the header."""

    def __init__(self, app: ASGIApp, settings: Settings, database: Database) -> None:
        self._app = app
        self._answers = Answers(database, timedelta(hours=settings.idempotency_hours))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = Headers(scope=scope).get(HEADER) if scope["type"] == "http" else None
        if key is None or scope["method"] != "POST":
            return await self._app(scope, receive, send)
        try:
            if not 0 < len(key) <= 255 or not key.isascii() or not key.isprintable():
                raise ProblemError(
                    "invalid-request", "Idempotency-Key takes 1 to 255 printable ASCII characters"
                )
            body = await read_body(receive)
            owner = scope["state"]["principal"].id or ""
            digest = sha256(f"{scope['path']}\n{scope['query_string']!r}\n".encode() + body).hexdigest()
            claimed = await run_in_threadpool(self._answers.claim, owner, key, digest)
        except HTTPException as error:
            return await problem_of_http(error).response()(scope, receive, send)
        except ProblemError as problem:
            return await problem.response()(scope, receive, send)
        if isinstance(claimed, Response):
            return await claimed(scope, receive, send)
        scope["state"]["job_id"] = claimed
        await self._carry_out(scope, replayed(body, receive), send, owner, key)

    async def _carry_out(self, scope: Scope, receive: Receive, send: Send, owner: str, key: str) -> None:
        answer = Recorder()
        try:
            await self._app(scope, receive, answer)
        finally:
            keep = 200 <= answer.status < 500 and answer.status not in (401, 403, 408, 413, 429)
            save = self._answers.store if keep else self._answers.release
            await run_in_threadpool(save, owner, key, answer)
        for message in answer.messages:
            await send(message)


class Recorder:
    """A `send` that holds an answer back until it is stored: whoever has it can have it repeated."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = Headers(raw=message["headers"])
            self.headers = {name: headers[name] for name in REPEATED if name in headers}
        elif message["type"] == "http.response.body":
            self.body += message.get("body", b"")
        self.messages.append(message)


class Answers:
    """The stored answers."""

    def __init__(self, database: Database, lifetime: timedelta) -> None:
        self._database = database
        self._lifetime = lifetime

    def claim(self, owner: str, key: str, digest: str) -> Response | str:
        """Claim a key for a request: the answer it had, or the id of the job to make. Raises `ProblemError`."""
        job_id = str(uuid4())
        try:
            with self._database.transaction() as session:
                session.execute(
                    delete(IdempotencyRow).where(IdempotencyRow.created_at < now() - self._lifetime)
                )
                session.add(IdempotencyRow(owner=owner, key=key, request_sha256=digest, job_id=job_id))
            return job_id
        except IntegrityError:
            return self._stored(owner, key, digest)

    def _stored(self, owner: str, key: str, digest: str) -> Response | str:
        with self._database.transaction() as session:
            row = session.get(IdempotencyRow, (owner, key), with_for_update=True)
            if row is None:
                raise ProblemError("conflict", "the first request with this key just failed; send it again")
            if row.request_sha256 != digest:
                raise ProblemError(
                    "idempotency-key-reused",
                    "this Idempotency-Key was sent with another request; choose a new one",
                )
            if row.status:
                return Response(row.body, row.status, {**row.headers, "idempotency-replayed": "true"})
            if (now() - row.created_at).total_seconds() < STALE_SECONDS:
                headers = {"Retry-After": "1"}
                raise ProblemError(
                    "conflict", "the first request with this key is under way; wait", {}, headers
                )
            row.created_at = now()
            return row.job_id

    def store(self, owner: str, key: str, answer: Recorder) -> None:
        if len(answer.body) > MOST_STORED_BYTES:
            return self.release(owner, key, answer)
        with self._database.transaction() as session:
            row = session.get(IdempotencyRow, (owner, key))
            if row is not None:
                row.status, row.headers, row.body = answer.status, answer.headers, answer.body

    def release(self, owner: str, key: str, answer: Recorder) -> None:
        with self._database.transaction() as session:
            session.execute(
                delete(IdempotencyRow).where(IdempotencyRow.owner == owner, IdempotencyRow.key == key)
            )


async def read_body(receive: Receive) -> bytes:
    """The whole body. Raises `HTTPException` where `BodyLimit` does."""
    parts = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise ProblemError("bad-request", "the client went away")
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body again, then what `receive` gives."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
