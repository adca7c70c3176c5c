"""Attacks a server and says how each was got rid of, and what an ordinary client noticed.

    python -m benchmarks.hostile

The server is a process with its default bounds, but 500 connections instead of 4,096; the attackers are a process,
and the ordinary client another. The client plans a small model all the time, in turn over a kept connection and over
a new one; its times are milliseconds. Compare with the row `nothing`, which is the same client alone.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx

from benchmarks.attacks import ATTACKS, UNREAD_BYTES, Attack, assault, unread
from benchmarks.bystander import Bystander
from benchmarks.cluster import free_port
from benchmarks.installation import eventful_job, undisturbed, write_small_model

MOST_CONNECTIONS = 500
SHORTEST_SECONDS = 10.0
CLIENTS = {
    "silence": (ATTACKS["silence"], 400),
    "slow heads": (ATTACKS["slow head"], 400),
    "slow bodies": (ATTACKS["slow body"], 400),
    "slow unwanted bodies": (ATTACKS["slow unwanted body"], 400),
    "too many slow heads": (ATTACKS["slow head"], 1_500),
    "too many slow bodies": (ATTACKS["slow body"], 1_500),
    "endless heads": (ATTACKS["endless head"], 8),
    "large bodies": (ATTACKS["large body"], 8),
    "large chunked bodies": (ATTACKS["large chunked body"], 8),
    "a thousand requests in one go": (ATTACKS["pipelined requests"], 100),
    "batches of a million items": (ATTACKS["million items"], 8),
}
UNREAD = {"unread files": 20, "unread events": 100}
SCRIPT = "/static/vendor/d3.min.js"


def assail(attack: Attack | tuple[str, int], port: int, clients: int) -> Counter[str]:
    """Again and again for a while, in a process of its own. An address and the bytes of its answer are left unread."""
    outcomes: Counter[str] = Counter()
    deadline = time.monotonic() + SHORTEST_SECONDS
    while time.monotonic() < deadline:
        chosen = unread(*attack) if isinstance(attack, tuple) else attack
        outcomes += asyncio.run(assault(chosen, port, clients))
    return outcomes


@contextmanager
def server(folder: Path, port: int) -> Iterator[None]:
    environment = {
        "BITRANK_DATA_DIR": str(folder / "data"),
        "BITRANK_MAX_CONNECTIONS": str(MOST_CONNECTIONS),
        "OMP_NUM_THREADS": "1",
    }
    command = ["serve", "--port", str(port), "--workers", "0", "--profile", str(folder / "small")]
    process = subprocess.Popen(
        [sys.executable, "-m", "api.main", *command], env=os.environ | environment, stderr=subprocess.DEVNULL
    )
    try:
        while not _ready(port):
            time.sleep(0.1)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def _ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def row(name: str, bystander: Bystander, outcomes: Counter[str]) -> dict[str, object]:
    milliseconds = [1e3 * seconds for seconds in bystander.seconds]
    return {
        "attack": name,
        "outcomes": dict(outcomes),
        "plans": len(milliseconds),
        "failed": sum(count for status, count in bystander.answers.items() if status != 201),
        "p50": round(statistics.median(milliseconds), 1),
        "p99": round(statistics.quantiles(milliseconds, n=100)[98], 1),
        "max": round(max(milliseconds), 1),
    }


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="bitrank-hostile-") as name, ProcessPoolExecutor(1) as attackers:
        folder, port = Path(name), free_port()
        write_small_model(folder / "model", 3)
        undisturbed(folder / "model", 0, folder / "small")
        with server(folder, port):
            url = f"http://127.0.0.1:{port}"
            model = httpx.get(f"{url}/v1/profiles", trust_env=False).json()["profiles"][0]["model"]
            script = httpx.get(f"{url}{SCRIPT}", trust_env=False)
            events = f"/v1/jobs/{eventful_job(folder / 'data')}/events"
            answers = {
                "unread files": (SCRIPT, len(script.content)),
                "unread events": (events, UNREAD_BYTES),
            }
            attacks = CLIENTS | {kind: (answers[kind], clients) for kind, clients in UNREAD.items()}
            bystander = Bystander(url, model)
            time.sleep(SHORTEST_SECONDS)
            bystander.close()
            print(json.dumps(row("nothing", bystander, Counter())), flush=True)
            for kind, (attack, clients) in attacks.items():
                bystander = Bystander(url, model)
                outcomes = attackers.submit(assail, attack, port, clients).result()
                bystander.close()
                print(json.dumps(row(kind, bystander, outcomes)), flush=True)


if __name__ == "__main__":
    main()
