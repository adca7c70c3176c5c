"""A real server process on a free loopback port, and a client of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx

COMMANDS = "from api.main import main; main()"
START_SECONDS = 60


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-P", "-c", COMMANDS, *map(str, arguments)]


def environment(data_dir: Path, **variables: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("BITRANK_")}
    return {**clean, "BITRANK_DATA_DIR": str(data_dir), "OMP_NUM_THREADS": "1", **variables}


class ServiceProcess:
    """`bitrank serve --workers 0` until `stop`; `client` talks to it, `log` is its standard error so far."""

    def __init__(
        self, data_dir: Path, *arguments: str | Path, host: str = "127.0.0.1", **variables: str
    ) -> None:
        self.data_dir = data_dir
        data_dir.mkdir(parents=True, exist_ok=True)
        self._log = data_dir / "server.log"
        self._process = subprocess.Popen(
            command("serve", "--host", host, "--port", "0", "--workers", "0", *arguments),
            stderr=self._log.open("wb"),
            env=environment(data_dir, **variables),
        )
        self.port = self._await_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = httpx.Client(base_url=self.url, timeout=30, trust_env=False)

    def _await_port(self) -> int:
        import time

        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            for line in self.log.splitlines():
                if '"serving"' in line:
                    return int(json.loads(line)["address"].rpartition(":")[2])
            time.sleep(0.1)
        raise AssertionError(f"the server did not start: {self.log}")

    @property
    def log(self) -> str:
        return self._log.read_text()

    def kill(self) -> None:
        self.client.close()
        self._process.kill()
        self._process.wait()

    def stop(self) -> int:
        self.client.close()
        self._process.terminate()
        return self._process.wait(20)
