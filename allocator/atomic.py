"""Files that are whole or absent, and directories that one process at a time writes.

A file is written under a temporary name, fsynced and renamed. Locks are advisory, and the system gives
them back when their process ends, however it ends.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path

from allocator.errors import BitrankError

TEMPORARY = ".tmp"


def write_atomically(path: Path, data: bytes, durable: bool = True) -> None:
    """Put `data` at `path`. On failure nothing is left behind and whatever was there before stays.

    durable: whether it is to outlive a power failure; a killed process leaves whole files either way.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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
        if not locked(file.fileno()) or os.fstat(file.fileno()).st_nlink == 0:  # let go of by removing it
            raise InUseError(f"another process is writing {output}; wait for it, or choose another directory")
        try:
            yield
        finally:
            (output / LOCK).unlink(missing_ok=True)
            with suppress(OSError):
                output.rmdir()


def locked(descriptor: int) -> bool:
    """Whether this process holds the lock of an open file now; it does not wait."""
    try:
        flock(descriptor, LOCK_EX | LOCK_NB)
    except BlockingIOError:
        return False
    return True
