"""Files written in their order by a thread of its own, so that a disk that flushes holds up no device.

What lives here: the thread. What is written, and that it is written atomically, is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import BoundedSemaphore
from types import TracebackType

import torch

WAITING = 8
"""Tasks that may wait; what they hold stays in memory."""


class Writer:
    """Runs tasks one after the other; after one that fails, none, so that no file appears without those before it.

    Leaving waits for the tasks and raises what one of them raised; leaving by an exception drops those not begun.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer")
        self._room = BoundedSemaphore(WAITING)
        self._error: BaseException | None = None
        self._stream: torch.cuda.Stream | None = None

    def submit(self, task: Callable[[], object]) -> None:
        """Raises what an earlier task raised.

        What a task asks of a card runs beside what is asked of it from now on.
        """
        self._room.acquire()
        if self._error is not None:
            raise self._error
        self._pool.submit(self._run, task, _present())

    def _run(self, task: Callable[[], object], present: torch.cuda.Event | None) -> None:
        try:
            if self._error is None:
                with self._beside(present):
                    task()
        except BaseException as error:
            self._error = error
        finally:
            self._room.release()

    @contextmanager
    def _beside(self, present: torch.cuda.Event | None) -> Iterator[None]:
        """While open, what this thread asks of the card follows on what is present and nothing else."""
        if present is None:
            yield
            return
        self._stream = self._stream or torch.cuda.Stream(present.device)
        self._stream.wait_event(present)
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=error is not None)
        if error is None and self._error is not None:
            raise self._error


def _present() -> torch.cuda.Event | None:
    """What the card has been asked for until now."""
    return torch.cuda.current_stream().record_event() if torch.cuda.is_initialized() else None
