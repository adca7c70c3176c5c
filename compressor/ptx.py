"""PTX of the decode kernel: packed codes made numbers, and multiplied by the tensor core.

What lives here: text only, as `matvec_triton.py` needs it; what it computes is explained there. A plane is one of the
bit planes of `packing.py`.
"""

from __future__ import annotations

import torch

_MANTISSA = {torch.bfloat16: (7, 127, "bf16"), torch.float16: (10, 15, "f16")}
"""Bits of the mantissa, bias of the exponent, and PTX's name."""


def plane_asm(width: int, low: int, dtype: torch.dtype) -> str:
    """PTX that multiplies a lane's 16 codes of one plane, of 4 rows, with its 16 inputs.

    Operands: 8 sums out, 4 for each pair of rows; the 4 rows' words; 8 registers of inputs (j, j + 8); and, but
    for the plane of the lowest bits, the sums to add to. `low` is the significance of the plane's lowest bit.
    """
    mantissa, bias, name = _MANTISSA[dtype]
    pairs, rows, inputs = 2, 4, 12
    lines = [
        f".reg .b32 s<{2 * rows}>, t<{2 * rows}>, a<{8 * rows}>;",
        ".reg .f32 zero;",
        "mov.f32 zero, 0f00000000;",
    ]
    for row in range(rows):
        word, first, second = f"${4 * pairs + row}", f"s{2 * row}", f"s{2 * row + 1}"
        low_half, high_half = f"t{2 * row}", f"t{2 * row + 1}"
        if width == 4:
            lines += [
                f"mov.b64 {{{low_half}, {high_half}}}, {word};",
                f"prmt.b32 {first}, {low_half}, {high_half}, 0x5410;",
                f"prmt.b32 {second}, {low_half}, {high_half}, 0x7632;",
            ]
        elif width == 2:
            lines.append(f"mov.b32 {first}, {word};")
        else:
            lines += [f"shl.b32 {low_half}, {word}, 8;", f"or.b32 {first}, {low_half}, {word};"]
        lines += _numbers(width, low, mantissa, bias, row)
    for step in range(4):
        for pair in range(pairs):
            sums = ", ".join(f"${4 * pair + i}" for i in range(4))
            before = ", ".join(f"${inputs + 8 + 4 * pair + i}" if low else "zero" for i in range(4))
            a = ", ".join(f"a{8 * (2 * pair + row) + j}" for j in (2 * step, 2 * step + 1) for row in (0, 1))
            lines.append(
                f"mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32 {{{sums}}}, {{{a}}},"
                f" {{${inputs + 2 * step}, ${inputs + 2 * step + 1}}}, {{{sums if step else before}}};"
            )
    return "{\n" + "\n".join(lines) + "\n}"


def constant_asm(widths: tuple[int, ...], dtype: torch.dtype) -> str:
    """PTX of what the 2^k of all planes add to a product, and of the plain sum of the inputs, as rows 0 and 1.

    Operands: 4 sums out; 8 registers of inputs.
    """
    mantissa, bias, name = _MANTISSA[dtype]
    lines, low = [".reg .b32 a<4>;", ".reg .f32 zero;", "mov.f32 zero, 0f00000000;"], 0
    for plane, width in enumerate(widths):
        places = [place for _, place in _places(width, mantissa)]
        one = (bias << mantissa) * 0x10001 if plane == 0 else 0
        for step in range(4):
            lines += [
                f"mov.b32 a{2 * i + row}, {value:#x};"
                for i, place in enumerate(places[2 * step : 2 * step + 2])
                for row, value in enumerate((_magic(mantissa, bias, place, low), one))
            ]
            before = "$0, $1, $2, $3" if plane or step else "zero, zero, zero, zero"
            lines.append(
                f"mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32 {{$0, $1, $2, $3}}, {{a0, a1, a2, a3}},"
                f" {{${4 + 2 * step}, ${5 + 2 * step}}}, {{{before}}};"
            )
        low += width
    return "{\n" + "\n".join(lines) + "\n}"


def _magic(mantissa: int, bias: int, place: int, low: int) -> int:
    """Twice the half-precision number 2^(mantissa − place + low): a code at `place` adds code · 2^low to it."""
    return (bias + mantissa - place + low << mantissa) * 0x10001


def _places(width: int, mantissa: int) -> list[tuple[int, int]]:
    """Of the codes j = 0 … 7: the right shift each is taken with, and the bit where it comes to stand.

    It stands in the upper 7 bits of the mantissa, so that k is at most 7: what the 2^k add must not drown it.
    """
    found = []
    shift = 0
    for j in range(8):
        bit = (j % 4 if width == 4 else j) * width
        if bit == 0 or bit - shift + width > mantissa:
            shift = bit - (mantissa - 7)
        found.append((shift, bit - shift))
    return found


def _numbers(width: int, low: int, mantissa: int, bias: int, row: int) -> list[str]:
    """Lines that make the codes j and j + 8 of one row two numbers."""
    lines: list[str] = []
    for j, (shift, place) in enumerate(_places(width, mantissa)):
        word = f"s{2 * row + j // 4}" if width == 4 else f"s{2 * row}"
        source = f"t{2 * row}" if shift else word
        if shift and place == mantissa - 7:
            lines.append(f"{'shr' if shift > 0 else 'shl'}.b32 {source}, {word}, {abs(shift)};")
        mask = (2**width - 1 << place) * 0x10001
        lines.append(
            f"lop3.b32 a{8 * row + j}, {source}, {mask:#x}, {_magic(mantissa, bias, place, low):#x}, 0xea;"
        )
    return lines
