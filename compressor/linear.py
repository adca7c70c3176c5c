"""The compressed layer: packed codes, grids and factors, and the matrix product with them.

What lives here: `CompressedLinear` and its tensors. Their bytes are counted in `allocator/storage.py`; writing them
to a checkpoint is for `worker.py`, loading them for `plugin.py`.

Tensors of a layer: `weight` int32 (O, words) packed codes, `weight_scale` bfloat16 (O, G), `weight_zero` int32
(1, words) packed zero points; for `left` and `right` the same three with O = rank, or one bfloat16 matrix. The
packed tensor carries the name of the original one, so that loading without the plug-in fails on its shape; in pure
low rank, where there is no Q, `left` does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allocator.storage import FACTOR_GROUP_SIZE, KEEP_BITS, Option, ceil_div
from compressor.decompose import Decomposition
from compressor.grid import Quantized
from compressor.packing import pack, unpack, words


def matrix_names(name: str) -> tuple[str, str, str]:
    """Names of a quantized matrix's codes, scales and zero points within its layer."""
    return name, f"{name}_scale", f"{name}_zero"


def matrix_tensors(name: str, matrix: Quantized | Tensor) -> dict[str, Tensor]:
    """The stored tensors of one quantized matrix, or of a bfloat16 factor."""
    if isinstance(matrix, Tensor):
        return {name: matrix.contiguous()}
    zero_1W = pack(matrix.zero_OG.reshape(1, -1), matrix.bits)
    parts = (pack(matrix.code_OI, matrix.bits), matrix.scale_OG.contiguous(), zero_1W)
    return dict(zip(matrix_names(name), parts, strict=True))


def left_name(option: Option) -> str:
    """Name of L: pure low rank has no Q, so L takes the name that stops other loaders."""
    return "left" if option.bits else "weight"


def layer_tensors(decomposition: Decomposition) -> dict[str, Tensor]:
    """Every stored tensor of a decomposed layer, by its name within the layer."""
    tensors: dict[str, Tensor] = {}
    if decomposition.quantized is not None:
        tensors |= matrix_tensors("weight", decomposition.quantized)
    if decomposition.factors is not None:
        tensors |= matrix_tensors(left_name(decomposition.option), decomposition.factors.left_rO)
        tensors |= matrix_tensors("right", decomposition.factors.right_rI)
    return tensors


class CompressedLinear(nn.Module):
    """y = x·Qᵀ + (x·Rᵀ)·Lᵀ + bias, with Q, L and R stored packed.

    Takes the place of `nn.Linear` (and of GPT-2's `Conv1D`) with `columns` inputs and `rows` outputs.
    """

    def __init__(self, rows: int, columns: int, option: Option, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = columns, rows
        self.option = option
        if option.bits:
            self._add_matrix("weight", rows, columns, option.bits, option.group_size)
        if option.rank:
            self._add_factor(left_name(option), rows)
            self._add_factor("right", columns)
        self.register_parameter("bias", _parameter((rows,), torch.get_default_dtype()) if bias else None)

    def _add_factor(self, name: str, width: int) -> None:
        rank, bits = self.option.rank, self.option.factor_bits
        if bits == KEEP_BITS:
            self.register_parameter(name, _parameter((rank, width), torch.bfloat16))
            return
        self._add_matrix(name, rank, width, bits, FACTOR_GROUP_SIZE)

    def _add_matrix(self, name: str, rows: int, columns: int, bits: int, group_size: int) -> None:
        codes, scale, zero = matrix_names(name)
        groups = ceil_div(columns, group_size)
        self.register_parameter(codes, _parameter((rows, words(columns, bits)), torch.int32))
        self.register_parameter(scale, _parameter((rows, groups), torch.bfloat16))
        self.register_parameter(zero, _parameter((1, words(rows * groups, bits)), torch.int32))

    def _dense(self, name: str, columns: int, bits: int, group_size: int) -> Tensor:
        word_OW, scale_OG, zero_1W = (getattr(self, part) for part in matrix_names(name))
        rows, groups = scale_OG.shape
        zero_OG = unpack(zero_1W, bits, rows * groups).view(rows, groups)
        return Quantized(unpack(word_OW, bits, columns), scale_OG, zero_OG, bits, group_size).dequantize()

    def _factor(self, name: str, width: int) -> Tensor:
        if self.option.factor_bits == KEEP_BITS:
            return getattr(self, name).float()
        return self._dense(name, width, self.option.factor_bits, FACTOR_GROUP_SIZE)

    def dense_weight(self) -> Tensor:
        """Q + L·R, float32 (O, I)."""
        weight_OI = torch.zeros(self.out_features, self.in_features)
        if self.option.bits:
            weight_OI = self._dense("weight", self.in_features, self.option.bits, self.option.group_size)
        if self.option.rank:
            left_rO = self._factor(left_name(self.option), self.out_features)
            weight_OI = weight_OI + left_rO.T @ self._factor("right", self.in_features)
        return weight_OI

    def forward(self, x: Tensor) -> Tensor:
        """x (…, I) -> (…, O), in the dtype of x."""
        output = x.new_zeros(*x.shape[:-1], self.out_features)
        if self.option.bits:
            weight_OI = self._dense("weight", self.in_features, self.option.bits, self.option.group_size)
            output = F.linear(x, weight_OI.to(x.dtype))
        if self.option.rank:
            hidden = F.linear(x, self._factor("right", self.in_features).to(x.dtype))
            output = output + hidden @ self._factor(left_name(self.option), self.out_features).to(x.dtype)
        return output if self.bias is None else output + self.bias.to(x.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, option={self.option}"


def _parameter(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)
