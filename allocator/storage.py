"""Exact storage of a compressed layer, in bytes.

What lives here: the one formula that the planner, the packer and the tests agree on. The packer itself is
`compressor/packing.py`; a test holds the two together to the byte.

Layout. Codes are packed along a row, 32 codes into `bits` 32-bit words, so 3 bits cost 3 bits and only the last,
incomplete run of 32 pads. Every (row, group) has a 16-bit scale and a `bits`-wide zero point; zero points are
flattened before they are packed. A low-rank factor is stored as `rank` rows of vectors, on the same grid.

With heads, L is block diagonal: head h's O/heads rows of W have factors of their own. Only the blocks are stored, as
heads·rank rows of O/heads numbers, beside heads·rank rows of R.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import not_
from typing import Annotated

from pydantic import Field

PACK = 32
"""Codes packed together."""
Heads = Annotated[int, Field(ge=1, exclude_if=lambda heads: heads == 1)]
"""Attention heads with factors of their own; files name them only where there are several."""
FACTOR_GROUP_SIZE = 64
"""Group size of quantized low-rank factors."""
KEEP_BITS = 16
"""`bits` of an option that leaves the layer as it is."""


def ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


@dataclass(frozen=True, slots=True, order=True)
class Option:
    """What may be spent on one layer.

    bits: 2-8 quantizes, 0 is pure low rank (no Q), 16 keeps the layer. rank: columns of L. group_size: weights
    that share a scale (0 where there is no grid). factor_bits: 4 or 8 quantizes L and R, 16 stores bfloat16, 0
    where rank is 0. heads: above 1, the rows of that many heads have factors of this rank each; with bits 0 alone.
    rotated: Q and L·R are of W under a fixed rotation of its inputs, which takes no bytes; files say so only where
    it is.
    """

    bits: int
    rank: int = 0
    group_size: int = 64
    factor_bits: int = 0
    heads: Heads = 1
    rotated: Annotated[bool, Field(exclude_if=not_)] = False


KEEP = Option(KEEP_BITS, 0, 0, 0)


def packed_bytes(rows: int, columns: int, bits: int) -> int:
    """Bytes of `rows` × `columns` codes of `bits` bits, each row padded to whole runs of 32 codes."""
    return rows * ceil_div(columns, PACK) * bits * PACK // 8


def grid_bytes(rows: int, columns: int, bits: int, group_size: int) -> int:
    """Bytes of a group-wise quantized matrix: codes, 16-bit scales, packed zero points."""
    groups = rows * ceil_div(columns, group_size)
    return packed_bytes(rows, columns, bits) + 2 * groups + packed_bytes(1, groups, bits)


def factor_bytes(rows: int, columns: int, rank: int, factor_bits: int, heads: int = 1) -> int:
    """Bytes of L (rows × rank) and R (rank × columns), of every head's where there are several."""
    if rank == 0:
        return 0
    vectors, width = heads * rank, rows // heads
    if factor_bits == KEEP_BITS:
        return 2 * vectors * (width + columns)
    left = grid_bytes(vectors, width, factor_bits, FACTOR_GROUP_SIZE)
    return left + grid_bytes(vectors, columns, factor_bits, FACTOR_GROUP_SIZE)


def head_rank(ratio: float, rows: int, columns: int, heads: int) -> int:
    """The rank that is this share of a head's full rank, 1 at least."""
    return max(1, round(ratio * min(rows // heads, columns)))


def layer_bytes(rows: int, columns: int, option: Option, original_bytes: int) -> int:
    """Bytes a `rows` × `columns` layer takes under `option`; `original_bytes` when it is kept."""
    if option.bits == KEEP_BITS:
        return original_bytes
    quantized = grid_bytes(rows, columns, option.bits, option.group_size) if option.bits else 0
    return quantized + factor_bytes(rows, columns, option.rank, option.factor_bits, option.heads)
