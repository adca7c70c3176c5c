"""The compressed layer: packed codes, grids and factors, and the matrix product with them.

What lives here: `CompressedLinear` and its tensors. Their bytes are counted in `allocator/storage.py`; writing them
to a checkpoint is for `checkpoint_writer.py`, loading them for `plugin.py`.

Tensors of a layer: `weight` int32 (O, words) packed codes, `weight_scale` bfloat16 (O, G), `weight_zero` int32
(1, words) packed zero points; for `left` and `right` the same three with O = rank, or one bfloat16 matrix. Where heads
have factors of their own, O = heads·rank, and a row of `left` is one head's. The packed tensor carries the name of the
original one, so that loading without the plug-in fails on its shape; in pure low rank, without Q, `left` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allocator.storage import FACTOR_GROUP_SIZE, KEEP_BITS, Option, ceil_div
from compressor.cuda import matvec_cuda
from compressor.cuda.matvec_cuda import MOST_LATER, READ_AHEAD_BYTES, Matrix
from compressor.grid import Quantized
from compressor.hadamard import restored, rotated, rotation
from compressor.lowrank.decomposition import Decomposition
from compressor.lowrank.factorize import product
from compressor.packing import pack, unpack, words

TILE = 2**24
"""Weights dequantized at once."""
HIDDEN_PARTS = 8
"""Parts of R·x, which has few rows, at which as many multiprocessors work."""


def weight_of(module: nn.Module) -> Tensor:
    """`module.weight`, which torch only knows to be a tensor or a module."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


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
    """y = x·Qᵀ + (x·Rᵀ)·Lᵀ + bias, with Q, L and R stored packed; of V·x in place of x where the option is rotated.

    Takes the place of `nn.Linear` (and of GPT-2's `Conv1D`) with `columns` inputs and `rows` outputs.
    """

    # As registered; which of them there are, the option says.
    weight: Tensor
    weight_scale: Tensor
    left: Tensor
    left_scale: Tensor
    right: Tensor
    bias: Tensor | None

    def __init__(self, rows: int, columns: int, option: Option, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = columns, rows
        self.option = option
        if option.bits:
            add_matrix(self, "weight", rows, columns, option.bits, option.group_size)
        if option.rank:
            self._add_factor(left_name(option), rows // option.heads)
            self._add_factor("right", columns)
        self.has_kernel = _has_kernel(columns, option)
        self.siblings: Siblings | None = None
        self.register_parameter("bias", _parameter((rows,), torch.get_default_dtype()) if bias else None)

    def _add_factor(self, name: str, width: int) -> None:
        vectors, bits = self.option.heads * self.option.rank, self.option.factor_bits
        if bits == KEEP_BITS:
            self.register_parameter(name, _parameter((vectors, width), torch.bfloat16))
            return
        add_matrix(self, name, vectors, width, bits, FACTOR_GROUP_SIZE)

    def grid_of(self, name: str) -> tuple[int, int]:
        """Bits and group size of a quantized matrix."""
        if name == "weight" and self.option.bits:
            return self.option.bits, self.option.group_size
        return self.option.factor_bits, FACTOR_GROUP_SIZE

    def _is_quantized(self, name: str) -> bool:
        return matrix_names(name)[1] in self._parameters

    def zero_points(self, name: str) -> Tensor:
        """uint8 (O, G) of a quantized matrix, unpacked here unless `prepare` did."""
        ready_OG = self._buffers.get(f"{name}_zero_OG")
        if ready_OG is not None:
            return ready_OG
        _, scale, zero = matrix_names(name)
        shape = getattr(self, scale).shape
        return unpack(getattr(self, zero), self.grid_of(name)[0], shape.numel()).view(shape)

    def _dense(self, name: str, columns: int, rows: slice = slice(None)) -> Tensor:
        bits, group_size = self.grid_of(name)
        word_OW, scale_OG, zero_OG = (
            getattr(self, name),
            getattr(self, f"{name}_scale"),
            self.zero_points(name),
        )
        code_OI = unpack(word_OW[rows], bits, columns)
        return Quantized(code_OI, scale_OG[rows], zero_OG[rows], bits, group_size).dequantize()

    def _factor(self, name: str, width: int) -> Tensor:
        return self._dense(name, width) if self._is_quantized(name) else getattr(self, name).float()

    def _left(self) -> Tensor:
        """L as it is stored, float32 (heads·rank, O/heads)."""
        return self._factor(left_name(self.option), self.out_features // self.option.heads)

    def dense_weight(self) -> Tensor:
        """Q + L·R as it acts on x, float32 (O, I)."""
        device = next(iter(self.state_dict().values())).device
        weight_OI = torch.zeros(self.out_features, self.in_features, device=device)
        if self.option.bits:
            weight_OI = self._dense("weight", self.in_features)
        if self.option.rank:
            right_rI = self._factor("right", self.in_features)
            weight_OI = weight_OI + product(self._left(), right_rI, self.option.heads)
        return restored(weight_OI, self.rotation(weight_OI)) if self.option.rotated else weight_OI

    def rotation(self, x: Tensor) -> Tensor:
        """What turns the inputs, in the dtype of x, made here unless `prepare` did."""
        ready_bb = self._buffers.get("rotation_bb")
        return rotation(self.in_features, x.device, x.dtype) if ready_bb is None else ready_bb.to(x.dtype)

    def prepare(self) -> None:
        """Unpack the zero points once, which the decode kernel reads, and make the rotation, which a compiler cannot.

        The state dict stays as it is stored.
        """
        for name in ("weight", "left", "right"):
            if self._is_quantized(name):
                self.register_buffer(f"{name}_zero_OG", self.zero_points(name), persistent=False)
        if self.option.rotated:
            device = next(self.parameters()).device
            self.register_buffer("rotation_bb", rotation(self.in_features, device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, I) -> (…, O), in the dtype of x. One token on CUDA is left to `matvec_cuda.py`."""
        if not self._is_decoding(x):
            output = self._multiply(self.turned(x))
        elif self.siblings is None:
            output = decoded([self], x)[0]
        else:
            output = self.siblings.output(self, x)
        return output if self.bias is None else output + self.bias.to(x.dtype)

    def turned(self, x: Tensor) -> Tensor:
        """What Q and R multiply: x, or V·x."""
        return rotated(x, self.rotation(x)) if self.option.rotated else x

    def _is_decoding(self, x: Tensor) -> bool:
        return (
            self.has_kernel
            and x.is_cuda
            and x.numel() == self.in_features
            and x.dtype in (torch.bfloat16, torch.float16)
            and matvec_cuda.is_available(x.device.index)
        )

    def packed(self, name: str) -> Matrix:
        """A quantized matrix as the decode kernel takes it."""
        codes, scale, _ = matrix_names(name)
        return Matrix(getattr(self, codes), getattr(self, scale), self.zero_points(name), *self.grid_of(name))

    def ready(self) -> list[Tensor]:
        """What a product with Q reads, but for zero points that are unpacked only then."""
        zero_OG = self._buffers.get("weight_zero_OG")
        return [self.weight, self.weight_scale, *([] if zero_OG is None else [zero_OG])]

    def packed_with(self, hidden_rp: Tensor) -> Matrix:
        """Q, and L for the product with R·x, float32 (r, p), its parts to be added up."""
        packed = replace(
            self.packed("weight"), left=self.left, hidden_rp=hidden_rp, factor_bits=self.option.factor_bits
        )
        if not self._is_quantized("left"):
            return packed
        return replace(packed, left_scale=self.left_scale, left_zero=self.zero_points("left"))

    def _multiply(self, x: Tensor) -> Tensor:
        """The product with Q dequantized a tile of rows at a time, and with the factors."""
        output = x.new_zeros(*x.shape[:-1], self.out_features)
        if self.option.bits:
            tiles = [
                F.linear(x, self._dense("weight", self.in_features, slice(first, first + step)).to(x.dtype))
                for step in [max(1, TILE // self.in_features)]
                for first in range(0, self.out_features, step)
            ]
            output = tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=-1)
        if self.option.rank:
            hidden = F.linear(x, self._factor("right", self.in_features).to(x.dtype))
            output = output + through_left(hidden, self._left().to(x.dtype), self.option.heads)
        return output

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, option={self.option}"


class Siblings:
    """Layers that are given the same input: the one asked first multiplies for all of them, in one launch.

    One found to have an input of its own multiplies for itself from then on, and so do all while one is elsewhere, as
    where weights are offloaded. `following` are those that the model multiplies with next.
    """

    def __init__(self, layers: Sequence[CompressedLinear]) -> None:
        self.layers = layers
        self.following: Siblings | None = None
        self._input: Tensor | None = None
        self._waiting: dict[int, Tensor] = {}

    def output(self, layer: CompressedLinear, x: Tensor) -> Tensor:
        """The layer's (…, O) of one token, without its bias."""
        index = next(i for i, sibling in enumerate(self.layers) if sibling is layer)
        if index in self._waiting and self._input is not x:
            layer.siblings = None
        if layer.siblings is None or any(sibling.weight.device != x.device for sibling in self.layers):
            return decoded([layer], x)[0]
        if index not in self._waiting:
            self._input, self._waiting = x, dict(enumerate(decoded(self.layers, x, self.later(x.device))))
        output = self._waiting.pop(index)
        if not self._waiting:
            self._input = None
        return output

    def later(self, device: torch.device) -> list[Tensor]:
        """What is read next on this device, about as much as may be read ahead."""
        found: list[Tensor] = []
        following = self.following
        while (
            following and following is not self and sum(tensor.nbytes for tensor in found) < READ_AHEAD_BYTES
        ):
            stored = [tensor for layer in following.layers for tensor in layer.ready()]
            if any(tensor.device != device for tensor in stored):
                break
            found.extend(stored)
            following = following.following
        return found[:MOST_LATER]


def decoded(layers: Sequence[CompressedLinear], x: Tensor, later: Sequence[Tensor] = ()) -> list[Tensor]:
    """Every layer's (…, O) of one token on CUDA that all of them are given, without their biases."""
    x_I = layers[0].turned(x).reshape(-1)
    hidden = _hidden([layer for layer in layers if layer.option.rank], x_I)
    matrices = [
        layer.packed_with(hidden[layer]) if layer in hidden else layer.packed("weight") for layer in layers
    ]
    return [y_O.view(*x.shape[:-1], -1) for y_O in matvec_cuda.products(x_I, matrices, x.dtype, later)]


def _hidden(layers: Sequence[CompressedLinear], x_I: Tensor) -> dict[CompressedLinear, Tensor]:
    """R·x of every layer, float32 (r, p), in parts."""
    packed = [layer for layer in layers if layer.option.factor_bits != KEEP_BITS]
    rights = [layer.packed("right") for layer in packed]
    products = matvec_cuda.products_in_parts(x_I, rights, torch.float32, HIDDEN_PARTS)
    plain = [layer for layer in layers if layer.option.factor_bits == KEEP_BITS]
    return dict(zip(packed, products, strict=True)) | {
        layer: (layer.right.to(x_I.dtype) @ x_I).float()[:, None] for layer in plain
    }


def through_left(hidden: Tensor, left_rO: Tensor, heads: int) -> Tensor:
    """x·Rᵀ (…, heads·rank) by Lᵀ as it is stored (heads·rank, O/heads) -> (…, O), every head by its own rows."""
    if heads == 1:
        return hidden @ left_rO
    by_head, left_hrO = hidden.unflatten(-1, (heads, -1)), left_rO.unflatten(0, (heads, -1))
    return torch.einsum("...hr,hro->...ho", by_head, left_hrO).flatten(-2)


def _has_kernel(columns: int, option: Option) -> bool:
    """Whether the decode kernel serves a layer of such a Q, and R."""
    packed = option.rank > 0 and option.factor_bits != KEEP_BITS
    return matvec_cuda.serves(columns, option.bits, option.group_size) and (
        not packed or matvec_cuda.serves(columns, option.factor_bits, FACTOR_GROUP_SIZE)
    )


def add_matrix(module: nn.Module, name: str, rows: int, columns: int, bits: int, group_size: int) -> None:
    """Give `module` the empty parameters of a quantized matrix."""
    codes, scale, zero = matrix_names(name)
    groups = ceil_div(columns, group_size)
    module.register_parameter(codes, _parameter((rows, words(columns, bits)), torch.int32))
    module.register_parameter(scale, _parameter((rows, groups), torch.bfloat16))
    module.register_parameter(zero, _parameter((1, words(rows * groups, bits)), torch.int32))


def _parameter(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)
