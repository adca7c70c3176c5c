"""Load on a real server over loopback: plans at a fixed rate, plans and reads at saturation, memory over many plans.

    python -m benchmarks.load PROFILE [--seconds 60] [--rate 50] [--plans 5000] [--reads 30000] [--soak 100000]

PROFILE is a finished profile directory, like that of `bitrank profile MODEL -o PROFILE`. The server is a
`bitrank serve` process of its own in an empty data directory; this process is the load generator. Every plan asks for
another budget in bytes, in random order over all that is feasible, so no answer is a repetition.

At a fixed rate the moment of every request is set beforehand and its latency counts from that moment, so that a slow
answer also counts against those that had to wait behind it (no coordinated omission). At saturation a few connections
each send the next request once they have the answer. CPU is the server process' own, user and system. The resident set
of the server is read after a tenth and after all of the soak.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Self, cast

CONNECTIONS = 8
START_SECONDS = 120
CHECKED = 97
"""One answer in so many is parsed and compared with its request."""
TICK = os.sysconf("SC_CLK_TCK")
PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 2**20


class Server:
    """`bitrank serve` without workers on a free port, and what the system says of its process."""

    def __init__(self, profile: Path, folder: Path) -> None:
        self._log = folder / "server.log"
        settings = {"BITRANK_DATA_DIR": str(folder / "data"), "BITRANK_HUB": "0", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [*command("serve"), "--port", "0", "--workers", "0", "--profile", str(profile)],
            stderr=self._log.open("wb"),
            env=os.environ | settings,
        )
        self.port = self._await_port()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        self._process.terminate()
        self._process.wait()

    @property
    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICK

    @property
    def resident_mib(self) -> float:
        return int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]) * PAGE_MIB

    def _await_port(self) -> int:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            for line in self._log.read_text().splitlines():
                if '"serving"' in line:
                    return int(json.loads(line)["address"].rpartition(":")[2])
            time.sleep(0.1)
        raise RuntimeError(f"the server did not start: {self._log.read_text()}")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "api.main", *arguments]


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: bytes


class Connection(asyncio.Protocol):
    """One keep-alive connection with one request under way at a time."""

    def __init__(self) -> None:
        self._received = bytearray()
        self._answer: asyncio.Future[Answer] | None = None
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def open(cls, port: int) -> Connection:
        return (await asyncio.get_running_loop().create_connection(cls, "127.0.0.1", port))[1]

    async def ask(self, request: bytes) -> Answer:
        """Raises `ConnectionError` when the server hangs up."""
        if self._transport is None:
            raise ConnectionError("the server has closed the connection")
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head = self._received.find(b"\r\n\r\n")
        if head < 0 or self._answer is None:
            return
        fields = bytes(self._received[:head]).lower()
        length = int(fields.partition(b"content-length:")[2].partition(b"\r\n")[0])
        if len(self._received) < head + 4 + length:
            return
        self._answer.set_result(Answer(int(fields[9:12]), bytes(self._received[head + 4 :])))
        self._received.clear()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionError("the server hung up"))


@dataclass(slots=True)
class Outcome:
    """Latencies in seconds of the requests that were answered as they should be, and how many were not."""

    expected: int
    latencies: list[float] = field(default_factory=list)
    errors: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def count(self, answer: Answer | None, latency: float, request: Request) -> None:
        if answer is None or answer.status != self.expected or not request.is_answered_by(answer):
            self.errors += 1
        else:
            self.latencies.append(latency)

    @property
    def answered(self) -> int:
        return len(self.latencies)

    def milliseconds(self, percentile: int) -> float:
        return 1e3 * statistics.quantiles(self.latencies, n=100, method="inclusive")[percentile - 1]

    def row(self, name: str) -> str:
        figures = [
            f"{self.answered:,}",
            f"{self.errors}",
            f"{self.answered / self.seconds:,.0f}",
            *(f"{self.milliseconds(p):.1f}" for p in (50, 95, 99)),
            f"{1e3 * max(self.latencies):.1f}",
            f"{1e3 * self.cpu_seconds / self.answered:.2f}",
        ]
        return f"| {name} | " + " | ".join(figures) + " |"


HEADER = """| load | answered | errors | per second | p50 ms | p95 ms | p99 ms | max ms | server CPU ms each |
|---|---|---|---|---|---|---|---|---|"""


@dataclass(frozen=True, slots=True)
class Request:
    """A request as bytes. A checked one knows the budget in bytes that its plan must keep."""

    raw: bytes
    budget_bytes: int | None = None

    def is_answered_by(self, answer: Answer) -> bool:
        if self.budget_bytes is None:
            return True
        plan = json.loads(answer.body)
        return plan["budget"]["bytes"] == self.budget_bytes >= plan["total_bytes"] > 0


@dataclass(frozen=True, slots=True)
class Range:
    """Every whole budget of a model from its smallest to its original size, in bytes."""

    model: str
    smallest_bytes: int
    original_bytes: int

    def plans(self, count: int) -> Iterator[Request]:
        """`count` requests with budgets that all differ."""
        budgets = random.Random(0).sample(range(self.smallest_bytes, self.original_bytes), count)
        for number, budget in enumerate(budgets):
            body = json.dumps({"model": self.model, "budget": f"{budget}B"}).encode()
            yield Request(post("/v1/plans", body), budget if number % CHECKED == 0 else None)


def post(path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


async def find_range(port: int) -> Range:
    """Of the one model the server has a profile of."""
    connection = await Connection.open(port)
    answer = await connection.ask(get("/v1/profiles"))
    profile = json.loads(answer.body)["profiles"][0]
    return Range(profile["model"], profile["smallest_bytes"], profile["original_bytes"])


async def send(connection: Connection, request: Request, since: float, outcome: Outcome) -> None:
    try:
        answer = await connection.ask(request.raw)
    except ConnectionError:
        return outcome.count(None, 0.0, request)
    outcome.count(answer, time.perf_counter() - since, request)


async def at_rate(server: Server, requests: Iterator[Request], rate: float, expected: int) -> Outcome:
    """Sends request i at the moment i / rate, whatever became of those before."""
    outcome, tasks = Outcome(expected), set()
    free = [await Connection.open(server.port) for _ in range(CONNECTIONS)]
    started, cpu = time.perf_counter(), server.cpu_seconds

    async def one(request: Request, due: float) -> None:
        connection = free.pop() if free else await Connection.open(server.port)
        await send(connection, request, due, outcome)
        free.append(connection)

    for number, request in enumerate(requests):
        due = started + number / rate
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        task = asyncio.create_task(one(request, due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    outcome.seconds, outcome.cpu_seconds = time.perf_counter() - started, server.cpu_seconds - cpu
    return outcome


async def saturated(server: Server, requests: Iterator[Request], expected: int) -> Outcome:
    """Sends the next request on a connection as soon as it has the answer to the last."""
    outcome = Outcome(expected)
    connections = [await Connection.open(server.port) for _ in range(CONNECTIONS)]
    started, cpu = time.perf_counter(), server.cpu_seconds

    async def repeat(connection: Connection) -> None:
        for request in requests:
            await send(connection, request, time.perf_counter(), outcome)

    await asyncio.gather(*map(repeat, connections))
    outcome.seconds, outcome.cpu_seconds = time.perf_counter() - started, server.cpu_seconds - cpu
    return outcome


async def plan_address(server: Server, request: Request) -> str:
    """Where the plan that a request makes can be read."""
    connection = await Connection.open(server.port)
    document = (await connection.ask(request.raw)).body
    return f"/v1/plans/{sha256(document).hexdigest()[:32]}"


async def soak(server: Server, requests: Iterator[Request], count: int) -> Outcome:
    """Saturation, in ten parts, with the resident set after each."""
    total = Outcome(201)
    for part in range(10):
        outcome = await saturated(server, islice(requests, count // 10), 201)
        total.latencies += outcome.latencies
        total.errors += outcome.errors
        total.seconds += outcome.seconds
        total.cpu_seconds += outcome.cpu_seconds
        print(
            f"after {(part + 1) * (count // 10):,} plans: {server.resident_mib:.0f} MiB resident", flush=True
        )
    return total


async def measure(server: Server, given: argparse.Namespace) -> None:
    everything = await find_range(server.port)
    at_fixed_rate = round(given.seconds * given.rate)
    plans = everything.plans(1_000 + at_fixed_rate + given.plans + given.soak)
    await saturated(server, islice(plans, 999), 201)
    address = await plan_address(server, next(plans))
    print(HEADER, flush=True)
    if at_fixed_rate:
        outcome = await at_rate(server, islice(plans, at_fixed_rate), given.rate, 201)
        print(outcome.row(f"POST plans, {given.rate:g}/s"), flush=True)
    if given.plans:
        print(
            (await saturated(server, islice(plans, given.plans), 201)).row("POST plans, saturated"),
            flush=True,
        )
    if given.reads:
        reads = (Request(get(address)) for _ in range(given.reads))
        print((await saturated(server, reads, 200)).row("GET plan, saturated"), flush=True)
    if given.soak:
        print((await soak(server, plans, given.soak)).row("soak"), flush=True)


def main() -> None:
    import uvloop

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("profile", type=Path)
    parser.add_argument("--rate", type=float, default=50.0, help="plans per second at the fixed rate")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the fixed rate; 0 leaves it out")
    parser.add_argument("--plans", type=int, default=5_000, help="plans at saturation; 0 leaves it out")
    parser.add_argument("--reads", type=int, default=30_000, help="reads at saturation; 0 leaves it out")
    parser.add_argument(
        "--soak", type=int, default=0, help="plans of the memory measurement; 100000 takes minutes"
    )
    given = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="bitrank-load-") as folder,
        Server(given.profile, Path(folder)) as server,
    ):
        uvloop.run(measure(server, given))


if __name__ == "__main__":
    main()
