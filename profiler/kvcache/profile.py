"""What a key-value cache can be and what it costs, measured once: a companion of the profile.

What lives here: the files, measuring them, and the menu of one context and batch made from them. Spectra and
sensitivities are `study.py`; the joint problem with the weights is `allocator/kv_cache.py`.

    kvcache.json          chunk size, sensitivities, probes, gain
    kvcache.safetensors   energies, largest coefficients, bases

A group's squared error is the energy that its ranks cut, plus what rounding adds: codes of step s, the chunk's
largest coefficient over the largest code, err by s²/12 each on average, but for the largest itself. It costs its
sensitivity, in nats per unit, times one gain, with which whole caches of several sizes and widths are predicted best.

Letters as in `study.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor

from allocator.atomic import write_atomically
from allocator.kv_cache import CacheGroup, CacheMenu, CacheOption
from compressor.kvcache.layout import DTYPE
from compressor.kvcache.ranks import KINDS, CoefficientBits, Ranks, adaptive, group_bytes
from profiler.documents.profile import Profile
from profiler.documents.sidecar import Companion, CompanionError
from profiler.kvcache.study import (
    PROBE_WINDOWS,
    KeysAndValues,
    See,
    adaptive_ranks,
    cache_kl,
    keys_and_values,
    reference_logits,
    seen_in,
    sensitivities,
)
from profiler.model.layers import LoadedModel
from profiler.statistics.calibration import Progress

ARRAYS = "kvcache.safetensors"
CALIBRATION_WINDOWS = 16
PROBES: tuple[tuple[float, CoefficientBits], ...] = ((0.5, 16), (0.75, 8), (0.9, 8), (0.75, 4), (1.0, 4))
"""Shares of the directions, and bits, of the whole caches that the gain is fitted to."""
LEVELS = 32
"""Total ranks that a group is offered at each width, evenly spaced."""
WIDTHS: tuple[CoefficientBits, ...] = (16, 8, 4)
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class CacheProbe:
    """One whole cache: its share of the directions, its bits, and its KL (nats/token) predicted before the gain."""

    share: float
    bits: int
    predicted_kl: float
    measured_kl: float


class CacheDocument(Companion):
    """kvcache.json. sensitivity (L, K): nats/token by squared error, before the gain."""

    file_name: ClassVar[str] = "kvcache.json"

    chunk_size: int
    windows: int
    probe_windows: int
    window_tokens: int
    sensitivity: tuple[tuple[float, ...], ...]
    probes: tuple[CacheProbe, ...]
    gain: float
    arrays_sha256: str


@dataclass(frozen=True)
class CacheProfile:
    """The two files. largest (L, K, H, C, c) at r: mean square of the largest of a token's leading r coefficients."""

    document: CacheDocument
    energy_LKHCc: Floats
    largest_LKHCc: Floats
    vector_LKHCcc: NDArray[np.float32]

    @property
    def bases(self) -> Tensor:
        return torch.from_numpy(self.vector_LKHCcc)

    def price(self, place: tuple[int, int]) -> float:
        """Calibrated nats/token by squared error of one layer's keys or values."""
        return self.document.sensitivity[place[0]][place[1]] * self.document.gain

    def error(self, place: tuple[int, int], rank_HC: Ranks, bits: CoefficientBits) -> float:
        """Squared error per token of one layer's keys or values."""
        return group_error(self.energy_LKHCc[place], self.largest_LKHCc[place], rank_HC, bits)

    def menu(self, context: int, batch: int) -> CacheMenu:
        """What a cache of `batch` sequences of `context` tokens can be, numbers taking two bytes."""
        layers, _, heads, chunks, size = self.energy_LKHCc.shape
        plain = layers * 2 * heads * chunks * size * context * batch * DTYPE.itemsize
        places = list(np.ndindex(layers, 2))
        groups = tuple(self._group((layer, kind), context, batch) for layer, kind in places)
        return CacheMenu(context, batch, size, plain, self.document.arrays_sha256, groups)

    def _group(self, place: tuple[int, int], context: int, batch: int) -> CacheGroup:
        options, sizes, costs = [], [], []
        for rank_HC in self._levels(place):
            for bits in WIDTHS:
                options.append(CacheOption(bits, tuple(map(tuple, rank_HC.tolist()))))
                size = self.document.chunk_size
                sizes.append(group_bytes(rank_HC, context, batch, size, DTYPE.itemsize, bits))
                costs.append(self.price(place) * self.error(place, rank_HC, bits))
        name = f"{place[0]}.{KINDS[place[1]]}"
        return CacheGroup(name, tuple(options), np.array(sizes, dtype=np.int64), np.array(costs))

    def _levels(self, place: tuple[int, int]) -> Iterator[Ranks]:
        """Ranks (H, C) that leave the least energy, from few directions to all."""
        energy_HCc = self.energy_LKHCc[place]
        for total in sorted({-(-energy_HCc.size * level // LEVELS) for level in range(1, LEVELS + 1)}):
            yield adaptive(energy_HCc, total)


def group_error(energy_HCc: Floats, largest_HCc: Floats, rank_HC: Ranks, bits: CoefficientBits) -> float:
    """Squared error per token: the energy cut, and what rounding adds."""
    direction_c = np.arange(energy_HCc.shape[-1])
    cut = float(energy_HCc[direction_c >= rank_HC[..., None]].sum())
    if bits == 16:
        return cut
    last_HC1 = np.maximum(rank_HC - 1, 0)[..., None]
    largest_HC = np.take_along_axis(largest_HCc, last_HC1, axis=-1)[..., 0]
    step_HC = largest_HC / (2 ** (bits - 1) - 1) ** 2
    return cut + float((last_HC1[..., 0] * step_HC).sum()) / 12


def load_cache_profile(profile: Profile) -> CacheProfile | None:
    """The cache's companion, None where there is none. Raises `CompanionError`."""
    document = CacheDocument.beside(profile.path, profile.document.model.weights_sha256)
    if document is None:
        return None
    path = profile.path / ARRAYS
    try:
        data = path.read_bytes()
        if sha256(data).hexdigest() != document.arrays_sha256:
            raise CompanionError(f"{path} does not match {document.file_name}; delete both and plan again")
        arrays = load(data)
    except (OSError, SafetensorError) as error:
        raise CompanionError(f"cannot read {path} ({error}); delete kvcache.json and plan again") from error
    return CacheProfile(document, arrays["energy"], arrays["largest"], arrays["vectors"])


def measure_cache_profile(
    profile: Profile, loaded: LoadedModel, chunk_size: int, progress: Progress
) -> CacheProfile:
    """Measure a cache of the profiled model on the profile's windows, and write its two files.

    Bases are of windows that the statistics of the weights are over, what is measured is on those held back. Raises
    `CacheError` for a cache or chunks of a kind that cannot be.
    """
    fitting_NT = profile.calibration_tokens()[:CALIBRATION_WINDOWS]
    probe_NT = profile.probe_tokens()[:PROBE_WINDOWS]
    found = keys_and_values(loaded, fitting_NT, chunk_size, progress)
    largest_LKHCc = largest_coefficients(loaded, found, fitting_NT, progress)
    with TemporaryDirectory(prefix="bitrank-kvcache-") as folder:
        reference = reference_logits(loaded, probe_NT, Path(folder))
        weight_LK = sensitivities(loaded, found, reference, probe_NT, progress)
        probes = []
        for done, (share, bits) in enumerate(PROBES, start=1):
            ranks = _probe_ranks(found, weight_LK, share)
            errors = [
                group_error(found.energy_LKHCc[place], largest_LKHCc[place], ranks[place], bits)
                for place in np.ndindex(*weight_LK.shape)
            ]
            measured = cache_kl(loaded, reference, probe_NT, found.layout(ranks, bits, DTYPE).empty).mean()
            probes.append(CacheProbe(share, bits, float(weight_LK.ravel() @ errors), float(measured)))
            progress("measuring caches", done, len(PROBES))
    arrays = save(
        {
            "energy": found.energy_LKHCc,
            "largest": largest_LKHCc,
            "vectors": found.vector_LKHCcc.float().cpu().contiguous().numpy(),
        }
    )
    write_atomically(profile.path / ARRAYS, arrays)
    CacheDocument(
        model=profile.document.model,
        chunk_size=chunk_size,
        windows=len(fitting_NT),
        probe_windows=len(probe_NT),
        window_tokens=fitting_NT.shape[1],
        sensitivity=tuple(map(tuple, weight_LK.tolist())),
        probes=tuple(probes),
        gain=_gain(probes),
        arrays_sha256=sha256(arrays).hexdigest(),
    ).save(profile.path / CacheDocument.file_name)
    made = load_cache_profile(profile)
    assert made is not None
    return made


def largest_coefficients(
    loaded: LoadedModel, found: KeysAndValues, tokens_NT: Tensor, progress: Progress
) -> Floats:
    """(L, K, H, C, c) at r: mean over tokens of the largest square among the leading r coefficients of a chunk."""

    def see(vector_KHCcc: Tensor) -> See:
        def largest(x_KBHTd: Tensor) -> Tensor:
            chunk_KBHTCc = x_KBHTd.unflatten(-1, (-1, found.chunk_size))
            coefficient = torch.einsum("kbhtci,khcir->kbhtcr", chunk_KBHTCc, vector_KHCcc.to(x_KBHTd))
            return coefficient.square().cummax(dim=-1).values.sum(dim=(1, 3)).double()

        return largest

    total = seen_in(loaded, tokens_NT, found.rotary, [see(v) for v in found.vector_LKHCcc], progress)
    return np.asarray((total / tokens_NT.numel()).numpy())


def _probe_ranks(found: KeysAndValues, weight_LK: Floats, share: float) -> Ranks:
    return adaptive_ranks(found, weight_LK, round(share * found.energy_LKHCc.size))


def _gain(probes: list[CacheProbe]) -> float:
    """The geometric mean of measured over predicted, of what was predicted to cost anything."""
    logs = [
        math.log(p.measured_kl / p.predicted_kl) for p in probes if min(p.measured_kl, p.predicted_kl) > 0
    ]
    return math.exp(sum(logs) / len(logs)) if logs else 1.0
