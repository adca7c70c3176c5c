"""What a profile measures of a layer: the grid of options and the error at each. Measuring them is in `sweep.py`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import not_
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from allocator.storage import Option, head_rank

if TYPE_CHECKING:
    from profiler.model.layers import Layer

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
FACTOR_BITS = (4,)


@dataclass(frozen=True, slots=True)
class GridSettings:
    """What the sweep measures: every bits × group size at rank 0, and every bits × rank at `rank_group_sizes`.

    0 bits are low rank alone, which has no groups. head_ratios: shares of the full rank of a head, low rank alone for
    every head of a query, key or value projection. rotations: every option at rank 0 also of rotated inputs, where
    these have a rotation.
    """

    bits: tuple[int, ...]
    ranks: tuple[int, ...]
    group_sizes: tuple[int, ...]
    rank_group_sizes: tuple[int, ...]
    factor_bits: tuple[int, ...]
    head_ratios: Annotated[tuple[float, ...], Field(exclude_if=not_)] = ()
    rotations: Annotated[bool, Field(exclude_if=not_)] = False

    def options(self, layer: Layer, heads: int = 1) -> list[Option]:
        """The options of one layer; ranks above half its smaller side are left out, they would cost more than W."""
        plain = [Option(bits, 0, size, 0) for bits in self.bits if bits for size in self.group_sizes]
        mixed = [
            Option(bits, rank, size, factor_bits)
            for bits in self.bits
            for rank in self.ranks
            for size in (self.rank_group_sizes if bits else (0,))
            for factor_bits in self.factor_bits
            if 0 < rank <= min(layer.rows, layer.columns) // 2
        ]
        return plain + self._rotated(plain, layer) + mixed + self._head_wise(layer, heads)

    def _rotated(self, plain: list[Option], layer: Layer) -> list[Option]:
        from compressor.hadamard import is_mixing

        if not self.rotations or not is_mixing(layer.columns):
            return []
        return [replace(option, rotated=True) for option in plain]

    def _head_wise(self, layer: Layer, heads: int) -> list[Option]:
        if heads == 1:
            return []
        ranks = {head_rank(ratio, layer.rows, layer.columns, heads) for ratio in self.head_ratios}
        return [Option(0, rank, 0, bits, heads) for rank in sorted(ranks) for bits in self.factor_bits]


@dataclass(frozen=True, slots=True)
class Measurement:
    """error: relative squared output error tr(ΔW H ΔWᵀ)/tr(W H Wᵀ); half_width: that of the 90 % interval of its log.

    What was truly measured has no half width; what the sweep predicted in its stead has.
    """

    option: Option
    error: float
    half_width: float = 0.0
