"""A warp that executes the few PTX instructions of the decode kernel, so that a machine without a GPU can test it.

Run as a script, it multiplies with layers through the whole kernel, in Triton's interpreter.
"""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LANES = 32
QUAD_OF_LANE = torch.arange(LANES) // 4


def halves(register_l: Tensor, dtype: torch.dtype) -> Tensor:
    """The two numbers in each lane's register, float32 (32, 2)."""
    return (
        torch.stack([register_l & 0xFFFF, (register_l >> 16) & 0xFFFF], dim=1)
        .to(torch.uint16)
        .view(dtype)
        .float()
    )


class Warp:
    """32 lanes; a register is one int64 or float32 per lane."""

    def __init__(self, dtype: torch.dtype, operands: dict[str, Tensor]) -> None:
        self.dtype = dtype
        self.register = dict(operands)
        self.instructions = {
            "mov": self.mov,
            "ld": self.ld,
            "shl": lambda to, a, by: self.set(to, (self[a] << self[by]) & 0xFFFFFFFF),
            "shr": lambda to, a, by: self.set(to, (self[a] & 0xFFFFFFFF) >> self[by]),
            "or": lambda to, a, b: self.set(to, self[a] | self[b]),
            "lop3": self.lop3,
            "prmt": self.prmt,
            "mma": self.mma,
        }

    def __getitem__(self, name: str) -> Tensor:
        if name == "0f00000000":
            return torch.zeros(LANES)
        return self.register[name] if name in self.register else torch.tensor(int(name, 0))

    def set(self, name: str, value: Tensor) -> None:
        self.register[name] = value

    def run(self, text: str) -> None:
        for line in re.split(r";\s*", text.strip("{}\n ")):
            name, _, operands = line.partition(" ")
            if name and not name.startswith("."):
                self.instructions[name.split(".")[0]](*re.findall(r"\$?\w+", operands))

    def mov(self, *names: str) -> None:
        if len(names) == 2:
            self.set(names[0], self[names[1]].expand(LANES))
            return
        self.set(names[0], self[names[2]] & 0xFFFFFFFF)
        self.set(names[1], (self[names[2]] >> 32) & 0xFFFFFFFF)

    def ld(self, *names: str) -> None:
        address_l = self[names[4]] + (int(names[5]) if len(names) > 5 else 0)
        words_l4 = torch.tensor([list((ctypes.c_uint32 * 4).from_address(a)) for a in address_l.tolist()])
        for name, word_l in zip(names[:4], words_l4.T, strict=True):
            self.set(name, word_l)

    def prmt(self, to: str, low: str, high: str, picks: str) -> None:
        source = (self[low] & 0xFFFFFFFF) | (self[high] << 32)
        picked = [(source >> 8 * int(digit)) & 0xFF for digit in reversed(picks[2:])]
        self.set(to, torch.stack([byte << 8 * i for i, byte in enumerate(picked)]).sum(dim=0))

    def lop3(self, to: str, a: str, b: str, c: str, table: str) -> None:
        assert table == "0xea"
        self.set(to, (self[a] & self[b]) | self[c])

    def mma(self, *names: str) -> None:
        """m16n8k16 by the fragment layout of the PTX manual: lane = 4 · row + column pair."""
        out, a, b, c = names[:4], names[4:8], names[8:10], names[10:]
        a_mk, b_kn = torch.zeros(16, 16), torch.zeros(16, 8)
        for block in (0, 1):
            columns = slice(8 * block, 8 * block + 8)
            for half in (0, 1):
                part = halves(self[a[2 * block + half]], self.dtype).reshape(8, 8)
                a_mk[8 * half : 8 * half + 8, columns] = part
            b_kn[columns] = halves(self[b[block]], self.dtype).reshape(8, 8).T
        c_mn = a_mk @ b_kn
        before = [self[name] for name in c]
        for i, name in enumerate(out):
            rows, columns_l = QUAD_OF_LANE + 8 * (i // 2), 2 * (torch.arange(LANES) % 4) + i % 2
            self.set(name, before[i] + c_mn[rows, columns_l])


def inline_asm_elementwise(
    asm: Any, constraints: Any, args: list[Any], dtype: Any, is_pure: bool, pack: int
) -> tuple[Any, ...]:
    """Triton's function of this name, for the interpreter."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def value_n(arg: Any) -> Tensor:
        data = torch.from_numpy(arg.handle.data.copy())
        return data.float() if data.is_floating_point() else data.to(torch.int64)

    types = list(dtype)
    names = [f"${len(types) + i}" for i in range(len(args))]
    values = [value_n(arg) for arg in args]
    results: list[list[Tensor]] = [[] for _ in types]
    for first in range(0, len(values[0]), LANES):
        part = slice(first, first + LANES)
        text = str(getattr(asm, "value", asm))
        warp = Warp(
            torch.float16 if ".f16.f16" in text else torch.bfloat16,
            {name: value[part] for name, value in zip(names, values, strict=True)},
        )
        warp.run(text)
        for i, result in enumerate(results):
            result.append(warp[f"${i}"].expand(LANES))

    def tensor(result: list[Tensor], kind: Any) -> Any:
        data = torch.cat(result)
        signed = data if data.is_floating_point() else (data ^ 2**31) - 2**31
        array = signed.to(torch.float32 if kind == tl.float32 else torch.int32).numpy()
        return tl.tensor(TensorHandle(array, kind), tl.block_type(kind, [len(array)]))

    return tl.tuple([tensor(result, kind) for result, kind in zip(results, types, strict=True)])


def multiply_in_the_interpreter(folder: Path) -> None:
    """Of every layer: Q·x in float32, and its output in the input's precision, cut off, as the interpreter casts."""
    from compressor import matvec_triton

    matvec_triton.tl.inline_asm_elementwise = inline_asm_elementwise
    outputs = []
    for layer, x_I in torch.load(folder / "layers.pt", weights_only=False):
        bits, group_size = layer.option.bits, layer.option.group_size
        product_O = matvec_triton.matvec(
            x_I,
            layer.weight,
            layer.weight_scale,
            layer.zero_points("weight"),
            bits,
            group_size,
            torch.float32,
        )
        outputs.append((product_O, layer._decode(x_I[None])[0]))
    torch.save(outputs, folder / "outputs.pt")


if __name__ == "__main__":
    multiply_in_the_interpreter(Path(sys.argv[1]))
