"""The tensor types of llama.cpp that bit widths map to: their names and what they really take.

What lives here: the table. A type packs a block of weights of one row together with its scales, so a row must be a
whole number of blocks; llama-quantize silently takes another type where it is not.
"""

from __future__ import annotations

from dataclasses import dataclass

from allocator.storage import KEEP_BITS


@dataclass(frozen=True, slots=True)
class TensorType:
    """`block_bytes` for every `block` weights of a row."""

    name: str
    block: int
    block_bytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block

    def fits(self, columns: int) -> bool:
        return columns % self.block == 0

    def tensor_bytes(self, rows: int, columns: int) -> int:
        return rows * columns // self.block * self.block_bytes


TYPES = {
    2: TensorType("q2_K", 256, 84),
    3: TensorType("q3_K", 256, 110),
    4: TensorType("q4_K", 256, 144),
    5: TensorType("q5_K", 256, 176),
    6: TensorType("q6_K", 256, 210),
    8: TensorType("q8_0", 32, 34),
    KEEP_BITS: TensorType("bf16", 1, 2),
}
"""By bits: 2.625, 3.4375, 4.5, 5.5, 6.5625, 8.5 and 16 bits per weight."""
NEAREST_GROUP_SIZE = 32
"""The measured group size that comes nearest to their groups of 16 and 32 weights."""
