"""Work on a GPU from two threads, so that it does not rest while one of them asks what it has found.

What lives here: the threads and their streams. What they work on must not depend on each other, nor change what all
threads share (`precision.tensor_cores`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from queue import SimpleQueue
from typing import TypeVar

import torch

AT_ONCE = 2
SMALL_MATRIX = 4_000_000
"""Weights up to which kernels are so short that one thread cannot launch them as fast as they run: a second thread,
which waits for the first at every launch, makes that slower still."""
Found = TypeVar("Found")


def at_once(device: torch.device) -> int:
    """Tasks that `side_by_side` runs at once, which share the memory."""
    return AT_ONCE if device.type == "cuda" else 1


def side_by_side(device: torch.device, tasks: Sequence[Callable[[], Found]], weights: int) -> Iterator[Found]:
    """What tasks find, as it is found; one after the other on a CPU, whose products use all cores anyway, and where
    the largest matrix, of so many weights, is small.

    Each sees what the GPU was asked for until now. Raises what a task raises, when those that have begun are done.
    """
    if at_once(device) == 1 or weights <= SMALL_MATRIX:
        yield from (task() for task in tasks)
        return
    streams: SimpleQueue[torch.cuda.Stream] = SimpleQueue()
    for stream in _streams(device):
        streams.put(stream)
    present = torch.cuda.current_stream(device).record_event()

    def run(task: Callable[[], Found]) -> Found:
        stream = streams.get()
        try:
            with torch.cuda.stream(stream):
                stream.wait_event(present)
                found = task()
                stream.synchronize()
            return found
        finally:
            streams.put(stream)

    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="stream") as pool:
        try:
            yield from (done.result() for done in as_completed([pool.submit(run, task) for task in tasks]))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, ...]:
    """Always the same, since memory freed in one is kept for it."""
    return tuple(torch.cuda.Stream(device) for _ in range(AT_ONCE))
