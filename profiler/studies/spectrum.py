"""Spectrum: how the energy of every weight matrix, and of every attention head, spreads over its singular values.

What lives here: energy curves and the rank that a share of the energy takes. What cutting the rank costs is measured in
`cliff.py`: energy is of the weights alone and knows nothing of their inputs. The document is in `sidecar.py`.

Energy is the share of tr(WWᵀ), the squared Frobenius norm, in the leading singular values; 1 − energy is the relative
*squared* error of the best matrix of that rank (Eckart and Young). O rows, I columns, r the smaller of the two.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from allocator.plan import PlanModel
from profiler.documents.sidecar import HeadSpectrum, LayerSpectrum, Spectrum, SpectrumDocument
from profiler.model.heads import heads_of
from profiler.model.layers import Layer, LoadedModel, check_finite
from profiler.statistics.calibration import Progress, silent

SHARES = (0.9, 0.95, 0.99, 0.999)
POINTS = 32
"""An energy curve is given at so many equal steps of the rank."""


def energy_curve(w_OI: Tensor) -> Tensor:
    """float64 (r,): the share of the energy in the leading 1, 2, … singular values; the last is 1.

    From the eigenvalues of the smaller Gram matrix, in float64. A matrix of zeros has all its energy in none.
    """
    w_OI = w_OI.double()
    gram_rr = w_OI @ w_OI.T if len(w_OI) <= w_OI.shape[1] else w_OI.T @ w_OI
    value_r = torch.linalg.eigvalsh(gram_rr).flip(0).clamp(min=0)
    sum_r = value_r.cumsum(0)
    return sum_r / sum_r[-1] if sum_r[-1] > 0 else torch.ones_like(sum_r)


def rank_for(energy_r: Tensor, share: float) -> int:
    """The least rank whose energy is at least `share`, up to rounding."""
    return int((energy_r < share - 1e-12).sum()) + 1


def spectrum_of(w_OI: Tensor) -> Spectrum:
    energy_r = energy_curve(w_OI)
    full = len(energy_r)
    steps = [math.ceil(k * full / POINTS) for k in range(1, POINTS + 1)]
    return Spectrum(
        full_rank=full,
        ranks=tuple(rank_for(energy_r, share) for share in SHARES),
        energy=tuple(energy_r[step - 1].item() for step in steps),
    )


@torch.no_grad()
def layer_spectrum(loaded: LoadedModel, layer: Layer) -> LayerSpectrum:
    """Raises `ModelError` for weights that are not finite."""
    w_OI = loaded.weight(layer)
    check_finite(loaded.model, w_OI, f"weights of {layer.name}")
    return LayerSpectrum(
        block=layer.block,
        projection=layer.projection,
        rows=layer.rows,
        columns=layer.columns,
        spectrum=spectrum_of(w_OI),
        heads=tuple(
            HeadSpectrum(head.role, head.index, spectrum_of(head.cut(w_OI)))
            for head in heads_of(loaded, layer)
        ),
    )


def spectrum_document(loaded: LoadedModel, model: PlanModel, progress: Progress = silent) -> SpectrumDocument:
    """Measure every layer."""
    layers = {}
    for done, layer in enumerate(loaded.layers):
        layers[layer.name] = layer_spectrum(loaded, layer)
        progress("spectra", done + 1, len(loaded.layers))
    return SpectrumDocument(model=model, shares=SHARES, layers=layers)
