"""What the process gives back: the C library's allocator, told to return freed tensors to the system at once."""

from __future__ import annotations

import ctypes
import sys

M_MMAP_THRESHOLD = -3
THRESHOLD_BYTES = 512 * 1024


def return_freed_memory() -> None:
    """Give every freed block above `THRESHOLD_BYTES` back to the system; where there is no glibc, do nothing.

    By default glibc raises that threshold up to 32 MiB as large blocks are freed, and keeps what lies below it: after
    some thousand tensors of changing sizes a profile held twice the memory it used. It costs page faults.
    """
    _call("mallopt", M_MMAP_THRESHOLD, THRESHOLD_BYTES)


def return_fragments() -> None:
    """Give back what lies freed between small blocks; a stage on many threads leaves some in each one's heap."""
    _call("malloc_trim", 0)


def _call(name: str, *arguments: int) -> None:
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*arguments)
