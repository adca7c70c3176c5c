"""Low-rank key-value caches, calibrated and measured: spectra, sensitivities, KL at equal bytes.

What lives here: what a model's own keys and values say about ranks, and what a cache costs. The cache is
`compressor/kvcache/cache.py`, ways to share out ranks are in `compressor/kvcache/ranks.py`.

A basis is made of the leading eigenvectors of a chunk's second moment over calibration text, keys before their
rotation; the eigenvalues that are cut are the squared error. What a unit of it costs differs from layer to layer and
between keys and values, so it is measured: the KL with that one compressed, over the error that made.

Letters as in `compressor/kvcache/cache.py`, and N windows, L layers, K two kinds (keys, values), C chunks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from compressor.kvcache.cache import LowRankCache, Rotary, unrotated
from compressor.kvcache.layout import CacheLayout, rotary_of, side_of
from compressor.kvcache.ranks import CacheError, CoefficientBits, Ranks, adaptive, check_chunks, check_ranks
from profiler.evaluation.divergence import BATCH, Reference, stored_logits, window_divergences
from profiler.model.layers import LoadedModel
from profiler.statistics.calibration import Progress, silent

PROBE_WINDOWS = 4
PROBE_SHARE = 0.5
"""Of a chunk's directions, kept when its sensitivity is measured."""


@dataclass(frozen=True, slots=True)
class KeysAndValues:
    """What calibration found: eigenvalues in falling order, and their vectors in columns, of every chunk."""

    energy_LKHCc: NDArray[np.float64]
    vector_LKHCcc: Tensor
    rotary: Rotary | None
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int, int, int]:
        layers, kinds, heads, chunks = self.energy_LKHCc.shape[:4]
        return layers, kinds, heads, chunks

    @property
    def chunk_size(self) -> int:
        return int(self.energy_LKHCc.shape[-1])

    def layout(
        self, ranks: Ranks, bits: CoefficientBits = 16, dtype: torch.dtype | None = None
    ) -> CacheLayout:
        """Caches of these ranks, bases and unrounded coefficients in the model's dtype if none is given.

        Raises `CacheError`.
        """
        check_ranks(ranks, self.chunk_size)
        sides = [
            tuple(
                side_of(vector_HCcc, rank_HC, bits, dtype or self.dtype)
                for vector_HCcc, rank_HC in zip(vector_KHCcc, rank_KHC, strict=True)
            )
            for vector_KHCcc, rank_KHC in zip(self.vector_LKHCcc, ranks, strict=True)
        ]
        return CacheLayout(tuple((keys, values) for keys, values in sides), self.rotary)

    def cache(self, ranks: Ranks, bits: CoefficientBits = 16) -> LowRankCache:
        """An empty cache of these ranks. Raises `CacheError`."""
        return self.layout(ranks, bits).empty()

    def tails(self, ranks: Ranks) -> NDArray[np.float64]:
        """(L, K): the energy that these ranks cut, over heads and chunks."""
        direction_c = np.arange(self.chunk_size)
        cut = np.where(direction_c >= ranks[..., None], self.energy_LKHCc, 0.0)
        return np.asarray(cut.sum(axis=(2, 3, 4)))


See = Callable[[Tensor], Tensor]
"""(K, B, H, T, d) of one layer, keys unrotated -> what is to be known of them."""


class _Recorder(DynamicLayer):
    """A plain cache that keeps what is to be known of all it is given at once."""

    def __init__(self, rotary: Rotary | None, see: See) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in transformers
        self.rotary, self.see, self.seen = rotary, see, torch.zeros(())

    def update(
        self, key_states: Tensor, value_states: Tensor, *arguments: Any, **keywords: Any
    ) -> tuple[Tensor, Tensor]:
        plain_BHTd = key_states
        if self.rotary is not None:
            plain_BHTd = unrotated(key_states, *self.rotary(key_states.shape[2]))
        self.seen = self.see(torch.stack([plain_BHTd, value_states]))
        return super().update(key_states, value_states, *arguments, **keywords)


@torch.no_grad()
def seen_in(
    loaded: LoadedModel, tokens_NT: Tensor, rotary: Rotary | None, see: Sequence[See], progress: Progress
) -> Tensor:
    """(L, …): what every layer's `see` gives, summed over the windows."""
    total = torch.zeros(())
    for done, tokens_T in enumerate(tokens_NT, start=1):
        recorders = [_Recorder(rotary, of_layer) for of_layer in see]
        loaded.model(
            tokens_T[None].to(loaded.device), past_key_values=Cache(layers=list(recorders)), use_cache=True
        )
        total = total + torch.stack([recorder.seen for recorder in recorders]).cpu()
        progress("keys and values", done, len(tokens_NT))
    return total


def _second_moments(x_KBHTd: Tensor) -> Tensor:
    """(K, H, d, d), float64."""
    x_KBHTd = x_KBHTd.double()
    return torch.einsum("kbhti,kbhtj->khij", x_KBHTd, x_KBHTd)


