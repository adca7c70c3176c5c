"""Someone who looks at a job all the time, through whichever server answers."""

from __future__ import annotations

import threading
import time
from collections import Counter

import httpx

PAUSE_SECONDS = 0.05


class Reader:
    """Reads until `close`. `answers` counts statuses, 0 for a connection that failed."""

    def __init__(self, urls: list[str], job_id: str) -> None:
        self._addresses = [f"{url}/v1/jobs/{job_id}" for url in urls]
        self.answers: Counter[int] = Counter()
        self.longest_silence_seconds = 0.0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    @property
    def wrong_answers(self) -> int:
        """Answers that are neither the job nor "not now"."""
        return sum(count for status, count in self.answers.items() if status not in (0, 200, 503))

    def _read(self) -> None:
        heard = time.monotonic()
        with httpx.Client(timeout=10.0, trust_env=False) as client:
            while not self._closing.wait(PAUSE_SECONDS):
                for address in self._addresses:
                    status = _status(client, address)
                    self.answers[status] += 1
                    if status == 200:
                        moment = time.monotonic()
                        silence, heard = moment - heard, moment
                        self.longest_silence_seconds = max(self.longest_silence_seconds, silence)


def _status(client: httpx.Client, address: str) -> int:
    try:
        return client.get(address).status_code
    except httpx.TransportError:
        return 0
