"""What the next block needs, brought to the card by a thread while the present one is measured.

What lives here: the thread. What is read and where it is held until a block is done are `Offload`'s and `BlockInputs`'.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType

import torch
from torch import Tensor

from profiler.model.layers import LoadedModel
from profiler.statistics.moments import BlockInputs

Brought = tuple[dict[str, Tensor], Tensor]


class Ahead:
    """Brings one block at a time. On a CPU, where that would only double the memory, it does nothing."""

    def __init__(self, loaded: LoadedModel, inputs: Sequence[BlockInputs]) -> None:
        self._loaded, self._inputs = loaded, inputs
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ahead")
        self._coming: dict[int, Future[Brought]] = {}
        self._serves = loaded.device.type == "cuda" and loaded.offload is not None
        self._stream = torch.cuda.Stream(loaded.device) if self._serves else None

    def bring(self, index: int) -> None:
        """Begin to read a block's weights and inputs; memory that the card frees until now may be taken for them."""
        if self._stream is not None:
            present = torch.cuda.current_stream(self._loaded.device).record_event()
            self._coming[index] = self._pool.submit(self._read, index, self._stream, present)

    @contextmanager
    def held(self, index: int) -> Iterator[None]:
        """While open, what was brought of a block is used. Raises what reading it raised."""
        if index not in self._coming:
            yield
            return
        offload, inputs = self._loaded.offload, self._inputs[index]
        assert offload is not None
        offload.held, inputs.held = self._coming.pop(index).result()
        try:
            yield
        finally:
            offload.held, inputs.held = {}, None

    def _read(self, index: int, stream: torch.cuda.Stream, present: torch.cuda.Event) -> Brought:
        assert self._loaded.offload is not None
        with torch.cuda.stream(stream), torch.inference_mode(False):
            stream.wait_event(present)
            weights = self._loaded.offload.brought(self._loaded.block_names[index])
            hidden_NTd = self._inputs[index].brought(self._loaded.device)
            stream.synchronize()
        return weights, hidden_NTd

    def __enter__(self) -> Ahead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