def keys_and_values(
    loaded: LoadedModel, tokens_NT: Tensor, chunk_size: int, progress: Progress = silent
) -> KeysAndValues:
    """Second moments of every chunk over calibration windows int64 (N, T), taken apart.

    Raises `CacheError` for chunks that do not divide a head, and for caches of another kind.
    """
    rotary, layers = rotary_of(loaded.model), check_attention(loaded)
    total_LKHdd = seen_in(loaded, tokens_NT, rotary, [_second_moments] * layers, progress)
    chunks = check_chunks(total_LKHdd.shape[-1], chunk_size)
    blocks = total_LKHdd.unflatten(-1, (chunks, chunk_size)).unflatten(-3, (chunks, chunk_size))
    moment_LKHCcc = torch.stack([blocks[..., c, :, c, :] for c in range(chunks)], dim=3) / tokens_NT.numel()
    value_LKHCc, vector_LKHCcc = torch.linalg.eigh(moment_LKHCcc)
    return KeysAndValues(
        value_LKHCc.flip(-1).clamp(min=0).numpy(),
        vector_LKHCcc.flip(-1).to(loaded.device),
        rotary,
        loaded.model.dtype,
    )


def check_attention(loaded: LoadedModel) -> int:
    """The number of layers. Raises `CacheError` where some keep no ordinary cache."""
    config: PretrainedConfig = loaded.model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        raise CacheError(
            f"{loaded.ref.id} has layers of {', '.join(sorted(kinds))}, whose caches are not supported;"
            " only full attention is"
        )
    return len(loaded.block_names)


@torch.no_grad()
def cache_kl(
    loaded: LoadedModel, reference: Reference, tokens_NT: Tensor, empty: Callable[[], Cache]
) -> NDArray[np.float64]:
    """(N,): KL (nats/token) of every window read through a cache, to the logits without."""
    rows = []
    for first in range(0, len(tokens_NT), BATCH):
        batch_NT = tokens_NT[first : first + BATCH].to(loaded.device)
        logits_NTV = loaded.model(batch_NT, past_key_values=empty(), use_cache=True).logits.float()
        rows.append(window_divergences(logits_NTV, reference, first, batch_NT))
    return torch.cat(rows).double().cpu().numpy()


def sensitivities(
    loaded: LoadedModel,
    found: KeysAndValues,
    reference: Reference,
    tokens_NT: Tensor,
    progress: Progress = silent,
) -> NDArray[np.float64]:
    """(L, K): KL (nats/token) by squared error, measured with one layer's keys or values cut at a time."""
    full = np.full(found.shape, found.chunk_size, dtype=np.int64)
    weight_LK = np.zeros(found.shape[:2])
    for done, place in enumerate(np.ndindex(*weight_LK.shape), start=1):
        ranks = full.copy()
        ranks[place] = max(1, int(PROBE_SHARE * found.chunk_size))
        kl = cache_kl(loaded, reference, tokens_NT, partial(found.cache, ranks)).mean()
        tail = found.tails(ranks)[place]
        weight_LK[place] = max(kl, 0.0) / tail if tail else 0.0
        progress("sensitivities", done, weight_LK.size)
    return weight_LK


def adaptive_ranks(found: KeysAndValues, weight_LK: NDArray[np.float64], total_rank: int) -> Ranks:
    """The ranks of sum `total_rank` that are predicted to lose least."""
    return adaptive(found.energy_LKHCc * weight_LK[:, :, None, None, None], total_rank)


@torch.no_grad()
def decode_speed(loaded: LoadedModel, tokens_T: Tensor, cache: Cache, new_tokens: int = 24) -> float:
    """Tokens per second at batch 1, after a prompt that leaves room for them in `tokens_T`."""
    ids_NT = tokens_T[None].to(loaded.device)
    loaded.model(ids_NT[:, :-new_tokens], past_key_values=cache, use_cache=True)
    started = time.perf_counter()
    for place in range(ids_NT.shape[1] - new_tokens, ids_NT.shape[1]):
        output = loaded.model(ids_NT[:, place : place + 1], past_key_values=cache, use_cache=True)
    output.logits.sum().item()
    return new_tokens / (time.perf_counter() - started)


@dataclass(frozen=True, slots=True)
class CacheFigures:
    """One cache of a context of `tokens`: bytes held and predicted, its share of the plain cache, KL in nats/token."""

    strategy: str
    tokens: int
    mean_rank: float
    held_bytes: int
    predicted_bytes: int
    ratio: float
    kl_nats: float
    standard_error: float
    tokens_per_second: float
    plain_tokens_per_second: float


def plain_bytes(found: KeysAndValues, tokens: int, batch: int = 1) -> int:
    """Bytes of the keys and values themselves."""
    return int(np.prod(found.shape)) * found.chunk_size * tokens * batch * found.dtype.itemsize


def reference_logits(loaded: LoadedModel, tokens_NT: Tensor, folder: Path) -> Reference:
    return stored_logits(loaded, tokens_NT, folder / "reference.f32")


def plain_speed(loaded: LoadedModel, tokens_T: Tensor) -> float:
    return decode_speed(loaded, tokens_T, DynamicCache(config=loaded.model.config))
