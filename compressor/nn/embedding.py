"""Tables: the input embedding and the output head, rounded, packed, and looked up.

What lives here: rounding a table of vocabulary × hidden a few rows at a time, and `CompressedEmbedding`. A head is a
`CompressedLinear` over the same tensors, and a tied one shares them. Which tables a model has is the profiler's.

Tensors of an embedding: those of a quantized `weight`, and `weight_dtype`, empty, whose dtype is that of the rows. It
comes first among the parameters, so that transformers takes it for the model's dtype, and not that of the scales.

Letters: V rows, the vocabulary; d columns; G groups of a row; n rows asked for.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from allocator.storage import Option
from compressor.grid import Quantized
from compressor.nn.linear import add_matrix, matrix_names
from compressor.packing import pack, unpack, unpack_at
from compressor.quantize.gptq import round_to_nearest

TILE = 2**22
"""Weights rounded or dequantized at once."""


def embedding_tensors(weight_Vd: Tensor, option: Option) -> dict[str, Tensor]:
    """The stored tensors of a table that is looked up, in the dtype of `weight_Vd`."""
    return {"weight_dtype": weight_Vd.new_empty(0)} | table_tensors(weight_Vd, option)


def table_tensors(weight_Vd: Tensor, option: Option) -> dict[str, Tensor]:
    """Those of a table, each group on the searched grid that rounds it best; of any float dtype."""
    parts = list(_rounded(weight_Vd, option))
    zero_VG = torch.cat([part.zero_OG for part in parts])
    tensors = (
        torch.cat([pack(part.code_OI, option.bits) for part in parts]),
        torch.cat([part.scale_OG for part in parts]),
        pack(zero_VG.view(1, -1), option.bits),
    )
    return dict(zip(matrix_names("weight"), tensors, strict=True))


def rounded_table(weight_Vd: Tensor, option: Option) -> Tensor:
    """The table as it is read once it is stored, float32 (V, d)."""
    return torch.cat([part.dequantize() for part in _rounded(weight_Vd, option)])


def _rounded(weight_Vd: Tensor, option: Option) -> Iterator[Quantized]:
    """Some rows at a time."""
    for rows_nd in weight_Vd.split(_rows(weight_Vd.shape[1])):
        yield round_to_nearest(rows_nd.float(), option.bits, option.group_size)


class CompressedEmbedding(nn.Module):
    """The rows asked for of a packed table, in `dtype`; no others are unpacked. Takes the place of `nn.Embedding`."""

    weight_dtype: Tensor
    weight: Tensor
    weight_scale: Tensor
    weight_zero: Tensor

    def __init__(self, rows: int, columns: int, option: Option, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.option = rows, columns, option
        self.weight_dtype = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        add_matrix(self, "weight", rows, columns, option.bits, option.group_size)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 (…) -> (…, d), in the dtype that `to` last gave the model."""
        row_nd = self.rows(ids.reshape(-1)).to(self.weight_dtype.dtype)
        return row_nd.view(*ids.shape, self.embedding_dim)

    def rows(self, id_n: Tensor) -> Tensor:
        """float32 (n, d)."""
        bits, scale_nG = self.option.bits, self.weight_scale[id_n]
        groups = scale_nG.shape[1]
        place_nG = id_n[:, None] * groups + torch.arange(groups, device=id_n.device)
        zero_nG = unpack_at(self.weight_zero[0], bits, place_nG)
        code_nd = unpack(self.weight[id_n], bits, self.embedding_dim)
        return Quantized(code_nd, scale_nG, zero_nG, bits, self.option.group_size).dequantize()

    def dense_weight(self) -> Tensor:
        """The whole table, float32 (V, d)."""
        weight_Vd = torch.empty(self.num_embeddings, self.embedding_dim, device=self.weight.device)
        ids = torch.arange(self.num_embeddings, device=self.weight.device)
        for id_n in ids.split(_rows(self.embedding_dim)):
            weight_Vd[id_n] = self.rows(id_n)
        return weight_Vd

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, option={self.option}"


def _rows(columns: int) -> int:
    return max(1, TILE // columns)
