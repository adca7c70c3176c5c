"""Products of float32 matrices on CUDA whose factors may be rounded to 11 bits, several times as fast.

What lives here: the two ways. Both are for the errors that are measured, the subspaces that are sought, the residuals
that factors are fitted to, the activations of which second moments are taken, and the errors that GPTQ and descent
spread: 2⁻¹¹ of a term changes none of them (of GPTQ's output error at most 0.07 %, either way, at any width:
`docs/gpu.md`). Factorizations, gradients and what is written stay in float32. Sums are float32 in either way, and on a
CPU nothing is rounded at all.

`tensor_cores` has cuBLAS round to TF32 as it goes, for all threads, so it is for what runs alone. An `Operand` is
rounded once, to float16, and multiplied twice as fast; a power of two puts its largest number, and room for larger
ones, at the top of float16's range, so that what is 2⁻²¹ of the largest, 2⁻²⁹ where no room is left, is still rounded
to 11 bits.
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
    """While open, products on CUDA use TF32, those of other threads too; elsewhere nothing changes."""
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
        unit = _unit(largest_of(x) if largest is None else largest)
        operand = cls(torch.empty_like(x, dtype=torch.float16), unit)
        operand.put(x)
        return operand

    @classmethod
    def empty(cls, rows: int, columns: int, device: torch.device, largest: float) -> Operand:
        """A matrix for numbers up to `largest`."""
        if device.type != "cuda":
            return cls(torch.empty(rows, columns, device=device), 1.0)
        return cls(torch.empty(rows, columns, device=device, dtype=torch.float16), _unit(largest))

    def put(self, x: Tensor) -> None:
        """Take up other numbers of the same shape."""
        if self.values.dtype == torch.float16:
            torch.mul(x, 1 / self.unit, out=self.values)
        else:
            self.values.copy_(x)

    def dense(self) -> Tensor:
        """float32."""
        return self.values.float() * self.unit if self.values.dtype == torch.float16 else self.values

    def bound(self) -> float:
        """The largest magnitude, which a card is asked for; 0 on a CPU, where nothing needs room."""
        return largest_of(self.values) * self.unit if self.values.is_cuda else 0.0

    def squared_norms(self, parts: int, share_R: Tensor | None = None) -> Tensor:
        """‖x‖² of so many parts of as many rows each, float32; each row's times its share, where there are shares."""
        part_PRI = self.values.unflatten(0, (parts, -1))
        if share_R is not None:
            norm_PR: Tensor = torch.linalg.vector_norm(part_PRI, dim=2, dtype=torch.float32)
            return norm_PR.mul_(self.unit).square_() @ share_R
        norm_P: Tensor = torch.linalg.vector_norm(part_PRI, dim=(1, 2), dtype=torch.float32)
        return norm_P.mul_(self.unit).square_()

    def split(self, rows: list[int]) -> list[Operand]:
        """Parts of so many rows each."""
        return [Operand(part, self.unit) for part in self.values.split(rows)]

    def __getitem__(self, part: int | slice | tuple[slice, slice]) -> Operand:
        return Operand(self.values[part], self.unit)

    @property
    def T(self) -> Operand:
        return Operand(self.values.T, self.unit)


def _unit(largest: float) -> float:
    """The power of two that puts this number at the top of float16's range."""
    return 2.0 ** math.ceil(math.log2(largest / LARGEST)) if 0 < largest < math.inf else 1.0


def largest_of(*matrices: Tensor) -> float:
    """The largest magnitude of all; 0 of none."""
    ends = [end for x in matrices if x.numel() for end in x.aminmax()]
    return torch.stack(ends).abs().amax().item() if ends else 0.0


def product(left: Operand, right: Operand, out: Tensor | None = None) -> Tensor:
    """left · right, float32."""
    if out is None:
        out = left.values.new_empty(left.values.shape[0], right.values.shape[1], dtype=torch.float32)
    return _add_product(out, left, right, left.unit * right.unit, 0.0)


def put_product(onto: Operand, left: Operand, right: Operand) -> None:
    """left · right, whose sums are float32, taken up by an operand that has room for it."""
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = (
        False  # and stays so: threads share it
    )
    _add_product(onto.values, left, right, left.unit * right.unit / onto.unit, 0.0)


def subtract_product(onto: Tensor, left: Operand, right: Operand) -> None:
    """onto − left · right, in place; float32."""
    _add_product(onto, left, right, -left.unit * right.unit, 1.0)


def _add_product(onto: Tensor, left: Operand, right: Operand, by: float, keep: float) -> Tensor:
    if onto.dtype == left.values.dtype:
        return torch.addmm(onto, left.values, right.values, alpha=by, beta=keep, out=onto)
    return torch.addmm(
        onto, left.values, right.values, out_dtype=torch.float32, alpha=by, beta=keep, out=onto
    )
