"""W ≈ Q + L·R for one option or many: GPTQ and low-rank factors in turn.

What lives here: the alternation and its error. Shapes: P problems, O rows, I columns; every problem is one option
for one matrix, all of one shape and under one Hessian, so that one column loop serves them all.

Each round fits factors to W − Q, then quantizes W − LR (Li et al., LoftQ, arXiv 2310.08659; Saha et al., CALDERA,
arXiv 2405.18886, with H in both steps). The best round is kept; a problem stops when a round gains under 1 %. It is
tried from two starts, since neither always wins: from Q of W, which improves over several rounds, and from Q of
W − L·R with L·R the best low-rank part of W itself, which is at its fixed point after one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from allocator.errors import BitrankError
from allocator.storage import KEEP_BITS, Option
from compressor.gptq import gptq, inverse_factor
from compressor.grid import Quantized
from compressor.lowrank import Factors, factorize, square_root
from compressor.precision import tensor_cores

ROUNDS = 4
LEAST_GAIN = 0.01
MAXIMUM_ELEMENTS = 6_000_000
"""Weights in flight at once, over all problems of a batch; each takes some 40 bytes of working memory."""


class RankError(BitrankError):
    """The rank is larger than the smaller side of the matrix."""


@dataclass(frozen=True, slots=True)
class Curvature:
    """What decomposing needs of a Hessian, computed once per Hessian: H, its root, its damped inverse factor."""

    hessian_II: Tensor
    root_II: Tensor
    factor_II: Tensor

    @classmethod
    def of(cls, hessian_II: Tensor) -> Curvature:
        return cls(hessian_II.float(), square_root(hessian_II), inverse_factor(hessian_II))


@dataclass(frozen=True, slots=True)
class Decomposition:
    """Q and L·R of one matrix under one option; either may be absent."""

    option: Option
    quantized: Quantized | None
    factors: Factors | None

    def dense(self) -> Tensor:
        """Q + L·R, float32 (O, I)."""
        if self.quantized is None:
            assert self.factors is not None
            return self.factors.product()
        if self.factors is None:
            return self.quantized.dequantize()
        return self.quantized.dequantize() + self.factors.product()


def row_errors(w_OI: Tensor, approximation_OI: Tensor, hessian_II: Tensor) -> Tensor:
    """diag(ΔW H ΔWᵀ), float32 (O,): the squared output error of every row, per token."""
    delta_OI = w_OI - approximation_OI
    with tensor_cores():
        return ((delta_OI @ hessian_II) * delta_OI).sum(dim=1).clamp_(min=0)


def squared_error(w_OI: Tensor, approximation_OI: Tensor, hessian_II: Tensor) -> float:
    """tr(ΔW H ΔWᵀ): the squared output error of all rows, per token."""
    return row_errors(w_OI, approximation_OI, hessian_II).sum().item()


def decompose(
    weights: Sequence[Tensor],
    curvature: Curvature,
    options: Sequence[Option],
    rounds: int = ROUNDS,
    elements: int = MAXIMUM_ELEMENTS,
) -> Iterator[tuple[int, Decomposition]]:
    """Carry out `options[p]` on `weights[p]`, matrices (O, I) float32 of one shape under one Hessian.

    Yields (p, decomposition), batch by batch, plain options first, so that no more than `elements` weights are
    in flight. Raises `RankError` for a rank above min(O, I).
    """
    rows, columns = weights[0].shape
    for option in options:
        if option.rank > min(rows, columns):
            raise RankError(
                f"rank {option.rank} exceeds the smaller side of a {rows} × {columns} matrix;"
                f" use at most {min(rows, columns)}"
            )
    batch = max(1, elements // (rows * columns))
    for members in (_plain(options), _low_rank(options), _mixed(options)):
        for first in range(0, len(members), batch):
            chunk = members[first : first + batch]
            w_POI = torch.stack([weights[p] for p in chunk])
            yield from zip(
                chunk, _decompose_batch(w_POI, curvature, [options[p] for p in chunk], rounds), strict=True
            )


def _plain(options: Sequence[Option]) -> list[int]:
    return [p for p, option in enumerate(options) if option.rank == 0]


def _low_rank(options: Sequence[Option]) -> list[int]:
    return [p for p, option in enumerate(options) if option.bits == 0]


def _mixed(options: Sequence[Option]) -> list[int]:
    return [p for p, option in enumerate(options) if option.bits and option.rank]


def _decompose_batch(
    w_POI: Tensor, curvature: Curvature, options: Sequence[Option], rounds: int
) -> list[Decomposition]:
    """One batch, all plain, all pure low rank, or all mixed."""
    assert all(option.bits != KEEP_BITS for option in options)
    if options[0].bits == 0:
        factors = _factors_of(w_POI, curvature, options)
        return [Decomposition(o, None, f) for o, f in zip(options, factors, strict=True)]
    quantized = _quantized_of(w_POI, curvature, options)
    if options[0].rank == 0:
        return [Decomposition(o, q, None) for o, q in zip(options, quantized, strict=True)]
    from_q = _alternate(w_POI, curvature, options, quantized, rounds)
    product_POI = torch.stack([f.product() for f in _factors_of(w_POI, curvature, options)])
    from_lr = _alternate(w_POI, curvature, options, _quantized_of(w_POI - product_POI, curvature, options), 1)
    return [min(pair, key=lambda found: found[0])[1] for pair in zip(from_q, from_lr, strict=True)]


def _alternate(
    w_POI: Tensor,
    curvature: Curvature,
    options: Sequence[Option],
    quantized: list[Quantized],
    rounds: int,
) -> list[tuple[float, Decomposition]]:
    """The least squared output error found from this start, and its decomposition."""
    best = [Decomposition(option, None, None) for option in options]
    least = [float("inf")] * len(options)

    def gain(p: int, q: Quantized, factors: Factors, product_OI: Tensor) -> bool:
        """Keep this pair if it is the best so far; whether it is better by `LEAST_GAIN`."""
        error = squared_error(w_POI[p], q.dequantize() + product_OI, curvature.hessian_II)
        enough = error < least[p] * (1 - LEAST_GAIN)
        if error < least[p]:
            least[p], best[p] = error, Decomposition(options[p], q, factors)
        return enough

    active = list(range(len(options)))
    for _ in range(rounds):
        residual_POI = torch.stack([w_POI[p] - quantized[p].dequantize() for p in active])
        factors = dict(
            zip(active, _factors_of(residual_POI, curvature, [options[p] for p in active]), strict=True)
        )
        product = {p: factors[p].product() for p in active}
        active = [p for p in active if gain(p, quantized[p], factors[p], product[p])]
        if not active:
            break
        remainder_POI = torch.stack([w_POI[p] - product[p] for p in active])
        requantized = _quantized_of(remainder_POI, curvature, [options[p] for p in active])
        for p, q in zip(active, requantized, strict=True):
            quantized[p] = q
            gain(p, q, factors[p], product[p])
    return list(zip(least, best, strict=True))


def _quantized_of(w_POI: Tensor, curvature: Curvature, options: Sequence[Option]) -> list[Quantized]:
    return gptq(w_POI, curvature.factor_II, [o.bits for o in options], [o.group_size for o in options])


def _factors_of(residual_POI: Tensor, curvature: Curvature, options: Sequence[Option]) -> list[Factors]:
    return factorize(
        residual_POI,
        curvature.root_II,
        curvature.factor_II,
        [o.rank for o in options],
        [o.factor_bits for o in options],
    )
