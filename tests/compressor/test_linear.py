"""The compressed layer computes with exactly what was decomposed, and its tensors survive a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from allocator.storage import Option
from compressor.lowrank.decompose import decompose
from compressor.lowrank.decomposition import Decomposition
from compressor.lowrank.hessian import Curvature
from compressor.nn.linear import CompressedLinear, layer_tensors

MakeTensor = Callable[..., Tensor]
OPTIONS = [
    Option(3, 0, 32, 0),
    Option(2, 5, 64, 4),
    Option(5, 3, 128, 8),
    Option(8, 7, 32, 16),
    Option(0, 6, 0, 4),
    Option(0, 6, 0, 16),
    Option(0, 5, 0, 4, heads=4),
    Option(0, 5, 0, 16, heads=3),
]
ROWS, COLUMNS = 24, 70


@pytest.fixture(params=OPTIONS, ids=str)
def decomposition(
    request: pytest.FixtureRequest, normal: MakeTensor, correlated: MakeTensor
) -> Decomposition:
    curvature = Curvature.of(correlated(COLUMNS))
    ((_, found),) = decompose([normal(ROWS, COLUMNS)], curvature, [request.param])
    return found


def layer_of(decomposition: Decomposition, bias_O: Tensor | None = None) -> CompressedLinear:
    layer = CompressedLinear(ROWS, COLUMNS, decomposition.option, bias=bias_O is not None)
    tensors = layer_tensors(decomposition) | ({} if bias_O is None else {"bias": bias_O})
    layer.load_state_dict(tensors)
    return layer


def test_dense_weight_is_the_decomposition_s(decomposition: Decomposition) -> None:
    assert torch.equal(layer_of(decomposition).dense_weight(), decomposition.dense())


@pytest.mark.parametrize("shape", [(COLUMNS,), (5, COLUMNS), (2, 3, COLUMNS)])
def test_output_is_the_product_with_the_dense_weight(
    decomposition: Decomposition, normal: MakeTensor, shape: tuple[int, ...]
) -> None:
    x, bias_O = normal(*shape, seed=1), normal(ROWS, seed=2)
    expected = x @ decomposition.dense().T + bias_O
    output = layer_of(decomposition, bias_O)(x)
    assert output.shape == expected.shape
    assert torch.allclose(output, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_bias_is_optional(decomposition: Decomposition, normal: MakeTensor) -> None:
    x = normal(4, COLUMNS)
    with_bias = layer_of(decomposition, torch.ones(ROWS))(x)
    assert torch.allclose(layer_of(decomposition)(x) + 1, with_bias, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_output_has_the_dtype_of_the_input(
    decomposition: Decomposition, normal: MakeTensor, dtype: torch.dtype
) -> None:
    x = normal(4, COLUMNS)
    layer = layer_of(decomposition, torch.ones(ROWS))
    output = layer(x.to(dtype))
    assert output.dtype == dtype
    assert (output.float() - layer(x)).norm() < 0.02 * layer(x).norm()


def test_tensors_survive_a_file(decomposition: Decomposition, normal: MakeTensor, tmp_path: Path) -> None:
    first = layer_of(decomposition, normal(ROWS))
    save_file(first.state_dict(), tmp_path / "layer.safetensors")
    second = CompressedLinear(ROWS, COLUMNS, decomposition.option, bias=True)
    second.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    x = normal(4, COLUMNS)
    assert torch.equal(first(x), second(x))


def test_the_layer_declares_exactly_the_tensors_that_are_written(decomposition: Decomposition) -> None:
    layer = CompressedLinear(ROWS, COLUMNS, decomposition.option, bias=False)
    declared = {name: (t.shape, t.dtype) for name, t in layer.state_dict().items()}
    assert declared == {name: (t.shape, t.dtype) for name, t in layer_tensors(decomposition).items()}


def test_a_tensor_called_weight_never_has_the_original_s_shape(decomposition: Decomposition) -> None:
    """It is what stops a loader that does not know the format."""
    shape = layer_tensors(decomposition)["weight"].shape
    assert shape not in {(ROWS, COLUMNS), (COLUMNS, ROWS)}
