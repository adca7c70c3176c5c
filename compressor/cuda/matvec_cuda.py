"""One token times packed matrices on CUDA: `matvec.cu` compiled and launched.

What lives here: which matrices the kernel serves, its shared memory, and its launch as an operator that torch.compile
keeps whole. What it computes is said in `matvec.cu`; everything larger than one token, and every other device, is for
`linear.py`.

Letters: O rows, W words of a row, G groups of a row, I columns, r rank, p parts of a sum over columns.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from allocator.storage import ceil_div
from compressor.packing import PLANES

MOST = 4
"""Matrices of one launch."""
WARPS, UNIT, TILE, CHUNK, RUN = 32, 256, 16, 64, 32
"""As in `matvec.cu`."""
FEWEST_WARPS = 24
"""Of a multiprocessor: with fewer, memory waits for them."""
SHARED_BYTES = 66 * 1024
"""What a thread block may have for x beside the 33 KB that the kernel declares: as much as cards since Ampere have."""
READ_AHEAD_BYTES, MOST_LATER = 8 * 2**20, 12
"""What a launch has brought to the L2 cache for those that follow it, and of how many tensors."""
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True)
class Matrix:
    """Q, and L where there is one: left as it is stored, its transpose (r, O), packed or bfloat16; hidden is R·x."""

    word_OW: Tensor
    scale_OG: Tensor
    zero_OG: Tensor
    bits: int
    group_size: int
    left: Tensor | None = None
    left_scale: Tensor | None = None
    left_zero: Tensor | None = None
    hidden_rp: Tensor | None = None
    factor_bits: int = 0


def products(
    x_I: Tensor, matrices: Sequence[Matrix], dtype: torch.dtype, later: Sequence[Tensor] = ()
) -> list[Tensor]:
    """Q·x, and L·hidden added where there is an L, of every matrix; (O,) each, in `dtype`.

    x (I,) bfloat16 or float16; words, bfloat16 scales and uint8 zero points as stored, the latter unpacked. x is
    rounded to 16 bits of the largest of every 64; all else is exact up to the sums, which are float32. What is read
    after these, in that order, may be named as `later`: memory then fetches it while other kernels run.
    """
    return [y_Op.squeeze(1) for y_Op in products_in_parts(x_I, matrices, dtype, 1, later)]


def products_in_parts(
    x_I: Tensor, matrices: Sequence[Matrix], dtype: torch.dtype, parts: int, later: Sequence[Tensor] = ()
) -> list[Tensor]:
    """The same, (O, p), its sums over columns in up to so many parts: for matrices of few rows, so that more works."""
    parts = min(parts, ceil_div(len(x_I), UNIT))
    found: list[Tensor] = []
    for first in range(0, len(matrices), MOST):
        some = matrices[first : first + MOST]
        y_Op = matvec(
            x_I,
            [matrix.word_OW for matrix in some],
            [matrix.scale_OG for matrix in some],
            [matrix.zero_OG for matrix in some],
            [matrix.bits for matrix in some],
            [matrix.group_size for matrix in some],
            [matrix.left for matrix in some],
            [matrix.left_scale for matrix in some],
            [matrix.left_zero for matrix in some],
            [matrix.hidden_rp for matrix in some],
            [matrix.factor_bits for matrix in some],
            later,
            dtype,
            parts,
        )
        found.extend(y_Op.split([len(matrix.word_OW) for matrix in some]))
    return found


def serves(columns: int, bits: int, group_size: int) -> bool:
    """Whether the kernel multiplies such a matrix: rows that loads of 16 bytes fit, groups of 32 or of whole chunks."""
    fits = columns % (2 * CHUNK) == 0 and (group_size == RUN or group_size % CHUNK == 0)
    return bits in PLANES and fits and shared_bytes(columns) <= SHARED_BYTES


def shared_bytes(columns: int) -> int:
    """For x: of every 64 numbers 128 bytes, a scale and two sums."""
    return ceil_div(columns, UNIT) * UNIT // CHUNK * 144


@torch.library.custom_op("bitrank::matvec", mutates_args=())
def matvec(
    x_I: Tensor,
    words: Sequence[Tensor],
    scales: Sequence[Tensor],
    zeros: Sequence[Tensor],
    bits: Sequence[int],
    group_sizes: Sequence[int],
    lefts: Sequence[Tensor | None],
    left_scales: Sequence[Tensor | None],
    left_zeros: Sequence[Tensor | None],
    hiddens: Sequence[Tensor | None],
    factor_bits: Sequence[int],
    later: Sequence[Tensor],
    dtype: torch.dtype,
    parts: int,
) -> Tensor:
    """All products after each other, as `products` describes them: at most `MOST` matrices, one launch."""
    tiles = sum(ceil_div(len(word_OW), TILE) for word_OW in words)
    y_Op = torch.empty(sum(map(len, words)), parts, dtype=dtype, device=x_I.device)
    x_I = x_I if x_I.data_ptr() % 16 == 0 else x_I.clone()
    arguments: list[Tensor | int] = [x_I, KINDS[x_I.dtype], len(x_I), y_Op, KINDS[dtype], tiles]
    first_tile = first_row = 0
    for i in range(MOST):
        if i >= len(words):
            arguments += [x_I, x_I, x_I, 0, 0, 0, x_I, x_I, x_I, x_I, 0, 0, 0, tiles, 0, 0, 0]
            continue
        rows, hidden_rp = len(words[i]), hiddens[i]
        arguments += [words[i], scales[i], zeros[i], rows, bits[i], group_sizes[i]]
        arguments += [
            x_I if part is None else part for part in (lefts[i], left_scales[i], left_zeros[i], hidden_rp)
        ]
        rank, hidden_parts = (0, 0) if hidden_rp is None else hidden_rp.shape
        arguments += [hidden_parts, rank, factor_bits[i]]
        arguments += [first_tile, first_row, scales[i].shape[1], ceil_div(CHUNK << 16, group_sizes[i])]
        first_tile, first_row = first_tile + ceil_div(rows, TILE), first_row + rows
    left = READ_AHEAD_BYTES
    for tensor in [*later, *[x_I] * MOST_LATER][:MOST_LATER]:
        size = 0 if tensor is x_I or tensor.data_ptr() % 16 else min(left, tensor.nbytes) // 16 * 16
        arguments += [tensor, size]
        left -= size
    found = _compiled(x_I.device.index)
    assert found is not None
    kernel, multiprocessors = found
    blocks, warps = shape(tiles, ceil_div(ceil_div(len(x_I), UNIT), parts), multiprocessors)
    grid, block = (min(tiles, blocks), parts, 1), (32 * warps, 1, 1)
    with torch.cuda.device_of(x_I):
        kernel(grid=grid, block=block, args=arguments, shared_mem=shared_bytes(len(x_I)))
    return y_Op


@cache
def shape(tiles: int, units: int, multiprocessors: int) -> tuple[int, int]:
    """Thread blocks, and warps of each: two small ones to a multiprocessor, or one, so that few warps are idle.

    units: of a tile. As many warps as may be where it hardly matters, and two thread blocks where sharing x, which each
    does for itself, takes little.
    """
    shapes = [(multiprocessors, warps) for warps in range(WARPS, FEWEST_WARPS - 1, -1)]
    shapes.insert(0 if units <= WARPS else len(shapes), (2 * multiprocessors, WARPS // 2))

    def turns(shape: tuple[int, int]) -> int:
        """Of all warps of a multiprocessor."""
        blocks, warps = shape
        return ceil_div(ceil_div(tiles, blocks) * units, warps) * warps * blocks // multiprocessors

    least = min(map(turns, shapes))
    return next(shape for shape in shapes if turns(shape) <= 1.03 * least)


@matvec.register_fake
def _(x_I: Tensor, words: Sequence[Tensor], *rest: object) -> Tensor:
    *_, dtype, parts = rest
    assert isinstance(dtype, torch.dtype) and isinstance(parts, int)
    return x_I.new_empty(sum(len(word_OW) for word_OW in words), parts, dtype=dtype)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # untyped in torch
def is_available(index: int) -> bool:
    """Whether the card and this torch can have the kernel, which is compiled here. Warns where they cannot."""
    return _compiled(index) is not None


def source() -> str:
    """What is compiled."""
    return (Path(__file__).parent / "matvec.cu").read_text()


@cache
def _compiled(index: int) -> tuple[Callable[..., None], int] | None:
    """The kernel for a card and the card's multiprocessors; None where torch, or the card, is too old for it."""
    if torch.version.hip is not None:
        return None
    try:
        with torch.cuda.device(index):
            kernel: Any = torch.cuda._compile_kernel(source(), "matvec")
            kernel.set_shared_memory_config(SHARED_BYTES)
    except (AttributeError, OSError, RuntimeError) as error:
        warnings.warn(f"decoding without a CUDA kernel, which is slow: {error}", stacklevel=2)
        return None
    return kernel, torch.cuda.get_device_properties(index).multi_processor_count
