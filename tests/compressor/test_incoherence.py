"""Rotated options: an orthogonal turn of the inputs, in which a layer is decomposed and computes the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import compressor.plugin  # noqa: F401  registers the checkpoint format
from allocator.storage import Option, layer_bytes
from compressor.hadamard import MOST_MIXED, block_size, restored, rotated, rotation
from compressor.lowrank.decompose import decompose
from compressor.lowrank.decomposition import Decomposition
from compressor.lowrank.hessian import Curvature, squared_error
from compressor.nn.linear import CompressedLinear, layer_tensors
from compressor.plugin import FORMAT_VERSION, METHOD

MakeTensor = Callable[..., Tensor]
OPTIONS = [
    Option(3, 0, 32, 0, rotated=True),
    Option(2, 5, 64, 8, rotated=True),
    Option(4, 3, 64, 16, rotated=True),
]
ROWS, CPU = 23, torch.device("cpu")
SIZES = [72, 70, 192]
"""Nine blocks of 8, 35 of 2, three of 64."""


def turn_of(size: int) -> Tensor:
    """V."""
    return rotated(torch.eye(size), rotation(size, CPU)).T


@given(st.integers(1, 700))
def test_a_rotation_of_any_size_is_orthogonal_and_undone_by_its_transpose(size: int) -> None:
    v_nn, r_bb = turn_of(size), rotation(size, CPU)
    assert torch.allclose(v_nn @ v_nn.T, torch.eye(size), atol=1e-6)
    assert torch.allclose(restored(torch.eye(size), r_bb).T, v_nn.T, atol=1e-6)


@given(st.integers(1, 5000))
def test_blocks_are_powers_of_two_that_divide_the_size(size: int) -> None:
    block = block_size(size)
    assert size % block == 0 and block & (block - 1) == 0
    assert block == MOST_MIXED or (size // block) % 2


def test_a_rotation_is_the_same_for_ever() -> None:
    """Stored checkpoints rest on it."""
    signs = "".join(str(int(value > 0)) for value in turn_of(128)[0])
    assert int(signs, 2) == 0x23B3A837C4C78EF85313D76AF2265


def test_neither_an_input_nor_a_head_stands_out_once_rotated() -> None:
    """Of 3 heads of 64."""
    one_I = torch.zeros(192)
    one_I[70] = 8.0
    assert (turn_of(192) @ one_I).abs().max() == pytest.approx(1.0, rel=1e-5)
    head_I = torch.zeros(192)
    head_I[64:128] = 1.0
    assert (turn_of(192) @ head_I).view(3, 64).square().sum(1).min() > 10


@pytest.fixture(
    params=[(o, n) for o in OPTIONS for n in SIZES], ids=lambda p: f"{p[0].bits}r{p[0].rank} of {p[1]}"
)
def decomposition(
    request: pytest.FixtureRequest, normal: MakeTensor, correlated: MakeTensor
) -> Decomposition:
    option, columns = request.param
    ((_, found),) = decompose([normal(ROWS, columns)], Curvature.of(correlated(columns)), [option])
    return found


def layer_of(decomposition: Decomposition) -> CompressedLinear:
    layer = CompressedLinear(ROWS, decomposition.dense().shape[1], decomposition.option, bias=False)
    layer.load_state_dict(layer_tensors(decomposition))
    return layer


def test_dense_is_the_product_of_the_stored_parts_with_the_rotation(decomposition: Decomposition) -> None:
    assert decomposition.quantized is not None
    turned_OI = decomposition.quantized.dequantize()
    if decomposition.factors is not None:
        turned_OI = turned_OI + decomposition.factors.product()
    v_II = turn_of(turned_OI.shape[1])
    assert torch.allclose(decomposition.dense(), turned_OI @ v_II, atol=1e-5)
    assert torch.equal(layer_of(decomposition).dense_weight(), decomposition.dense())


@pytest.mark.parametrize("leading", [(), (5,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_is_the_product_with_the_dense_weight(
    decomposition: Decomposition, normal: MakeTensor, leading: tuple[int, ...], dtype: torch.dtype
) -> None:
    weight_OI = decomposition.dense()
    x = normal(*leading, weight_OI.shape[1], seed=1).to(dtype)
    expected = x.float() @ weight_OI.T
    output = layer_of(decomposition)(x)
    assert output.dtype == dtype and output.shape == expected.shape
    assert (output.float() - expected).norm() < (1e-5 if dtype == torch.float32 else 0.02) * expected.norm()


def test_rotated_layers_of_several_widths_compile_whole(normal: MakeTensor, correlated: MakeTensor) -> None:
    """The second width makes torch.compile take shapes for symbols."""
    for columns in (192, 72, 384):
        ((_, found),) = decompose([normal(ROWS, columns)], Curvature.of(correlated(columns)), [OPTIONS[0]])
        layer, x = layer_of(found), normal(4, columns)
        expected = layer(x)
        layer.prepare()
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        assert torch.allclose(compiled(x), expected, atol=1e-5)


def test_rotation_takes_no_bytes(decomposition: Decomposition) -> None:
    columns = decomposition.dense().shape[1]
    written = sum(t.numel() * t.element_size() for t in layer_tensors(decomposition).values())
    plain = Option(*[getattr(decomposition.option, n) for n in ("bits", "rank", "group_size", "factor_bits")])
    assert (
        written == layer_bytes(ROWS, columns, decomposition.option, 0) == layer_bytes(ROWS, columns, plain, 0)
    )


def test_the_turn_pays_where_a_few_inputs_carry_large_weights(
    normal: MakeTensor, correlated: MakeTensor
) -> None:
    w_OI, hessian_II = normal(ROWS, 192), correlated(192)
    w_OI[:, ::48] *= 12
    options = [Option(3, 0, 64, 0), Option(3, 0, 64, 0, rotated=True)]
    found = dict(decompose([w_OI] * 2, Curvature.of(hessian_II), options))
    plain, turned = (squared_error(w_OI, found[p].dense(), hessian_II) for p in (0, 1))
    assert turned < 0.7 * plain


def test_plain_and_rotated_options_of_one_call_are_what_each_is_alone(
    normal: MakeTensor, correlated: MakeTensor
) -> None:
    w_OI, curvature = normal(ROWS, 72), Curvature.of(correlated(72))
    options = [OPTIONS[0], Option(3, 0, 32, 0), OPTIONS[1], Option(2, 5, 64, 8)]
    together = dict(decompose([w_OI] * len(options), curvature, options))
    for place, option in enumerate(options):
        ((_, alone),) = decompose([w_OI], curvature, [option])
        assert together[place].option == option
        assert torch.allclose(together[place].dense(), alone.dense(), atol=1e-4)


def test_a_checkpoint_with_rotated_layers_loads_through_the_plug_in(
    normal: MakeTensor, correlated: MakeTensor, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48, intermediate_size=72, num_hidden_layers=1, num_attention_heads=2, vocab_size=32,
        initializer_range=0.2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    tensors, options = dict(model.state_dict()), {}
    for name in ("model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"):
        w_OI = tensors.pop(f"{name}.weight")
        option = OPTIONS[len(options)]
        ((_, found),) = decompose([w_OI], Curvature.of(correlated(w_OI.shape[1])), [option])
        tensors |= {f"{name}.{part}": tensor for part, tensor in layer_tensors(found).items()}
        options[name] = {"bits": option.bits, "rank": option.rank, "group_size": option.group_size,
                         "factor_bits": option.factor_bits, "rotated": True}  # fmt: skip
        model.get_submodule(name).weight.data = found.dense()
    model.save_pretrained(tmp_path, state_dict=tensors)
    written = json.loads((tmp_path / "config.json").read_text())
    written["quantization_config"] = {
        "quant_method": METHOD,
        "format_version": FORMAT_VERSION,
        "layers": options,
    }
    (tmp_path / "config.json").write_text(json.dumps(written))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-4)
