"""What a hostile client does to a server on this machine, one connection each; the answer is how it was got rid of.

An attack ends when the server ends it. Its outcome is status and problem ("408 request-timeout"), or "closed" where
the server closed the connection without an answer.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator

HOST = "127.0.0.1"
HEAD = b"Host: localhost\r\nContent-Type: application/json\r\n"
PAUSE_SECONDS = 0.2
PATIENCE_SECONDS = 120.0
MIB = 2**20
BODY_BYTES = 100_000_000
UNREAD_BYTES = 8 * MIB
Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter


async def silence(port: int) -> str:
    """Connects and says nothing."""
    reader, writer = await asyncio.open_connection(HOST, port)
    return await _outcome(reader, writer)


async def slow_head(port: int) -> str:
    """A head that comes byte by byte and never ends."""
    return await _trickled(port, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")


async def slow_body(port: int) -> str:
    """A body that comes byte by byte and never ends."""
    return await _trickled(port, b"POST /v1/plans HTTP/1.1\r\n" + HEAD + b"Content-Length: 9999\r\n\r\n")


async def slow_unwanted_body(port: int) -> str:
    """A body for a GET, which no one waits for, byte by byte; the answer before it is not counted."""
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(b"GET /healthz HTTP/1.1\r\n" + HEAD + b"Content-Length: 9999\r\n\r\n")
    await reader.readuntil(b'{"status":"ok"}')
    return await _trickle(reader, writer)


async def endless_head(port: int) -> str:
    """Header after header, as fast as they go."""
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n")
    return await _sent(reader, writer, (b"X-%d: %s\r\n" % (n, b"x" * 1000) for n in range(100_000)))


async def large_body(port: int) -> str:
    """A hundred megabytes, announced."""
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(b"POST /v1/plans HTTP/1.1\r\n" + HEAD + b"Content-Length: %d\r\n\r\n" % BODY_BYTES)
    return await _sent(reader, writer, (b" " * MIB for _ in range(BODY_BYTES // MIB)))


async def large_chunked_body(port: int) -> str:
    """A hundred megabytes in chunks, without a length."""
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(b"POST /v1/plans HTTP/1.1\r\n" + HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    chunk = b"%x\r\n%s\r\n" % (MIB, b" " * MIB)
    return await _sent(reader, writer, (chunk for _ in range(BODY_BYTES // MIB)))


async def million_items(port: int) -> str:
    """A batch of a million items, seven megabytes."""
    entry = json.dumps({"model": "model", "budgets": ["3bpw"] * 1_000}, separators=(",", ":")).encode()
    body = b'{"jobs":[' + b",".join([entry] * 1_000) + b"]}"
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(
        b"POST /v1/batches HTTP/1.1\r\nConnection: close\r\n"
        + HEAD
        + b"Content-Length: %d\r\n\r\n" % len(body)
    )
    return await _sent(reader, writer, iter([body]))


async def pipelined_requests(port: int) -> str:
    """A thousand requests in one go."""
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1_000)
    while True:
        try:
            if not await asyncio.wait_for(reader.read(MIB), PATIENCE_SECONDS):
                return "closed"
        except ConnectionError:
            return "closed"


def unread(path: str, answer_bytes: int = UNREAD_BYTES) -> Callable[[int], Awaitable[str]]:
    """Asks for answers of that many bytes, more than the system keeps for a client that never reads, and reads none."""
    times = -(-UNREAD_BYTES // answer_bytes)

    async def attack(port: int) -> str:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, (HOST, port))
        with connection:
            request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
            await asyncio.get_running_loop().sock_sendall(connection, request * times)
            while connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                await asyncio.sleep(PAUSE_SECONDS)
        return "closed"

    return attack


Attack = Callable[[int], Awaitable[str]]
ATTACKS: dict[str, Attack] = {
    attack.__name__.replace("_", " "): attack
    for attack in (
        silence,
        slow_head,
        slow_body,
        slow_unwanted_body,
        endless_head,
        large_body,
        large_chunked_body,
        million_items,
        pipelined_requests,
    )
}


async def assault(attack: Attack, port: int, connections: int) -> Counter[str]:
    """So many clients at once; how they were got rid of."""
    return Counter(await asyncio.gather(*(attack(port) for _ in range(connections))))


async def _trickled(port: int, beginning: bytes) -> str:
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(beginning)
    return await _trickle(reader, writer)


async def _trickle(reader: Reader, writer: Writer) -> str:
    outcome = asyncio.ensure_future(_outcome(reader, writer))
    while not outcome.done():
        writer.write(b"x")
        await asyncio.wait([outcome], timeout=PAUSE_SECONDS)
    return outcome.result()


async def _sent(reader: Reader, writer: Writer, parts: Iterator[bytes]) -> str:
    outcome = asyncio.ensure_future(_outcome(reader, writer))
    for part in parts:
        if outcome.done():
            break
        writer.write(part)
        await asyncio.sleep(0)  # drain alone lets no one else run while the server takes everything
        try:
            await writer.drain()
        except ConnectionError:
            break
    return await outcome


async def _outcome(reader: Reader, writer: Writer) -> str:
    """What the server says until it closes."""
    try:
        answer = await asyncio.wait_for(reader.read(-1), PATIENCE_SECONDS)
    except ConnectionError:
        answer = b""
    finally:
        writer.close()
    return described(answer)


def described(answer: bytes) -> str:
    if not answer:
        return "closed"
    head, _, body = answer.partition(b"\r\n\r\n")
    status = head.split(b" ", 2)[1].decode()
    if b"content-type: application/problem+json" not in head.lower():
        return status
    return f"{status} {json.loads(body)['type'].rpartition(':')[2]}"
