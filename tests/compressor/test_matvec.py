"""The decode kernel multiplies with what is stored: in Triton's interpreter, its PTX run by `warp.py`, and on CUDA."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import warp
from torch import Tensor

from allocator.storage import Option
from compressor.decompose import Curvature, Decomposition, decompose
from compressor.linear import CompressedLinear, layer_tensors
from compressor.packing import PLANES

triton = pytest.importorskip("triton")

MakeTensor = Callable[..., Tensor]
interpreter = pytest.mark.skipif(
    triton.__version__ < "3.9", reason="older interpreters fail with today's numpy"
)


def layer_of(
    normal: MakeTensor, rows: int, columns: int, option: Option
) -> tuple[Decomposition, CompressedLinear]:
    identity_II = torch.eye(columns)
    curvature = Curvature(identity_II, identity_II, identity_II)
    ((_, found),) = decompose([normal(rows, columns)], curvature, [option], rounds=1)
    layer = CompressedLinear(rows, columns, option, bias=False)
    layer.load_state_dict(layer_tensors(found))
    return found, layer


INTERPRETED = [
    (option, columns, dtype)
    for option, columns in (
        (Option(2, 0, 32, 0), 192),
        (Option(3, 5, 64, 4), 704),
        (Option(4, 9, 128, 8), 320),
        (Option(5, 3, 64, 16), 128),
        (Option(6, 0, 32, 0), 64),
        (Option(8, 0, 128, 0), 8256),
    )
    for dtype in (torch.bfloat16, torch.float16)
]


@pytest.fixture(scope="module")
def outputs(normal: MakeTensor, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Tensor, Tensor]]:
    """Of every case Q·x and the layer's output, all by one interpreter."""
    folder = tmp_path_factory.mktemp("interpreted")
    layers = [
        (layer_of(normal, 11, columns, option)[1], normal(columns, seed=1).to(dtype))
        for option, columns, dtype in INTERPRETED
    ]
    torch.save(layers, folder / "layers.pt")
    interpreted = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, warp.__file__, folder], env=interpreted, check=True, timeout=300)
    found: list[tuple[Tensor, Tensor]] = torch.load(folder / "outputs.pt")
    return found


@interpreter
@pytest.mark.parametrize("case", range(len(INTERPRETED)), ids=[str(case) for case in INTERPRETED])
def test_one_token_in_the_interpreter(
    normal: MakeTensor, outputs: list[tuple[Tensor, Tensor]], case: int
) -> None:
    option, columns, dtype = INTERPRETED[case]
    found, _ = layer_of(normal, 11, columns, option)
    x_I, (product_O, output_O) = normal(columns, seed=1).to(dtype), outputs[case]
    assert found.quantized is not None
    expected_O = found.quantized.dequantize().double() @ x_I.double()
    assert (product_O - expected_O).norm() < 1e-4 * expected_O.norm()
    expected_O = found.dense().double() @ x_I.double()
    assert (output_O - expected_O).norm() < 8e-3 * expected_O.norm()


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
OPTIONS = [
    *(Option(bits, 0, group_size, 0) for bits in PLANES for group_size in (32, 64, 128)),
    Option(3, 5, 64, 4),
    Option(2, 70, 32, 8),
    Option(4, 16, 128, 16),
    Option(0, 24, 0, 8),
    Option(3, 5, 64, 4, rotated=True),
]


@cuda
@pytest.mark.parametrize("option", OPTIONS, ids=str)
@pytest.mark.parametrize("columns", [832, 8448])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_token_on_cuda_is_the_product_with_the_dense_weight(
    normal: MakeTensor, option: Option, columns: int, dtype: torch.dtype
) -> None:
    found, layer = layer_of(normal, 203, columns, option)
    x_I = normal(columns, seed=1).to(dtype)
    expected = found.dense().double() @ x_I.double()
    layer.cuda()
    for _ in range(2):
        output = layer(x_I.cuda()[None])[0].double().cpu()
        assert (output - expected).norm() < 4e-3 * expected.norm()
        layer.prepare()


@cuda
@pytest.mark.parametrize("rotated", [False, True])
def test_decoding_compiles_without_a_graph_break(normal: MakeTensor, rotated: bool) -> None:
    _, layer = layer_of(normal, 64, 128, Option(3, 4, 64, 4, rotated=rotated))
    layer.cuda().prepare()
    x_1I = normal(1, 128, seed=1).bfloat16().cuda()
    compiled = torch.compile(layer, fullgraph=True)
    assert torch.allclose(compiled(x_1I), layer(x_1I), rtol=2e-2, atol=1e-2)
