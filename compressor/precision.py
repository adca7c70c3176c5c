"""Products of float32 matrices on CUDA whose factors may be rounded to 11 bits, several times as fast.

What lives here: the two ways. Both are for the errors that are measured, the subspaces that are sought, the residuals
that factors are fitted to, the activations of which second moments are taken, and the errors that GPTQ and descent
spread: 2⁻¹¹ of a term changes none of them (of GPTQ's output error at most 0.05 %, either way, at any width:
`docs/gpu.md`). Factorizations, gradients and what is written stay in float32. Sums are float32 in either way, and on a
CPU nothing is rounded at all.

`tensor_cores` has cuBLAS round to TF32 as it goes. An `Operand` is rounded once, to float16, and multiplied twice as
fast; a power of two puts its largest number, and room for larger ones, at the top of float16's range, so that what is
2⁻²¹ of the largest, 2⁻²⁹ where no room is left, is still rounded to 11 bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

ROOM = 2.0**8
"""How often the largest number goes into float16's range where larger ones are to come."""
LARGEST = 2.0**15


@contextmanager
def tensor_cores() -> Iterator[None]:
    """While open, products on CUDA use TF32; elsewhere nothing changes."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@dataclass(frozen=True, slots=True)
class Operand:
    """A factor of products: `unit`, a power of two, times `values`, float16 on CUDA and float32 elsewhere."""

    values: Tensor
    unit: float

    @classmethod
    def of(cls, x: Tensor, largest: float | None = None) -> Operand:
        """A matrix, float32, and room for numbers up to `largest` in its place. On a CPU it is kept, not copied."""
        if x.device.type != "cuda":
            return cls(x, 1.0)
        operand = cls.empty_like(x, largest_of(x) if largest is None else largest)
        operand.put(x)
        return operand

    @classmethod
    def empty_like(cls, x: Tensor, largest: float) -> Operand:
        """Of the shape of x, for numbers up to `largest`."""
        if x.device.type != "cuda":
            return cls(torch.empty_like(x), 1.0)
        fits = 0 < largest < math.inf
        unit = 2.0 ** math.ceil(math.log2(largest / LARGEST)) if fits else 1.0
        return cls(torch.empty_like(x, dtype=torch.float16), unit)

    def put(self, x: Tensor) -> None:
        """Take up other numbers of the same shape."""
        if self.values.dtype == torch.float16:
            torch.mul(x, 1 / self.unit, out=self.values)
        else:
            self.values.copy_(x)

    def __getitem__(self, part: int | slice | tuple[slice, slice]) -> Operand:
        return Operand(self.values[part], self.unit)

    @property
    def T(self) -> Operand:  # noqa: N802  as torch calls it
        return Operand(self.values.T, self.unit)


def largest_of(x: Tensor) -> float:
    """The largest magnitude; 0 of none."""
    return torch.stack(x.aminmax()).abs().amax().item() if x.numel() else 0.0


def product(left: Operand, right: Operand, out: Tensor | None = None) -> Tensor:
    """left · right, float32."""
    if out is None:
        out = left.values.new_empty(left.values.shape[0], right.values.shape[1], dtype=torch.float32)
    return _add_product(out, left, right, 1.0, 0.0)


def subtract_product(onto: Tensor, left: Operand, right: Operand) -> None:
    """onto − left · right, in place; float32."""
    _add_product(onto, left, right, -1.0, 1.0)


def _add_product(onto: Tensor, left: Operand, right: Operand, sign: float, keep: float) -> Tensor:
    alpha = sign * left.unit * right.unit
    if left.values.dtype == torch.float32:
        return torch.addmm(onto, left.values, right.values, alpha=alpha, beta=keep, out=onto)
    return torch.addmm(
        onto, left.values, right.values, out_dtype=torch.float32, alpha=alpha, beta=keep, out=onto
    )
