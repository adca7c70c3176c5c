"""Memory not held for nothing: the C library's allocator is to return what was freed, CUDA's to leave no holes."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress

import torch

M_MMAP_THRESHOLD = -3
THRESHOLD_BYTES = 512 * 1024


def return_freed_memory() -> None:
    """Give every freed block above `THRESHOLD_BYTES` back to the system; where there is no glibc, do nothing.

    By default glibc raises that threshold up to 32 MiB as large blocks are freed, and keeps what lies below it: after
    some thousand tensors of changing sizes a profile held twice the memory it used. It costs page faults.
    """
    _call("mallopt", M_MMAP_THRESHOLD, THRESHOLD_BYTES)


def leave_no_holes() -> None:
    """Have memory on cards grow by pages, unless the environment says how it is to grow.

    A sweep holds batches of many sizes after each other. In segments of fixed size they leave holes that no later one
    fits into: after three blocks of an 8B model 78 GiB were taken where 43 were needed.
    """
    if {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        return
    with suppress(AttributeError, RuntimeError):  # not public yet
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def return_fragments() -> None:
    """Give back what lies freed between small blocks; a stage on many threads leaves some in each one's heap."""
    _call("malloc_trim", 0)


def _call(name: str, *arguments: int) -> None:
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*arguments)
