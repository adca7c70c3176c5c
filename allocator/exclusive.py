"""One process at a time in an output directory.

What lives here: the lock. It is advisory, and the system gives it back when its process ends, however it ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path

from allocator.errors import BitrankError

LOCK = ".lock"


class InUseError(BitrankError):
    """Another process writes this directory."""


@contextmanager
def alone(output: Path) -> Iterator[None]:
    """Hold `output`, made if need be, while open; left empty, it is removed again.

    Raises `InUseError` while another process holds it.
    """
    output.mkdir(parents=True, exist_ok=True)
    with (output / LOCK).open("a") as file:
        try:
            flock(file, LOCK_EX | LOCK_NB)
        except BlockingIOError as error:
            raise InUseError(
                f"another process is writing {output}; wait for it, or choose another directory"
            ) from error
        try:
            yield
        finally:
            (output / LOCK).unlink(missing_ok=True)
            with suppress(OSError):
                output.rmdir()
