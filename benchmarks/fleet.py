"""The processes of one installation, servers and workers, that can be killed and are started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from api.jobs.client import settings_environment
from api.settings import Settings
from benchmarks.cluster import free_port

DEAD_AFTER_SECONDS = 3.0
Process = subprocess.Popen[bytes]
Environment = Mapping[str, str]
Start = tuple[list[str], Environment]


class Fleet:
    """Running processes. What they write to standard error goes to `log`, where given."""

    def __init__(self, settings: Settings, log: Path | None = None) -> None:
        self._environment = os.environ | settings_environment(settings) | {"OMP_NUM_THREADS": "1"}
        self._log = log
        self._started: dict[Process, Start] = {}
        self.urls: list[str] = []
        self.ended_by_themselves = 0

    @property
    def processes(self) -> list[Process]:
        return list(self._started)

    def start(self, environment: Environment = MappingProxyType({})) -> Process:
        """Another worker."""
        return self._start((["worker", "--dead-after", str(DEAD_AFTER_SECONDS)], environment))

    def start_server(self, environment: Environment = MappingProxyType({})) -> Process:
        """Another server without workers of its own; `urls` has its address."""
        port = free_port()
        self.urls.append(f"http://127.0.0.1:{port}")
        return self._start((["serve", "--port", str(port), "--workers", "0"], environment))

    def is_server(self, process: Process) -> bool:
        return self._started[process][0][0] == "serve"

    def kill(self, process: Process, how: signal.Signals = signal.SIGKILL) -> None:
        process.send_signal(how)
        process.wait()
        del self._started[process]

    def restart(self, process: Process) -> None:
        """Kill a process and start it again as it was started."""
        start = self._started[process]
        self.kill(process)
        self._start(start)

    def revive(self) -> None:
        """Start processes that ended by themselves again, as a supervisor would."""
        for process in [process for process in self._started if process.poll() is not None]:
            self._start(self._started.pop(process))
            self.ended_by_themselves += 1

    def end(self) -> None:
        for process in self.processes:
            self.kill(process)

    def _start(self, start: Start) -> Process:
        arguments, environment = start
        with (self._log or Path(os.devnull)).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "api.main", *arguments],
                env=self._environment | dict(environment),
                stderr=log,
            )
        self._started[process] = start
        return process
