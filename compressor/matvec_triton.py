"""One token times a packed matrix, in Triton: codes are read packed and never written unpacked.

What lives here: the kernel of y = Q·x (+ L·h), its launch, and which layers it serves. The stored layout is
`packing.py`'s; everything larger than one token, and every other device, is for `linear.py`.

Letters: O rows, I columns, U = I / 16 units. A lane owns a unit, 16 neighbouring columns, of every row of its block;
4 lanes, a quad, own 64 columns: one group of 64, half of one of 128, or two of 32, which are multiplied one after the
other, the inputs of the other one set to zero.

Arithmetic. A code c is never converted: masked out of its word and put into a mantissa under a fixed exponent it is
the number c + 2^k, exactly, two of them per instruction, and the tensor core multiplies them with x and adds in
float32. Its matrix product is used for what every lane holds itself: lane l gives 16 codes of two rows as its part of
A and its own 16 inputs as its part of B, so that C[q, q] is quad q's product; the other entries are unused. What the
2^k add, and the sum of x that a zero point multiplies, come from the same product with constants in A's place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compressor.packing import PLANES
from compressor.ptx import constant_asm, plane_asm

UNIT = 16
ROWS = tl.constexpr(8)
"""Rows that one pass of a program's lanes computes together."""
_LOAD = tl.constexpr(
    "{.reg .b32 w<8>; ld.global.v4.b32 {w0, w1, w2, w3}, [$8]; ld.global.v4.b32 {w4, w5, w6, w7}, [$8+16]; "
    + " ".join(
        f"prmt.b32 ${2 * i}, w{i}, w{i + 4}, 0x5410; prmt.b32 ${2 * i + 1}, w{i}, w{i + 4}, 0x7632;"
        for i in range(4)
    )
    + "}"
)


@torch.library.custom_op("bitrank::matvec", mutates_args=())
def matvec(
    x_I: Tensor,
    word_OW: Tensor,
    scale_OG: Tensor,
    zero_OG: Tensor,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
    left: Tensor | None = None,
    left_scale: Tensor | None = None,
    left_zero: Tensor | None = None,
    hidden_r: Tensor | None = None,
    factor_bits: int = 0,
) -> Tensor:
    """Q·x, and L·hidden added where there is an L; (O,) in `dtype`.

    x (I,) bfloat16 or float16; words, bfloat16 scales and uint8 zero points as stored, the latter unpacked. left is
    stored as its transpose (rank, O), packed or bfloat16, hidden (rank,) float32.
    """
    rows, columns = len(word_OW), len(x_I)
    first, *rest = PLANES[bits]
    warps, chunks = _shape(columns)
    y_O = torch.empty(rows, dtype=dtype, device=x_I.device)
    _matvec[(triton.cdiv(rows, 8),)](
        x_I if x_I.data_ptr() % 16 == 0 else x_I.clone(),
        word_OW.view(torch.uint16),
        word_OW,
        word_OW.view(torch.int64),
        scale_OG,
        zero_OG,
        left,
        left,
        left_scale,
        left_zero,
        hidden_r,
        y_O,
        rows,
        constant_asm(PLANES[bits], x_I.dtype),
        plane_asm(first, 0, x_I.dtype),
        plane_asm(rest[0], first, x_I.dtype) if rest else "",
        first,
        rest[0] if rest else 0,
        columns,
        group_size,
        0 if hidden_r is None else len(hidden_r),
        factor_bits,
        32 * warps,
        chunks,
        num_warps=warps,
        maxnreg=128 if bits < 8 and group_size != 32 else None,
    )
    return y_O


@matvec.register_fake
def _(x_I: Tensor, word_OW: Tensor, *rest: object) -> Tensor:
    dtype = rest[4]
    assert isinstance(dtype, torch.dtype)
    return x_I.new_empty(len(word_OW), dtype=dtype)


