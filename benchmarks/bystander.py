"""An ordinary client that plans all the time, while something else happens to the server."""

from __future__ import annotations

import threading
import time
from collections import Counter
from itertools import count

import httpx


class Bystander:
    """Plans until `close`, every budget another one, in turn over a kept connection and a new one."""

    def __init__(self, url: str, model: str) -> None:
        self._url, self._model = url, model
        self.answers: Counter[int] = Counter()
        self.seconds: list[float] = []
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._plan, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def _plan(self) -> None:
        none_kept = httpx.Limits(max_keepalive_connections=0)
        with (
            httpx.Client(base_url=self._url, timeout=60.0, trust_env=False) as kept,
            httpx.Client(base_url=self._url, timeout=60.0, trust_env=False, limits=none_kept) as new,
        ):
            for number in count():
                if self._closing.is_set() and number > 1:
                    return
                request = {"model": self._model, "budget": f"{3 + number % 1_000 / 1_000}bpw"}
                started = time.perf_counter()
                self.answers[_status(new if number % 2 else kept, request)] += 1
                self.seconds.append(time.perf_counter() - started)
                self._closing.wait(0.01)


def _status(client: httpx.Client, request: dict[str, str]) -> int:
    try:
        return client.post("/v1/plans", json=request).status_code
    except httpx.TransportError:
        return 0
