"""Stopping a computation within a second of its job's end, wherever in its Python code it is.

What lives here: a thread that looks up whether the jobs being computed were cancelled or failed, and raises
`Interrupted` inside the computing thread if so. Files are written whole or not at all, so a computation may stop
anywhere.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sqlalchemy.exc import SQLAlchemyError

LOOK_SECONDS = 0.5


class Interrupted(BaseException):
    """The job is over. No `Exception`, so that nothing in a computation takes it for its own."""


class Interruptions:
    """The computations of this process that can be interrupted."""

    def __init__(self, is_over: Callable[[str], bool]) -> None:
        self._is_over = is_over
        self._lock = threading.Lock()
        self._computing: dict[int, str] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._look, name="interruptions", daemon=True)
        self._thread.start()

    @contextmanager
    def watching(self, job_id: str) -> Iterator[None]:
        """While open, this thread is interrupted if the job is over; never after."""
        thread = threading.get_ident()
        with self._lock:
            self._computing[thread] = job_id
        try:
            yield
        finally:
            with self._lock:
                self._computing.pop(thread, None)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), None)

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._closing.wait(LOOK_SECONDS):
            with self._lock:
                jobs = set(self._computing.values())
            try:
                over = {job_id for job_id in jobs if self._is_over(job_id)}
            except SQLAlchemyError:
                continue
            with self._lock:
                for thread in [t for t, job_id in self._computing.items() if job_id in over]:
                    del self._computing[thread]
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(
                        ctypes.c_ulong(thread), ctypes.py_object(Interrupted)
                    )
