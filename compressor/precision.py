"""Where a product of float32 matrices on CUDA may round its factors to TF32 (10 bits), several times as fast.

What lives here: the switch. It is for the errors that are measured, the subspaces that are sought, the activations of
which second moments are taken, and the errors that GPTQ spreads: 2⁻¹¹ of a term changes none of them (of GPTQ's output
error at most 0.04 %, either way, at any width: `docs/gpu.md`). Factors, factorizations and gradients stay in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def tensor_cores() -> Iterator[None]:
    """While open, products on CUDA use TF32; elsewhere nothing changes."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
