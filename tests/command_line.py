"""`bitrank …` in a process of its own, started fast: forked from a server that has imported torch already.

Exit codes, signals, file descriptors and limits are those of a real process; only the import time is saved.
"""

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.forkserver import ensure_running
from pathlib import Path

import pytest

PRELOAD = (
    "api.services.usecases",
    "profiler.sweep.run",
    "compressor.checkpoint_writer",
    "compressor.quantize.gptq_numba",
    "pyarrow.parquet",
    "pandas",
)
"""What commands import, pandas because pyarrow does where it is installed."""
PATIENCE_SECONDS = 120


@dataclass(frozen=True)
class Outcome:
    """What a finished command left: its exit code (negative: the signal that ended it) and what it wrote."""

    code: int
    stdout: str
    stderr: str

    @property
    def complaint(self) -> str:
        """The one line that says what went wrong; progress may stand above it, nothing else."""
        lines = [line for line in self.stderr.splitlines() if line.startswith("bitrank: ")]
        assert len(lines) == 1, self.stderr
        assert self.stderr.splitlines()[-1] == lines[0], self.stderr
        assert "Traceback" not in self.stderr, self.stderr
        return lines[0].removeprefix("bitrank: ")


class Command:
    """A `bitrank` command that runs."""

    def __init__(self, process: ForkServerProcess, output: Path) -> None:
        self._process, self._output = process, output

    def wait(self) -> Outcome:
        self._process.join(PATIENCE_SECONDS)
        code = self._process.exitcode
        if code is None:
            self._process.kill()
            raise TimeoutError(self._read("stderr"))
        return Outcome(code, self._read("stdout"), self._read("stderr"))

    def send(self, number: signal.Signals, when: Callable[[], bool]) -> Outcome:
        """Signal the process as soon as `when` holds, and wait for its end."""
        while not when() and self._process.is_alive():
            time.sleep(0.002)
        assert self._process.pid is not None
        os.kill(self._process.pid, number)
        return self.wait()

    def _read(self, stream: str) -> str:
        return (self._output / stream).read_text(encoding="utf-8")


class CommandLine:
    """Starts commands in one folder, which also holds bitrank's memory of finished profiles."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._count = 0

    def start(self, *arguments: str | Path, file_bytes: int | None = None) -> Command:
        """`bitrank ARGUMENTS…`, with files limited to `file_bytes` as on a disk that fills up."""
        self._count += 1
        output = self.folder / ".streams" / str(self._count)
        output.mkdir(parents=True)
        process = server().Process(
            target=_run, args=(self.folder, output, [str(a) for a in arguments], file_bytes), daemon=True
        )
        process.start()
        return Command(process, output)

    def __call__(self, *arguments: str | Path, file_bytes: int | None = None) -> Outcome:
        return self.start(*arguments, file_bytes=file_bytes).wait()


def server() -> ForkServerContext:
    """The fork server, started on first use with one thread and no network."""
    context = get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "1")
        environment.setenv("HF_HUB_OFFLINE", "1")
        ensure_running()
    return context


def _run(folder: Path, output: Path, arguments: list[str], file_bytes: int | None) -> None:
    from api.main import main

    for number, stream in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(output / stream, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(folder)
    os.environ["BITRANK_HOME"] = str(folder / ".bitrank")
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))
    sys.argv = ["bitrank", *arguments]
    main()
