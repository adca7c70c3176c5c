"""HiGHS's manners: what a caller of `scipy.optimize.milp` must do so that stdout stays the program's own."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_STDOUT = threading.Lock()


@contextmanager
def quiet_stdout() -> Iterator[None]:
    """HiGHS prints on stdout even with its log off, where callers print JSON: send that to stderr.

    One thread at a time, since the descriptor is the process's.
    """
    with _STDOUT:
        sys.stdout.flush()
        kept = os.dup(1)
        os.dup2(2, 1)
        try:
            yield
        finally:
            os.dup2(kept, 1)
            os.close(kept)
