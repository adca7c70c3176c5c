"""What a card takes seconds for when it is first asked: compiling kernels, loading libraries. It is asked before.

What lives here: a small decomposition that nobody reads, in a thread of its own.
"""

from __future__ import annotations

from functools import cache
from threading import Thread

import torch

from allocator.storage import Option

ROWS, COLUMNS = 96, 256
OPTIONS = Option(2, 0, 64, 0), Option(2, 8, 64, 4), Option(8, 16, 64, 4), Option(0, 8, 0, 4)


@cache
def warm_up(device: torch.device) -> None:
    """Begin now, once for a card; on a CPU there is nothing to do. A process that ends waits for it."""
    if device.type == "cuda":
        Thread(target=_decompose, args=(device,), name="warming").start()


def _decompose(device: torch.device) -> None:
    from compressor.lowrank.decompose import decompose
    from compressor.lowrank.hessian import Curvature

    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        generator = torch.Generator(device).manual_seed(0)
        w_OI, x_nI = (
            torch.randn(n, COLUMNS, device=device, generator=generator) for n in (ROWS, 2 * COLUMNS)
        )
        for _, found in decompose([w_OI] * len(OPTIONS), Curvature.of(x_nI.T @ x_nI), OPTIONS):
            found.dense()
