"""Quality of plain low rank: cosine and relative error of every matrix at several ranks, weights alone.

What lives here: the measure that reports of SVD tools give. It knows nothing of a layer's inputs; what an option costs
the model is measured by the sweep. Letters: O rows, I columns, r rank.

For the truncated SVD, ⟨W, W_r⟩ = ‖W_r‖² and ‖W‖² = ‖W_r‖² + ‖W − W_r‖². So with the rooted relative error
e = ‖W − W_r‖ / ‖W‖, cosine = ‖W_r‖ / ‖W‖ and **cosine² + e² = 1**: a table's two columns are one, and the squared
error, e², is what the energy lacks. Rounded factors break it a little; R is refitted to the
rounded L, which keeps the product a projection but for R's own rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from allocator.storage import KEEP_BITS, Option, layer_bytes
from compressor.cuda.scaled_half import Operand
from compressor.lowrank.decompose import RankError
from compressor.lowrank.factorize import factorize
from compressor.quantize.gptq import Factor, inverse_factor
from profiler.model.layers import LoadedModel, check_finite
from profiler.statistics.calibration import Progress, silent

EXACT = 0
"""Factor bits of factors that are not rounded."""
BANDS = (("excellent", 0.99), ("good", 0.95), ("fair", 0.9), ("poor", -1.0))
"""Verdicts, each with the least cosine that earns it."""


@dataclass(frozen=True, slots=True)
class Truncation:
    """One matrix at one rank. rooted_error is ‖W − W_r‖ / ‖W‖, squared_error its square; size_ratio the bytes of the
    factors over those of the matrix (16-bit factors where they are not rounded)."""

    layer: str
    rank: int
    full_rank: int
    cosine: float
    rooted_error: float
    squared_error: float
    size_ratio: float
    verdict: str

    @property
    def identity(self) -> float:
        """cosine² + rooted error², 1 for pure truncation."""
        return self.cosine**2 + self.squared_error


@torch.no_grad()
def truncations(
    loaded: LoadedModel,
    ranks: Sequence[int] = (),
    shares: Sequence[float] = (),
    factor_bits: int = EXACT,
    progress: Progress = silent,
) -> Iterator[Truncation]:
    """Every layer at the given ranks and shares of its full rank, in rising order.

    factor_bits: 4 or 8 rounds the factors as the compressor does, 16 stores bfloat16, `EXACT` leaves them. Raises
    `RankError`, before anything is measured, and `ModelError` for weights that are not finite.
    """
    for layer in loaded.layers:
        if ranks and max(ranks) > (full := min(layer.rows, layer.columns)):
            raise RankError(
                f"rank {max(ranks)} exceeds the smaller side of {layer.name}, {layer.rows} × {layer.columns};"
                f" use at most {full}, or --shares"
            )
    for done, layer in enumerate(loaded.layers, start=1):
        w_OI = loaded.weight(layer)
        check_finite(loaded.model, w_OI, f"weights of {layer.name}")
        full = min(w_OI.shape)
        left_Or, value_r, right_rI = torch.linalg.svd(w_OI.double(), full_matrices=False)
        for rank in sorted({*ranks, *(max(1, round(share * full)) for share in shares)}):
            direction_Or = left_Or[:, :rank]
            if factor_bits == EXACT:
                low_OI = (direction_Or * value_r[:rank]) @ right_rI[:rank]
            else:
                low_OI = _rounded(w_OI, direction_Or.float(), factor_bits).double()
            option = Option(0, rank, 0, factor_bits or KEEP_BITS)
            ratio = layer_bytes(layer.rows, layer.columns, option, 0) / (2 * layer.weights)
            yield _truncation(layer.name, rank, w_OI.double(), low_OI, ratio)
        progress("truncating", done, len(loaded.layers))


def _rounded(w_OI: Tensor, direction_Or: Tensor, factor_bits: int) -> Tensor:
    factor = Factor(inverse_factor(torch.eye(w_OI.shape[1], device=w_OI.device)))
    return factorize([Operand.of(w_OI)], [direction_Or], factor, factor_bits)[0].factors.product()


def _truncation(name: str, rank: int, w_OI: Tensor, low_OI: Tensor, size_ratio: float) -> Truncation:
    norm, low_norm = w_OI.norm(), low_OI.norm()
    if not norm or not low_norm:  # a matrix of zeros is kept whole by any rank
        cosine, rooted = (1.0, 0.0) if not norm else (0.0, 1.0)
    else:
        cosine = ((w_OI * low_OI).sum() / norm / low_norm).item()
        rooted = ((w_OI - low_OI).norm() / norm).item()
    verdict = next(name for name, least in BANDS if cosine >= least)
    return Truncation(name, rank, min(w_OI.shape), cosine, rooted, rooted**2, size_ratio, verdict)
