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
    """b of vectors of `size`."""
    return min(size & -size, MOST_MIXED)


def is_mixing(size: int) -> bool:
    """Whether rotating vectors of `size` can be worth it."""
    return block_size(size) >= LEAST_MIXED


@lru_cache
def rotation(size: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """R (b, b) of vectors of `size`."""
    block = block_size(size)
    with torch.inference_mode(False):
        signs_b = torch.tensor([1.0 - 2 * (byte & 1) for byte in shake_256(b"bitrank").digest(block)])
        h_bb = torch.ones(1, 1)
        while len(h_bb) < block:
            h_bb = torch.cat([torch.cat([h_bb, h_bb], 1), torch.cat([h_bb, -h_bb], 1)])
        rotation_bb: Tensor = h_bb * signs_b / block**0.5
        return rotation_bb.to(device, dtype)


def rotated(x: Tensor, rotation_bb: Tensor) -> Tensor:
    """V·x for x (…, n)."""
    block = len(rotation_bb)
    x_Nb = x.reshape(-1, block, x.shape[-1] // block).mT.reshape(-1, block)
    return (x_Nb @ rotation_bb.T).view(x.shape)


def restored(x: Tensor, rotation_bb: Tensor) -> Tensor:
    """Vᵀ·x for x (…, n)."""
    block = len(rotation_bb)
    x_Nb = x.reshape(-1, block) @ rotation_bb
    return x_Nb.view(-1, x.shape[-1] // block, block).mT.reshape(x.shape)


def turned(w_OI: Tensor) -> Tensor:
    """W Vᵀ: what W is to rotated inputs."""
    return rotated(w_OI, rotation(w_OI.shape[1], w_OI.device))
