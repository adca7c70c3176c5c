"""A key-value cache of low rank: chunks of every head on fixed bases, only coefficients stored.

What lives here: a transformers `Cache`. Ranks come from `kvranks.py`, bases from the profiler.

Letters: B sequences, H key-value heads, T tokens, d head size, c chunk size, r rank, R the sum of a layer's ranks.

Keys reach a cache rotated by their position, which spreads a few directions over all. The rotation is orthogonal and
known, so it is undone before a key is projected and done again when it is read. Tokens are taken to stand at positions
0, 1, 2, …: sequences of one batch must be of one length, without padding on the left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from compressor.kvranks import CoefficientBits

Rotary = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Positions int64 (T,) -> cosines and sines (T, rotated numbers of a head)."""
TINY = 1e-30


def rotated(x_BHTd: Tensor, cosine_Tn: Tensor, sine_Tn: Tensor) -> Tensor:
    """The first n numbers of every head turned as `apply_rotary_pos_emb` does, the halves being the two coordinates."""
    n = cosine_Tn.shape[-1]
    turning, rest = x_BHTd[..., :n], x_BHTd[..., n:]
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cosine_Tn + torch.cat([-second, first], dim=-1) * sine_Tn
    return torch.cat([turned, rest], dim=-1)


def unrotated(x_BHTd: Tensor, cosine_Tn: Tensor, sine_Tn: Tensor) -> Tensor:
    """The inverse of `rotated`; some models scale their cosines and sines."""
    square_Tn = cosine_Tn.square() + sine_Tn.square()
    return rotated(x_BHTd, cosine_Tn / square_Tn, -sine_Tn / square_Tn)


@dataclass(frozen=True, slots=True)
class Bases:
    """Orthonormal bases (c, r) of one layer's keys or values, head by head, chunk by chunk."""

    blocks: tuple[Tensor, ...]
    heads: int

    @property
    def ranks(self) -> list[int]:
        return [block_cr.shape[1] for block_cr in self.blocks]

    def encode(self, x_BHTd: Tensor) -> Tensor:
        """Coefficients (B, T, R)."""
        chunks = x_BHTd.transpose(1, 2).flatten(2).split(len(self.blocks[0]), dim=-1)
        return torch.cat(
            [x_BTc @ block_cr for x_BTc, block_cr in zip(chunks, self.blocks, strict=True)], dim=-1
        )

    def decode(self, coefficient_BTR: Tensor) -> Tensor:
        """(B, H, T, d)."""
        parts = coefficient_BTR.split(self.ranks, dim=-1)
        x_BTn = torch.cat(
            [a_BTr @ block_cr.T for a_BTr, block_cr in zip(parts, self.blocks, strict=True)], dim=-1
        )
        return x_BTn.unflatten(2, (self.heads, -1)).transpose(1, 2)


class Coefficients:
    """Coefficients (B, T, R) that grow with T, stored as they are."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self.stored: tuple[Tensor, ...] = ()

    def append(self, new_BTR: Tensor) -> None:
        self._grow(new_BTR)

    def read(self) -> Tensor:
        return self.stored[0]

    def _grow(self, *new: Tensor) -> None:
        old = self.stored or tuple(part[:, :0] for part in new)
        self.stored = tuple(torch.cat(pair, dim=1) for pair in zip(old, new, strict=True))


class RoundedCoefficients(Coefficients):
    """Coefficients in 8 or 4 bits: symmetric codes, one bfloat16 scale for each token and chunk."""

    def __init__(self, ranks: Sequence[int], bits: int) -> None:
        super().__init__(ranks)
        self.ranks, self.bits, self.largest = [rank for rank in ranks if rank], bits, 2 ** (bits - 1) - 1

    def append(self, new_BTR: Tensor) -> None:
        parts = new_BTR.split(self.ranks, dim=-1)
        scale_BTC = torch.stack([part.abs().amax(-1) for part in parts], dim=-1) / self.largest
        scale_BTC = scale_BTC.clamp(min=TINY).bfloat16()
        code_BTR = new_BTR / self._spread(scale_BTC, new_BTR.dtype)
        code_BTR = code_BTR.round().clamp(-self.largest - 1, self.largest).to(torch.int8)
        self.dtype, self.width = new_BTR.dtype, new_BTR.shape[-1]
        self._grow(code_BTR if self.bits == 8 else self._packed(code_BTR), scale_BTC)

    def read(self) -> Tensor:
        code, scale_BTC = self.stored
        code_BTR = code if self.bits == 8 else self._unpacked(code)
        return code_BTR.to(self.dtype) * self._spread(scale_BTC, self.dtype)

    def _spread(self, scale_BTC: Tensor, dtype: torch.dtype) -> Tensor:
        return scale_BTC.to(dtype).repeat_interleave(
            torch.tensor(self.ranks, device=scale_BTC.device), dim=-1
        )

    def _packed(self, code_BTR: Tensor) -> Tensor:
        code = torch.nn.functional.pad(code_BTR.to(torch.int16) + 8, (0, code_BTR.shape[-1] % 2))
        return (code[..., 0::2] | code[..., 1::2] << 4).to(torch.uint8)

    def _unpacked(self, packed: Tensor) -> Tensor:
        code = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
        return code[..., : self.width].to(torch.int8) - 8


class LowRankLayer(CacheLayerMixin):
    """One layer's cache: keys and values as coefficients."""

    def __init__(self, keys: Bases, values: Bases, rotary: Rotary | None, bits: CoefficientBits = 16) -> None:
        super().__init__()
        self.bases, self.rotary, self.bits = (keys, values), rotary, bits
        self.reset()

    def reset(self) -> None:
        self.tokens = 0
        self.coefficients = tuple(
            Coefficients(b.ranks) if self.bits == 16 else RoundedCoefficients(b.ranks, self.bits)
            for b in self.bases
        )

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *arguments: Any, **keywords: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new tokens (B, H, T, d); keys and values of all tokens so far, as far as the ranks hold them."""
        total = self.tokens + key_states.shape[2]
        if self.rotary is not None:
            angles = self.rotary(torch.arange(total, device=key_states.device))
            key_states = unrotated(
                key_states, *(angle_Tn[self.tokens :].to(key_states) for angle_Tn in angles)
            )
        read = []
        for bases, stored, x_BHTd in zip(
            self.bases, self.coefficients, (key_states, value_states), strict=True
        ):
            stored.append(bases.encode(x_BHTd))
            read.append(bases.decode(stored.read()))
        if self.rotary is not None:
            read[0] = rotated(read[0], *(angle_Tn.to(key_states) for angle_Tn in angles))
        self.tokens = total
        return read[0], read[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.tokens + query_length, 0

    def get_seq_length(self) -> int:
        return self.tokens

    def get_max_length(self) -> int:
        return -1

    def held_bytes(self) -> int:
        held = [block for bases in self.bases for block in bases.blocks]
        held += [part for coefficients in self.coefficients for part in coefficients.stored]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)


class LowRankCache(Cache):
    """Give it to a model as `past_key_values`."""

    def __init__(self, layers: Sequence[LowRankLayer]) -> None:
        super().__init__(layers=list(layers))

    def held_bytes(self) -> int:
        """Bytes of all bases and coefficients."""
        return sum(layer.held_bytes() for layer in self.layers)
