"""Incoherence: a fixed random rotation of a layer's inputs, under which no column and no head stands out.

What lives here: the rotation of vectors of any size. Decomposing under it is in `decompose.py`, applying it to
activations in `linear.py`.

V = (R ⊕ … ⊕ R)·P for n inputs: P deals them out to m blocks in turn, so that every block has some of every head, and
R = H·diag(s) turns a block, H the orthonormal Hadamard matrix of b numbers, s random signs. b is the largest power of
two that divides n, at most 128 (384 = 3 × 128): one small product serves all blocks, and larger ones gain nothing. The
signs are fixed for ever by SHAKE-256, so they take no bytes.

Letters: n inputs, b numbers of a block, m = n / b blocks, N blocks of all vectors.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import shake_256

import torch
from torch import Tensor

MOST_MIXED = 128
LEAST_MIXED = 8
"""Smaller blocks are not worth a pass over the activations."""


def block_size(size: int) -> int:
    """b; 1 where vectors of `size` are left as they are."""
    block = min(size & -size, MOST_MIXED)
    return block if block >= LEAST_MIXED else 1


def rotated(x: Tensor) -> Tensor:
    """V·x for x (…, n), in its dtype."""
    block = block_size(x.shape[-1])
    if block == 1:
        return x
    x_Nb = x.reshape(-1, block, x.shape[-1] // block).mT.reshape(-1, block)
    return (x_Nb @ rotation(block, x.device, x.dtype).T).view(x.shape)


def restored(x: Tensor) -> Tensor:
    """Vᵀ·x for x (…, n), in its dtype."""
    block = block_size(x.shape[-1])
    if block == 1:
        return x
    x_Nb = x.reshape(-1, block) @ rotation(block, x.device, x.dtype)
    return x_Nb.view(-1, x.shape[-1] // block, block).mT.reshape(x.shape)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def rotation(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """R (b, b)."""
    return _rotation(size, device, dtype)


@lru_cache
def _rotation(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        signs_b = torch.tensor([1.0 - 2 * (byte & 1) for byte in shake_256(b"bitrank").digest(size)])
        h_bb = torch.ones(1, 1)
        while len(h_bb) < size:
            h_bb = torch.cat([torch.cat([h_bb, h_bb], 1), torch.cat([h_bb, -h_bb], 1)])
        return (h_bb * signs_b / size**0.5).to(device, dtype)