def _shape(columns: int) -> tuple[int, int]:
    """Warps, and units of a lane: two units where 8 warps reach, else 4 warps that walk along the row."""
    units = columns // UNIT
    for warps in (1, 2, 4, 8):
        if units <= 64 * warps:
            return warps, -(-units // (32 * warps))
    return 4, -(-units // 128)


@triton.jit
def _add8(a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6, a7 + b7


@triton.jit
def _inputs(x_ptr, unit, mine, units: tl.constexpr):
    """A lane's 16 inputs as 8 registers, j in the low half and j + 8 in the high half; zeros where they are not mine.

    Two loads of 16 bytes: 4 bytes at a time the lanes' strides would keep the load units busier than the weights do.
    """
    place = (x_ptr + tl.minimum(unit, units - 1) * 16).to(tl.int64)
    x = tl.inline_asm_elementwise(
        _LOAD, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,l", [place], dtype=(tl.int32,) * 8, is_pure=False, pack=1
    )
    pairs = ()
    for j in tl.static_range(8):
        pairs = pairs + (tl.where(mine, x[j], 0),)
    return pairs


@triton.jit
def _words(w16_ptr, w32_ptr, w64_ptr, first, lane, inside, width: tl.constexpr):
    """A lane's 16 codes of one plane; `first` counts 32-bit words."""
    if width == 0:
        return lane
    elif width == 1:
        return tl.load(w16_ptr + lane + first * 2, mask=inside, other=0).to(tl.int32)
    elif width == 2:
        return tl.load(w32_ptr + lane + first, mask=inside, other=0)
    else:
        return tl.load(w64_ptr + lane + first // 2, mask=inside, other=0)


@triton.jit
def _constants(asm: tl.constexpr, x):
    return tl.inline_asm_elementwise(
        asm,
        "=&f,=&f,=&f,=&f,r,r,r,r,r,r,r,r",
        [x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]],
        dtype=(tl.float32,) * 4,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _multiply(
    asm: tl.constexpr, asm2: tl.constexpr, width: tl.constexpr, width2: tl.constexpr, a, b, d, e, x
):
    """8 sums of 4 rows over both planes, two independent chains of tensor core instructions; a row is its two words."""
    kind: tl.constexpr = ",l" if width == 4 else ",r"
    kind2: tl.constexpr = ",l" if width2 == 4 else ",r"
    c = tl.inline_asm_elementwise(
        asm,
        "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f" + kind * 4 + ",r,r,r,r,r,r,r,r",
        [a[0], b[0], d[0], e[0], x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]],
        dtype=(tl.float32,) * 8,
        is_pure=True,
        pack=1,
    )
    if width2 > 0:
        c = tl.inline_asm_elementwise(
            asm2,
            "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f" + kind2 * 4 + ",r,r,r,r,r,r,r,r,f,f,f,f,f,f,f,f",
            [a[1], b[1], d[1], e[1], x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7],
             c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]],
            dtype=(tl.float32,) * 8,
            is_pure=True,
            pack=1,
        )  # fmt: skip
    return c


@triton.jit
def _chunk(
    w16_ptr,
    w32_ptr,
    w64_ptr,
    scale_ptr,
    zero_ptr,
    start,
    rows,
    lane,
    chunk,
    units: tl.constexpr,
    width: tl.constexpr,
    width2: tl.constexpr,
    group_size: tl.constexpr,
    parts: tl.constexpr,
    lanes: tl.constexpr,
):
    """What a lane needs of one unit of 8 rows: of each, the words of both planes, and scale and zero point per part."""
    groups: tl.constexpr = (units * 16 + group_size - 1) // group_size
    inside = chunk * lanes + lane < units
    found = ()
    for i in tl.static_range(ROWS):
        row = tl.minimum(start + i, rows - 1).to(tl.int64)
        first = row * (units // 2 * (width + width2)) + chunk * lanes * width // 2
        second = row * (units // 2 * (width + width2)) + (units // 2 * width + chunk * lanes * width2 // 2)
        grids = ()
        for part in tl.static_range(parts):
            group = lane // 4 * 64 // group_size + (
                row * groups + (chunk * (lanes * 16 // group_size) + part)
            )
            scale = tl.load(scale_ptr + group, mask=inside, other=0)
            grids = grids + ((scale, tl.load(zero_ptr + group, mask=inside, other=0)),)
        code = (
            _words(w16_ptr, w32_ptr, w64_ptr, first, lane, inside, width),
            _words(w16_ptr, w32_ptr, w64_ptr, second, lane, inside, width2),
        )
        found = found + ((code, grids),)
    return found


@triton.jit
def _scaled(c0, c1, odd, grid, constant):
    """One chunk's part of one row: of the two sums on the diagonal the lane's, less what is not code, times scale."""
    product = tl.where(odd, c1, c0) - constant[0]
    return grid[0].to(tl.float32) * (product - grid[1].to(tl.float32) * constant[1])


@triton.jit
def _accumulate(
    sums,
    rows8,
    x_ptr,
    unit,
    lane,
    constant_asm: tl.constexpr,
    asm: tl.constexpr,
    asm2: tl.constexpr,
    width: tl.constexpr,
    width2: tl.constexpr,
    units: tl.constexpr,
    parts: tl.constexpr,
    lanes: tl.constexpr,
):
    """Add one unit's part of 8 rows."""
    odd = (lane >> 2) % 2 == 1
    for part in tl.static_range(parts):
        x = _inputs(x_ptr, unit, (unit < units) & ((parts == 1) | ((lane >> 1) % 2 == part)), units)
        c = _constants(constant_asm, x)
        constant = (tl.where(odd, c[1], c[0]), tl.where(odd, c[3], c[2]))
        new = ()
        for i in tl.static_range(0, ROWS, 4):
            a, b, d, e = rows8[i], rows8[i + 1], rows8[i + 2], rows8[i + 3]
            c = _multiply(asm, asm2, width, width2, a[0], b[0], d[0], e[0], x)
            new = new + (
                sums[i] + _scaled(c[0], c[1], odd, a[1][part], constant),
                sums[i + 1] + _scaled(c[2], c[3], odd, b[1][part], constant),
                sums[i + 2] + _scaled(c[4], c[5], odd, d[1][part], constant),
                sums[i + 3] + _scaled(c[6], c[7], odd, e[1][part], constant),
            )
        sums = new
    return sums


@triton.jit
def _low_rank(
    sums,
    left16_ptr,
    left32_ptr,
    left_scale_ptr,
    left_zero_ptr,
    hidden_ptr,
    start,
    lane,
    rows,
    rank: tl.constexpr,
    factor_bits: tl.constexpr,
    lanes: tl.constexpr,
):
    """Add L·h of 8 rows: a lane takes every `lanes`-th of L's vectors, whose 8 codes lie in one word of a plane."""
    runs = (rows + 31) // 32
    for first in tl.static_range(0, rank, lanes):
        vector = first + lane
        inside = vector < rank
        hidden = tl.load(hidden_ptr + vector, mask=inside, other=0)
        added = ()
        if factor_bits == 16:
            for i in tl.static_range(ROWS):
                row = tl.minimum(start + i, rows - 1)
                added = added + (
                    tl.load(left16_ptr + vector * rows + row, mask=inside, other=0).to(tl.float32),
                )
        else:
            place = vector * runs * factor_bits + start // 8
            low = tl.load(left32_ptr + place, mask=inside, other=0)
            group = vector * ((rows + 63) // 64) + start // 64
            hidden *= tl.load(left_scale_ptr + group, mask=inside, other=0).to(tl.float32)
            zero = tl.load(left_zero_ptr + group, mask=inside, other=0).to(tl.int32)
            high = tl.zeros_like(low)
            if factor_bits == 8:
                high = tl.load(left32_ptr + place + runs * 4, mask=inside, other=0)
            for i in tl.static_range(ROWS):
                code = ((low >> (4 * i)) & 15) | (((high >> (4 * i)) & 15) << 4)
                added = added + ((code - zero).to(tl.float32),)
        more = ()
        for i in tl.static_range(ROWS):
            more = more + (sums[i] + hidden * added[i],)
        sums = more
    return sums


@triton.jit
def _matvec(
    x_ptr,
    w16_ptr,
    w32_ptr,
    w64_ptr,
    scale_ptr,
    zero_ptr,
    left16_ptr,
    left32_ptr,
    left_scale_ptr,
    left_zero_ptr,
    hidden_ptr,
    y_ptr,
    rows,
    constant_asm: tl.constexpr,
    asm: tl.constexpr,
    asm2: tl.constexpr,
    width: tl.constexpr,
    width2: tl.constexpr,
    columns: tl.constexpr,
    group_size: tl.constexpr,
    rank: tl.constexpr,
    factor_bits: tl.constexpr,
    lanes: tl.constexpr,
    chunks: tl.constexpr,
):
    lane = tl.arange(0, lanes)
    owner = ((lane >> 3) & 3) == (lane & 3)
    units: tl.constexpr = columns // 16
    parts: tl.constexpr = 2 if group_size == 32 else 1
    nothing = tl.zeros((lanes,), tl.float32)
    start = tl.program_id(0) * ROWS
    sums = (nothing,) * 8
    if chunks <= 2:
        now = ()
        for chunk in tl.static_range(chunks):
            now = now + (
                _chunk(
                    w16_ptr, w32_ptr, w64_ptr, scale_ptr, zero_ptr, start, rows, lane,
                    chunk, units, width, width2, group_size, parts, lanes,
                ),
            )  # fmt: skip
        tl.debug_barrier()
        for chunk in tl.static_range(chunks):
            sums = _accumulate(
                sums, now[chunk], x_ptr, chunk * lanes + lane, lane,
                constant_asm, asm, asm2, width, width2, units, parts, lanes,
            )  # fmt: skip
    else:
        now = _chunk(
            w16_ptr, w32_ptr, w64_ptr, scale_ptr, zero_ptr, start, rows, lane,
            0, units, width, width2, group_size, parts, lanes,
        )  # fmt: skip
        for chunk in range(chunks):
            after = _chunk(
                w16_ptr, w32_ptr, w64_ptr, scale_ptr, zero_ptr, start, rows, lane,
                chunk + 1, units, width, width2, group_size, parts, lanes,
            )  # fmt: skip
            tl.debug_barrier()
            sums = _accumulate(
                sums, now, x_ptr, chunk * lanes + lane, lane,
                constant_asm, asm, asm2, width, width2, units, parts, lanes,
            )  # fmt: skip
            now = after
    owned = ()
    for i in tl.static_range(ROWS):
        owned = owned + (tl.where(owner, sums[i], 0.0),)
    sums = owned
    if rank > 0:
        sums = _low_rank(
            sums,
            left16_ptr,
            left32_ptr,
            left_scale_ptr,
            left_zero_ptr,
            hidden_ptr,
            start,
            lane,
            rows,
            rank,
            factor_bits,
            lanes,
        )
    y = tl.reduce(sums, 0, _add8)
    for i in tl.static_range(ROWS):
        tl.store(y_ptr + start + i, y[i].to(y_ptr.dtype.element_ty), mask=start + i < rows)
