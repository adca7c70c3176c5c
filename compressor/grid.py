"""The quantization grid of one group of weights: asymmetric, its clip, zero point and scale searched.

What lives here: choosing a scale and an integer zero point for groups of weights, and the quantized matrix that
results. Rounding is in `gptq.py`.

Letters: g weights of a group, R rows (independent groups). A weight is `(code − zero) · scale`, code and zero in
0 … 2^bits − 1, scale a bfloat16 number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from allocator.storage import ceil_div

SHRINKS = (1.0, 0.92, 0.85, 0.78, 0.71, 0.64, 0.57, 0.5)
"""Fractions of the min/max range that the clip search tries."""
REFITS = 2
"""Least-squares refits of the scale after the search."""
_TINY = 1e-30


@dataclass(frozen=True, slots=True)
class Grid:
    """scale_R and zero_R, float32; `maximum_R` is the largest code, 2^bits − 1."""

    scale_R: Tensor
    zero_R: Tensor
    maximum_R: Tensor

    def encode(self, w_R: Tensor) -> Tensor:
        """Nearest codes of w (…, R), float32 holding whole numbers."""
        code_R = torch.div(w_R, self.scale_R).round_().add_(self.zero_R)
        return torch.minimum(code_R.clamp_(min=0), self.maximum_R)

    def decode(self, code_R: Tensor) -> Tensor:
        return (code_R - self.zero_R).mul_(self.scale_R)


@dataclass(frozen=True, slots=True)
class Quantized:
    """One quantized matrix: code_OI uint8, scale_OG bfloat16, zero_OG uint8, G = ceil(I / group_size)."""

    code_OI: Tensor
    scale_OG: Tensor
    zero_OG: Tensor
    bits: int
    group_size: int

    def dequantize(self) -> Tensor:
        """(code − zero) · scale, float32 (O, I)."""
        level_OGg = grouped(self.code_OI, self.group_size) - self.zero_OG[..., None].float()
        return level_OGg.mul_(self.scale_OG[..., None]).flatten(1)[:, : self.code_OI.shape[1]]


def grouped(w_OI: Tensor, group_size: int) -> Tensor:
    """(O, G, group_size), the last group of a row filled up with zeros."""
    rows, columns = w_OI.shape
    groups = ceil_div(columns, group_size)
    return F.pad(w_OI, (0, groups * group_size - columns)).view(rows, groups, group_size)


def group_ranges(w_OI: Tensor, group_size: int) -> Tensor:
    """(O, G): the range of every group, zero included."""
    low_OG, high_OG = grouped(w_OI, group_size).aminmax(dim=2)
    return high_OG.clamp(min=0) - low_OG.clamp(max=0)


def search_grid(w_gR: Tensor, importance_gR: Tensor, maximum_R: Tensor) -> Grid:
    """The grid with the least importance-weighted squared rounding error, for every row at once.

    w (g, R) float32; importance (g, R) or (g, 1), non-negative; maximum (R,) = 2^bits − 1. Tries every fraction
    of the min/max range with both integers nearest to the real zero point, then refits the scale by least squares
    with the codes fixed. Minimising weighted MSE over clip ranges is common practice (e.g. OmniQuant, GPTQ's
    `mse` option); the zero-point search matters at 2 bits, where a symmetric group has no middle code.
    """
    low_R = w_gR.amin(dim=0).clamp_(max=0)
    span_R = (w_gR.amax(dim=0).clamp_(min=0) - low_R).clamp_(min=_TINY)
    best_R = torch.full_like(low_R, torch.inf)
    scale_R = _storable(span_R / maximum_R)
    zero_R = torch.minimum((-low_R / scale_R).round_(), maximum_R)
    for shrink in SHRINKS:
        trial_scale_R = _storable(span_R * shrink / maximum_R)
        real_zero_R = -low_R * shrink / trial_scale_R
        for trial_zero_R in (real_zero_R.floor(), real_zero_R.floor() + 1):
            trial_zero_R = torch.minimum(trial_zero_R.clamp_(min=0), maximum_R)
            level_gR = _levels(w_gR, trial_scale_R, trial_zero_R, maximum_R)
            loss_R = _loss(level_gR.mul_(trial_scale_R).sub_(w_gR), importance_gR)
            better_R = loss_R < best_R
            best_R = torch.where(better_R, loss_R, best_R)
            scale_R = torch.where(better_R, trial_scale_R, scale_R)
            zero_R = torch.where(better_R, trial_zero_R, zero_R)
    for _ in range(REFITS):
        level_gR = _levels(w_gR, scale_R, zero_R, maximum_R)
        weighted_gR = level_gR * importance_gR
        norm_R = (weighted_gR * level_gR).sum(dim=0)
        refit_R = (weighted_gR * w_gR).sum(dim=0) / norm_R.clamp(min=_TINY)
        trial_scale_R = torch.where(
            (norm_R > 0) & (refit_R > 0), _storable(refit_R.clamp_(min=_TINY)), scale_R
        )
        level_gR = _levels(w_gR, trial_scale_R, zero_R, maximum_R)
        loss_R = _loss(level_gR.mul_(trial_scale_R).sub_(w_gR), importance_gR)
        better_R = loss_R < best_R
        best_R = torch.where(better_R, loss_R, best_R)
        scale_R = torch.where(better_R, trial_scale_R, scale_R)
    return Grid(scale_R, zero_R, maximum_R)


def _storable(scale_R: Tensor) -> Tensor:
    return scale_R.to(torch.bfloat16).float().clamp_(min=torch.finfo(torch.bfloat16).tiny)


def _levels(w_gR: Tensor, scale_R: Tensor, zero_R: Tensor, maximum_R: Tensor) -> Tensor:
    """Signed levels, code − zero, of the nearest codes."""
    return torch.clamp((w_gR * (1.0 / scale_R)).round_(), min=-zero_R, max=maximum_R - zero_R)


def _loss(error_gR: Tensor, importance_gR: Tensor) -> Tensor:
    if importance_gR.shape[1] == 1:
        return importance_gR[:, 0] @ error_gR.square_()
    return error_gR.square_().mul_(importance_gR).sum(dim=0)
