"""A key-value cache of low rank: chunks of every head on fixed bases, only coefficients stored.

What lives here: a transformers `Cache`. Ranks come from `ranks.py`, bases from the profiler; all of a cache but its
contents, and its file, is in `layout.py`.

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

Rotary = Callable[[int], tuple[Tensor, Tensor]]
"""T -> cosines and sines (T, n) of the positions before it, n the numbers of a head that are rotated."""
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
        pairs = zip(chunks, self.blocks, strict=True)
        return torch.cat([x_BTc @ block_cr.to(x_BTc) for x_BTc, block_cr in pairs], dim=-1)

    def decode(self, coefficient_BTR: Tensor) -> Tensor:
        """(B, H, T, d)."""
        parts = coefficient_BTR.split(self.ranks, dim=-1)
        pairs = zip(parts, self.blocks, strict=True)
        x_BTn = torch.cat([a_BTr @ block_cr.T.to(a_BTr) for a_BTr, block_cr in pairs], dim=-1)
        x_BTHd: Tensor = x_BTn.unflatten(2, (self.heads, -1))
        return x_BTHd.transpose(1, 2)


Stored = tuple[Tensor, ...]
"""What coefficients are kept as; all (B, T, …)."""


@dataclass(frozen=True, slots=True)
class Unrounded:
    """Coefficients as they are, in one dtype."""

    dtype: torch.dtype

    def encode(self, coefficient_BTR: Tensor) -> Stored:
        return (coefficient_BTR.to(self.dtype),)

    def decode(self, stored: Stored, dtype: torch.dtype) -> Tensor:
        return stored[0].to(dtype)


@dataclass(frozen=True, slots=True)
class Rounded:
    """Symmetric codes of 8 or 4 bits, those of 4 two to a byte; one bfloat16 scale for each token and chunk."""

    ranks: tuple[int, ...]
    bits: int

    def encode(self, coefficient_BTR: Tensor) -> Stored:
        largest = 2 ** (self.bits - 1) - 1
        nothing_BT0 = coefficient_BTR[..., :0]
        tops = [part.abs().amax(-1, keepdim=True) for part in coefficient_BTR.split(self.ranks, dim=-1)]
        scale_BTC = (torch.cat([nothing_BT0, *tops], dim=-1) / largest).clamp(min=TINY).bfloat16()
        code_BTR = (coefficient_BTR / self._spread(scale_BTC, coefficient_BTR.dtype)).round()
        code_BTR = code_BTR.clamp(-largest - 1, largest).to(torch.int8)
        return (code_BTR if self.bits == 8 else _in_pairs(code_BTR)), scale_BTC

    def decode(self, stored: Stored, dtype: torch.dtype) -> Tensor:
        code, scale_BTC = stored
        code_BTR = code if self.bits == 8 else _apart(code)[..., : sum(self.ranks)]
        return code_BTR.to(dtype) * self._spread(scale_BTC, dtype)

    def _spread(self, scale_BTC: Tensor, dtype: torch.dtype) -> Tensor:
        ranks = torch.tensor(self.ranks, dtype=torch.int64, device=scale_BTC.device)
        return scale_BTC.to(dtype).repeat_interleave(ranks, dim=-1)


def _in_pairs(code_BTR: Tensor) -> Tensor:
    code = torch.nn.functional.pad(code_BTR.to(torch.int16) + 8, (0, code_BTR.shape[-1] % 2))
    return (code[..., 0::2] | code[..., 1::2] << 4).to(torch.uint8)


def _apart(pairs: Tensor) -> Tensor:
    return torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(-2).to(torch.int8) - 8


@dataclass(frozen=True, slots=True)
class Projected:
    """Keys or values as coefficients on bases. Keys are projected unrotated."""

    bases: Bases
    codec: Unrounded | Rounded

    def encode(self, x_BHTd: Tensor) -> Stored:
        return self.codec.encode(self.bases.encode(x_BHTd))

    def decode(self, stored: Stored, dtype: torch.dtype) -> Tensor:
        return self.bases.decode(self.codec.decode(stored, dtype))

    def held(self) -> Sequence[Tensor]:
        return self.bases.blocks


@dataclass(frozen=True, slots=True)
class Plain:
    """Keys or values themselves, in one dtype; keys stay rotated."""

    dtype: torch.dtype

    def encode(self, x_BHTd: Tensor) -> Stored:
        return (x_BHTd.transpose(1, 2).to(self.dtype),)

    def decode(self, stored: Stored, dtype: torch.dtype) -> Tensor:
        return stored[0].to(dtype).transpose(1, 2)

    def held(self) -> Sequence[Tensor]:
        return ()


Side = Projected | Plain
"""How the keys, or the values, of one layer are kept."""


class LowRankLayer(CacheLayerMixin):
    """One layer's cache."""

    is_croppable = True

    def __init__(self, keys: Side, values: Side, rotary: Rotary | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in transformers
        self.sides = keys, values
        self.rotary = rotary if isinstance(keys, Projected) else None
        self.reset()

    def reset(self) -> None:
        self.tokens = 0
        self.stored: list[Stored] = [(), ()]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *arguments: Any, **keywords: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new tokens (B, H, T, d); keys and values of all tokens so far, as far as the ranks hold them."""
        past, self.tokens = self.tokens, self.tokens + key_states.shape[2]
        angles = [] if self.rotary is None else [part.to(key_states) for part in self.rotary(self.tokens)]
        if angles:
            key_states = unrotated(key_states, *(part_Tn[past:] for part_Tn in angles))
        keys, values = self._kept(0, key_states), self._kept(1, value_states)
        return (rotated(keys, *angles) if angles else keys), values

    def _kept(self, kind: int, x_BHTd: Tensor) -> Tensor:
        """Store new tokens of a kind; what is held of all of them."""
        side, old = self.sides[kind], self.stored[kind]
        new = side.encode(x_BHTd)
        self.stored[kind] = (
            tuple(torch.cat(pair, dim=1) for pair in zip(old, new, strict=True)) if old else new
        )
        return side.decode(self.stored[kind], x_BHTd.dtype)

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        self.stored = [tuple(map(change, stored)) for stored in self.stored]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(lambda part: part[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda part: part.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last −`tokens_to_remove` tokens."""
        self.tokens = max(0, self.tokens - abs(tokens_to_remove))
        self._change(lambda part: part[:, : self.tokens])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.tokens + query_length, 0

    def get_seq_length(self) -> int:
        return self.tokens

    def get_max_length(self) -> int:
        return -1

    def held_bytes(self) -> int:
        held = [block for side in self.sides for block in side.held()]
        held += [part for stored in self.stored for part in stored]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)


class LowRankCache(Cache):
    """Give it to a model as `past_key_values`."""

    def __init__(self, layers: Sequence[LowRankLayer]) -> None:
        super().__init__(layers=list(layers))

    def held_bytes(self) -> int:
        """Bytes of all bases and coefficients."""
        return sum(layer.held_bytes() for layer in self.layers if isinstance(layer, LowRankLayer))
