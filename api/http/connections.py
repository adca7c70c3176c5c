"""Connections: how many there are, how long a request's head may take, how long a client may leave an answer unread.

What lives here: uvicorn's protocol with the bounds it lacks. A client that owes the server something (a head, the rest
of a body, an end) is closed when its time is over, or when another needs its place; one that waits for its answer
never is. What a body may take is bounded in `limits.py`.
"""

from __future__ import annotations

import asyncio
import resource
import socket
import struct
from collections import OrderedDict
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from api.problems import ProblemError
from api.settings import Settings

MOST_HEAD_BYTES = 65_536
RESERVED_FILES = 256
"""File descriptors that are not connections: the database's, profiles being read."""
MOST_PIPELINED = 64
"""Requests sent without waiting for answers. Few do so at all; thousands, read in one go, would hold up the others."""
CHECK_SECONDS = 1.0


class Bounds:
    """What the connections of one server share: their bounds, and who owes the server something, longest first."""

    def __init__(self, settings: Settings) -> None:
        self.head_seconds = settings.head_seconds
        self.unread_seconds = settings.unread_seconds
        self.most = most_connections(settings.max_connections)
        self.owing: OrderedDict[Connection, None] = OrderedDict()

    def make_room(self) -> bool:
        """Close the connection that has owed something for longest; false where every client waits for an answer."""
        if not self.owing:
            return False
        debtor, _ = self.owing.popitem(last=False)
        debtor.give_up(_full())
        return True


class Connection(HttpToolsProtocol):
    """One client's connection."""

    def __init__(self, bounds: Bounds, **given: Any) -> None:
        super().__init__(**given)
        self._bounds = bounds
        self._head_bytes = 0
        self._owes_since: float | None = None
        self._leaving, self._closes_after = False, False
        self._unread_bytes, self._read_at = 0, 0.0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._read_at = self._owes_since = self.loop.time()
        self._timer = self.loop.call_later(CHECK_SECONDS, self._check)
        if len(self.connections) > self._bounds.most and not self._bounds.make_room():
            return self._refuse(_full())
        self._bounds.owing[self] = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._bounds.owing.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._leaving:
            return
        if not self._is_answering:
            self._head_bytes += len(data)
            self._owes_since = self._owes_since or self.loop.time()
        super().data_received(data)
        if self._is_answering:
            self._head_bytes, self._owes_since = 0, None
            self._note_body()
        elif self._head_bytes > MOST_HEAD_BYTES:
            detail = f"the head of a request may have {MOST_HEAD_BYTES:,} bytes at most; send less"
            self._refuse(ProblemError("head-too-large", detail))

    def _note_body(self) -> None:
        """Whoever has sent everything waits. A connection to be closed is kept until then, for `_leave` to close it."""
        if self.cycle.more_body:
            self._closes_after |= not self.cycle.keep_alive
            self.cycle.keep_alive = True
            return
        self._bounds.owing.pop(self, None)
        if self._closes_after:
            self.cycle.keep_alive, self._closes_after = False, False

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.cycle.response_complete or self.transport.is_closing():
            return
        self._bounds.owing[self] = None
        if self.cycle.more_body:
            self._leave()

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= MOST_PIPELINED:
            raise ValueError("too many requests at once")
        super().on_message_begin()

    def send_400_response(self, msg: str) -> None:
        if self.pipeline or (self._is_answering and self.cycle.response_started):
            return self._cut()  # in the midst of an answer there is no place for another
        self._refuse(
            ProblemError("bad-request", "the request is not HTTP/1.1; send it through an HTTP client")
        )

    def resume_writing(self) -> None:
        self._read_at = self.loop.time()
        super().resume_writing()

    def give_up(self, problem: ProblemError) -> None:
        """Close, and say why where a request has begun and no answer has."""
        if self._leaving:
            self._cut()
        elif self._head_bytes or (self._is_answering and not self.cycle.response_started):
            self._refuse(problem)
        else:
            self.transport.close()

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, problem: ProblemError) -> None:
        """Answer instead of the application, which has not begun to."""
        answer = problem.response()
        answer.headers["connection"] = "close"
        lines = [b"%s: %s\r\n" % header for header in answer.raw_headers]
        status = f"HTTP/1.1 {problem.status} {HTTPStatus(problem.status).phrase}\r\n".encode()
        self.transport.write(b"".join((status, *lines, b"\r\n", answer.body)))
        if self._is_answering:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._leave()

    def _leave(self) -> None:
        """Say no more, and let the client finish: closing at once would take the answer from one that still sends."""
        self._leaving = True
        self._owes_since = self.loop.time()
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def _check(self) -> None:
        self._timer = self.loop.call_later(CHECK_SECONDS, self._check)
        moment = self.loop.time()
        if self._owes_since is not None and moment - self._owes_since > self._bounds.head_seconds:
            detail = f"the request did not arrive within {self._bounds.head_seconds:g} s; send it faster"
            self.give_up(ProblemError("request-timeout", detail))
        unread_bytes = self.transport.get_write_buffer_size()
        if unread_bytes == 0 or unread_bytes < self._unread_bytes:
            self._read_at = moment
        self._unread_bytes = unread_bytes
        if moment - self._read_at > self._bounds.unread_seconds:
            self._cut()

    def _cut(self) -> None:
        """End it with a reset, so that the system forgets what was not read."""
        connection = self.transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()


def _full() -> ProblemError:
    return ProblemError("unavailable", "too many connections; try again soon", {}, {"Retry-After": "1"})


def most_connections(wanted: int) -> int:
    """As many as wanted, or as the system has files for, after it was asked for enough."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + RESERVED_FILES
    if hard != resource.RLIM_INFINITY:
        needed = min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    return max(1, needed - RESERVED_FILES)
