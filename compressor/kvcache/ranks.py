"""Ranks for the chunks of a key-value cache: uniform, progressive, adaptive, or by hand.

What lives here: how many directions every chunk keeps, and what that comes to in bytes. Storing is `cache.py`;
spectra and sensitivities are the profiler's.

Letters: L layers, K two kinds (keys, values), H key-value heads, C chunks of a head, c chunk size. A chunk of T tokens
and rank r holds coefficients (T, r) and a basis (c, r): r·(T + c) numbers for T·c, the *true ratio* r·(T + c) / (T·c).
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import yaml  # type: ignore[import-untyped]
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from allocator.errors import BitrankError

KINDS = ("k", "v")
Ranks = NDArray[np.int64]
"""(L, K, H, C)."""
Shape = tuple[int, int, int, int]


class CacheError(BitrankError):
    """Chunks, ranks or a context that a cache cannot have; the message says what to change."""


def check_chunks(head_size: int, chunk_size: int) -> int:
    """The number of chunks of a head. Raises `CacheError` where they do not come out even."""
    if chunk_size < 1 or head_size % chunk_size:
        divisors = [size for size in range(1, head_size + 1) if head_size % size == 0]
        raise CacheError(
            f"chunks of {chunk_size} do not divide a head of {head_size}; use one of"
            f" {', '.join(map(str, divisors))}"
        )
    return head_size // chunk_size


def check_ranks(ranks: Ranks, chunk_size: int) -> Ranks:
    """Raises `CacheError` for a rank that a chunk cannot have."""
    if (ranks < 0).any() or (ranks > chunk_size).any():
        wrong = int(ranks[(ranks < 0) | (ranks > chunk_size)][0])
        raise CacheError(f"rank {wrong} does not fit a chunk of {chunk_size}; use 0 to {chunk_size}")
    return ranks


def true_ratio(rank: float, tokens: int, chunk_size: int) -> float:
    """Numbers held over numbers of the chunk, the basis counted."""
    return rank * (tokens + chunk_size) / (tokens * chunk_size)


def rank_within(ratio: float, tokens: int, chunk_size: int) -> int:
    """The highest rank whose true ratio is at most `ratio`. Raises `CacheError` for a ratio outside (0, 1]."""
    if not 0 < ratio <= 1:
        raise CacheError(f"ratio {ratio:g} is no share of a cache; use more than 0 and at most 1")
    return min(chunk_size, int(ratio * tokens * chunk_size / (tokens + chunk_size) + 1e-9))


def uniform(shape: Shape, ratio: float, tokens: int, chunk_size: int) -> Ranks:
    """The same rank everywhere."""
    return np.full(shape, rank_within(ratio, tokens, chunk_size), dtype=np.int64)


def progressive(shape: Shape, start_ratio: float, end_ratio: float, tokens: int, chunk_size: int) -> Ranks:
    """Ratios that change linearly from a head's first chunk to its last; where a head is one chunk, from the first
    layer to the last."""
    axis = 3 if shape[3] > 1 else 0
    ratios = np.linspace(start_ratio, end_ratio, shape[axis])
    ranks = np.array([rank_within(float(ratio), tokens, chunk_size) for ratio in ratios], dtype=np.int64)
    return np.broadcast_to(np.expand_dims(ranks, [i for i in range(4) if i != axis]), shape).copy()


def adaptive(energy_LKHCc: NDArray[np.float64], total_rank: int) -> Ranks:
    """The ranks of sum `total_rank` that leave the least energy, each chunk's in falling order.

    A direction takes the same bytes in every chunk and a chunk's energies fall, so the optimum is the largest ones.
    """
    flat = energy_LKHCc.reshape(-1)
    chosen = np.zeros(len(flat), dtype=np.int64)
    chosen[np.argsort(-flat, kind="stable")[:total_rank]] = 1
    return np.asarray(chosen.reshape(energy_LKHCc.shape).sum(axis=-1), dtype=np.int64)


def manual(shape: Shape, ranks: Mapping[str, int], chunk_size: int) -> Ranks:
    """Ranks by globs over `LAYER.k|v.HEAD.CHUNK`, the first match counting.

    Raises `CacheError` for chunks without a rank, and for ranks above the chunk.
    """
    found = np.empty(shape, dtype=np.int64)
    for place in np.ndindex(*shape):
        name = f"{place[0]}.{KINDS[place[1]]}.{place[2]}.{place[3]}"
        rank = next((rank for glob, rank in ranks.items() if fnmatchcase(name, glob)), None)
        if rank is None:
            raise CacheError(f"the map has no rank for chunk {name}; add one, or '*' for all the others")
        found[place] = rank
    return check_ranks(found, chunk_size)


def optimal_rank_analysis(tensor_Tc: Tensor, target_ratio: float) -> tuple[int, float]:
    """The highest rank of T tokens × c numbers within the true ratio, and the rooted relative error it leaves."""
    tokens, chunk_size = tensor_Tc.shape
    rank = rank_within(target_ratio, tokens, min(chunk_size, tokens))
    value = torch.linalg.svdvals(tensor_Tc.double()).square()
    total = value.sum().item()
    return rank, (value[rank:].sum().item() / total) ** 0.5 if total else 0.0


CoefficientBits = Literal[4, 8, 16]


class Preset(BaseModel):
    """Share of the plain cache's bytes before coefficients are rounded, and their bits."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ratio: Annotated[float, Field(gt=0, le=1)]
    bits: CoefficientBits


def presets() -> dict[str, Preset]:
    """By name, from `kvcache_presets.yaml`."""
    text = (Path(__file__).parent / "presets.yaml").read_text(encoding="utf-8")
    return {name: Preset.model_validate(values) for name, values in yaml.safe_load(text).items()}


def preset_for(weights: int) -> str:
    """Small models have few directions to spare: below 10⁹ weights the conservative preset, else the balanced one."""
    return "conservative" if weights < 10**9 else "balanced"


def predicted_bytes(
    ranks: Ranks, tokens: int, batch: int, chunk_size: int, item_bytes: int, bits: CoefficientBits = 16
) -> int:
    """Bytes that a cache of these ranks holds: bases once, coefficients for every sequence."""
    groups = ranks.reshape(-1, *ranks.shape[2:])
    return sum(group_bytes(rank_HC, tokens, batch, chunk_size, item_bytes, bits) for rank_HC in groups)


def group_bytes(
    rank_HC: Ranks, tokens: int, batch: int, chunk_size: int, item_bytes: int, bits: CoefficientBits
) -> int:
    """The same for the keys or values of one layer.

    bits 16 stores coefficients in `item_bytes`, without bases where all ranks are full; 8 and 4 in codes of a layer's
    kind, 4-bit ones two to a byte, with a bfloat16 scale for each chunk that has any rank.
    """
    width, scales = int(rank_HC.sum()), 2 * int((rank_HC > 0).sum())
    row = {16: width * item_bytes, 8: width + scales, 4: -(-width // 2) + scales}[bits]
    plain = stored_plainly(rank_HC, bits, chunk_size)
    return tokens * batch * row + (0 if plain else width * chunk_size * item_bytes)


def stored_plainly(rank_HC: Ranks, bits: int, chunk_size: int) -> bool:
    """Whether one layer's keys or values need no bases: nothing is cut and nothing is rounded."""
    return bits == 16 and bool((rank_HC == chunk_size).all())
