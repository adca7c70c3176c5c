"""Files that are whole or absent: written under a temporary name, fsynced, renamed."""

from __future__ import annotations

import os
from pathlib import Path

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
