"""Processes that sweep blocks of a run beside this one.

What lives here: the processes, and how blocks are given out. On a GPU, a layer of a small model takes some 10,000
kernels of a few microseconds; one process cannot launch them as fast as they run, and threads of one process wait for
each other. Several processes, which share the run's folder as workers on several machines do, keep the GPU busy.

A process reads block numbers from its standard input and answers each with a line. It ends when its input closes, so
that none outlives the process that started it. A block whose process failed is swept here, where its error is raised.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread

from pydantic import TypeAdapter

from compressor.streams import SMALL_MATRIX
from profiler.calibration import Progress, silent
from profiler.checkpoint import ModelRef
from profiler.run import ProfileRun, ProfileSettings, open_run, sweep_block, sweep_blocks

BESIDE = 3


def processes_for(run: ProfileRun) -> int:
    """Processes that pay beside this one."""
    small = max((layer.weights for layer in run.loaded.layers), default=0) <= SMALL_MATRIX
    return BESIDE if run.loaded.device.type == "cuda" and small and run.block_count > BESIDE else 0


@contextmanager
def started(run: ProfileRun, count: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that open the run now and sweep what they are told; they end on leaving."""
    request = json.dumps(
        {
            "ref": TypeAdapter(ModelRef).dump_python(run.loaded.ref, mode="json"),
            "output": str(run.output.resolve()),
            "settings": TypeAdapter(ProfileSettings).dump_python(run.settings, mode="json"),
        }
    )
    command = [sys.executable, "-P", "-m", "profiler.sweepers", request]
    processes = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        for _ in range(count)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def sweep_beside(run: ProfileRun, processes: Sequence[subprocess.Popen[str]], progress: Progress) -> None:
    """Sweep every block of a begun run, here and in the processes, whoever is free taking the next."""
    left: SimpleQueue[int] = SimpleQueue()
    for index in range(run.block_count):
        left.put(index)
    threads = [Thread(target=_feed, args=(process, left), daemon=True) for process in processes]
    for thread in threads:
        thread.start()
    while (index := _next(left)) is not None:
        sweep_block(run, index, progress)
    for thread in threads:
        while thread.is_alive():
            thread.join(timeout=1)
            run.report_sweep(progress)
    # What a process that failed has left: its error, if it is one of the model's, is raised here.
    left_over = [k for k in range(run.block_count) if not run.is_swept(run.loaded.layers_of(k))]
    sweep_blocks(run, left_over, progress)


def _feed(process: subprocess.Popen[str], left: SimpleQueue[int]) -> None:
    """Give one process blocks until none is left or it fails."""
    assert process.stdin is not None and process.stdout is not None
    try:
        if process.stdout.readline().strip() != "ready":
            return
        while (index := _next(left)) is not None:
            process.stdin.write(f"{index}\n")
            process.stdin.flush()
            if process.stdout.readline().strip() != str(index):
                return
    except (OSError, ValueError):  # it was terminated, or its pipes are closed
        return


def _next(left: SimpleQueue[int]) -> int | None:
    try:
        return left.get_nowait()
    except Empty:
        return None


def main(request: str) -> None:
    """Sweep the blocks whose numbers stand in standard input, a line each."""
    asked = json.loads(request)
    run = open_run(
        TypeAdapter(ModelRef).validate_python(asked["ref"]),
        Path(asked["output"]),
        TypeAdapter(ProfileSettings).validate_python(asked["settings"]),
    )
    print("ready", flush=True)
    for line in sys.stdin:
        sweep_block(run, int(line), silent)
        print(int(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
