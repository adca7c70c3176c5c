"""Kernels in CUDA C: compiled by torch when they are first needed, and launched in microseconds.

What lives here: compiling and launching. What kernels do is said in the `.cu` files, what they are given in the modules
beside those. torch's way of compiling is not yet public; where it fails, plain torch does the work, after a warning.
Its way of launching looks for the driver anew at every launch, so launching is ours.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import addressof, c_int, c_void_p
from threading import Lock
from typing import Any

import torch
from torch import Tensor

compiling = Lock()
"""Held by who compiles, so that nobody compiles the same at the same time."""


class Kernel:
    """A compiled kernel that may have so much shared memory."""

    def __init__(self, compiled: Any, shared_bytes: int) -> None:
        self.function, self.shared_bytes = compiled.func, shared_bytes
        self.launch = torch.cuda._utils._get_gpu_runtime_library().cuLaunchKernel

    def prepared(
        self, grid: tuple[int, int], threads: int, arguments: Sequence[Tensor | int], later: int = 0
    ) -> Launch:
        """A launch with these arguments, the first of which is a tensor, and so many numbers that it is given later."""
        return Launch(self, grid, threads, arguments, later)


class Launch:
    """Of a kernel, on its first argument's card, in the stream that is present when it is called."""

    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, int],
        threads: int,
        arguments: Sequence[Tensor | int],
        later: int,
    ) -> None:
        first = arguments[0]
        assert isinstance(first, Tensor)
        self._launch, self._first, self._arguments = kernel.launch, first, arguments
        self._values = [c_void_p(a.data_ptr()) if isinstance(a, Tensor) else c_int(a) for a in arguments]
        self._later = [c_int() for _ in range(later)]
        places = [*map(addressof, self._values), *map(addressof, self._later)]
        self._places = (c_void_p * len(places))(*places)
        self._fixed = kernel.function, *grid, 1, threads, 1, 1, kernel.shared_bytes

    def __call__(self, *numbers: int) -> None:
        """Raises `RuntimeError` where the driver does."""
        for later, number in zip(self._later, numbers, strict=True):
            later.value = number
        with torch.cuda.device_of(self._first):
            stream = c_void_p(torch.cuda.current_stream(self._first.device).cuda_stream)
            failed = self._launch(*self._fixed, stream, self._places, None)
        if failed:
            raise RuntimeError(f"a CUDA kernel could not be launched (error {failed})")


def compiled(
    sources: Mapping[str, str], shared_bytes: Mapping[str, int], index: int, what: str
) -> dict[str, Kernel]:
    """Kernels by their names for a card; none, and a warning of `what` is slow then, where torch or it is too old."""
    if torch.version.hip is not None:
        return {}

    def compile(name: str) -> Kernel:
        with torch.cuda.device(index):
            torch.cuda.synchronize()  # a new thread has no context before its first call
            kernel: Any = torch.cuda._compile_kernel(sources[name], name)
            kernel.set_shared_memory_config(shared_bytes[name])
        return Kernel(kernel, shared_bytes[name])

    try:
        with ThreadPoolExecutor(len(sources)) as pool:
            return dict(zip(sources, pool.map(compile, sources), strict=True))
    except (AttributeError, OSError, RuntimeError) as error:
        warnings.warn(f"{what} without CUDA kernels, which is slow: {error}", stacklevel=3)
        return {}
