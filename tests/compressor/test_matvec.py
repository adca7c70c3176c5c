"""The decode kernel multiplies with what is stored: by coroutines that play a card's lanes, and on a card."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import lanes
import pytest
import torch
from torch import Tensor, nn

from allocator.storage import Option
from compressor.cuda import matvec_cuda
from compressor.lowrank.decompose import decompose
from compressor.lowrank.decomposition import Decomposition
from compressor.lowrank.hessian import Curvature
from compressor.nn.linear import CompressedLinear, Siblings, decoded, layer_tensors
from compressor.packing import PLANES
from compressor.plugin import join_siblings

MakeTensor = Callable[..., Tensor]
SEGMENT = [
    "const unsigned*",
    "const unsigned short*",
    "const unsigned char*",
    *["int"] * 3,
    "const void*",
    "const unsigned short*",
    "const unsigned char*",
    "const float*",
    *["int"] * 7,
]
TYPES = [
    *["const unsigned short*", "int", "int", "void*", "int", "int"],
    *SEGMENT * matvec_cuda.MOST,
    *["const char*", "int"] * matvec_cuda.MOST_LATER,
]


def layer_of(
    normal: MakeTensor, rows: int, columns: int, option: Option, seed: int = 0
) -> tuple[Decomposition, CompressedLinear]:
    identity_II = torch.eye(columns)
    curvature = Curvature(identity_II)
    ((_, found),) = decompose([normal(rows, columns, seed=seed)], curvature, [option], rounds=1)
    layer = CompressedLinear(rows, columns, option, bias=False)
    layer.load_state_dict(layer_tensors(found))
    return found, layer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """The kernel, compiled for this machine."""
    return lanes.built(matvec_cuda.source(), "matvec", TYPES, tmp_path_factory.mktemp("lanes"))


@pytest.fixture
def launches(run: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A card of two multiprocessors, on the CPU; the tiles of every launch."""
    tiles: list[int] = []

    def played(
        grid: tuple[int, int, int], block: tuple[int, int, int], args: list[Tensor | int], shared_mem: int
    ) -> None:
        tiles.append(args[5])  # type: ignore[arg-type]
        pointers = (ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in args)
        run(*pointers, grid[0], grid[1], block[0])

    monkeypatch.setattr(matvec_cuda, "_compiled", lambda index: (played, 2))
    return tiles


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("option", "columns"),
    [
        (Option(2, 0, 32, 0), 384),
        (Option(3, 5, 64, 4), 1408),
        (Option(4, 9, 128, 8), 640),
        (Option(5, 3, 64, 16), 128),
        (Option(6, 0, 32, 0), 256),
        (Option(8, 0, 128, 0), 8320),
        (Option(3, 0, 256, 0), 4096),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_by_coroutines_one_token_is_the_product_with_the_dense_weight(
    normal: MakeTensor, launches: list[int], option: Option, columns: int, dtype: torch.dtype
) -> None:
    found, layer = layer_of(normal, 37, columns, option)
    x_I = normal(columns, seed=1).to(dtype)
    (product_O,) = matvec_cuda.products(x_I, [layer.packed("weight")], torch.float32)
    assert found.quantized is not None
    assert relative_error(product_O, found.quantized.dequantize().double() @ x_I.double()) < 1e-4
    (output,) = decoded([layer], x_I[None])
    assert relative_error(output[0], found.dense().double() @ x_I.double()) < 8e-3


def test_by_coroutines_more_tiles_than_the_blocks_add_up_at_once(
    normal: MakeTensor, launches: list[int]
) -> None:
    found, layer = layer_of(normal, 1000, 256, Option(3))
    x_I = normal(256, seed=1).bfloat16()
    (product_O,) = matvec_cuda.products(x_I, [layer.packed("weight")], torch.float32)
    assert launches == [63]
    assert relative_error(product_O, found.dense().double() @ x_I.double()) < 1e-4


def test_by_coroutines_parts_add_up_to_the_product(normal: MakeTensor, launches: list[int]) -> None:
    _, layer = layer_of(normal, 20, 1408, Option(4))
    x_I, matrices = normal(1408, seed=1).bfloat16(), [layer.packed("weight")]
    (whole_O,) = matvec_cuda.products(x_I, matrices, torch.float32)
    for parts in (2, 4, 6, 8):
        (part_Op,) = matvec_cuda.products_in_parts(x_I, matrices, torch.float32, parts)
        assert part_Op.shape == (20, min(parts, 6)), "1408 columns are six units"
        assert relative_error(part_Op.sum(dim=1), whole_O.double()) < 1e-6


@pytest.mark.parametrize(
    ("tiles", "units"), [(256, 16), (384, 16), (1792, 16), (8016, 16), (256, 56), (1, 7)]
)
def test_few_warps_of_a_multiprocessor_are_idle(tiles: int, units: int) -> None:
    blocks, warps = matvec_cuda.shape(tiles, units, 132)
    for_one = -(-tiles // blocks) * units
    turns = -(-for_one // warps)
    assert blocks in (132, 264) and 24 <= warps * blocks // 132 <= 32
    assert warps * turns * blocks // 132 <= 1.03 * -(-tiles // 132) * units or for_one < warps


def test_by_coroutines_an_outlier_costs_its_neighbours_little(
    normal: MakeTensor, launches: list[int]
) -> None:
    found, layer = layer_of(normal, 16, 256, Option(4))
    x_I = normal(256, seed=1).bfloat16()
    x_I[70] = 1000
    (product_O,) = matvec_cuda.products(x_I, [layer.packed("weight")], torch.float32)
    assert relative_error(product_O, found.dense().double() @ x_I.double()) < 1e-4


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_by_coroutines_what_is_not_a_number_stays_so(
    normal: MakeTensor, launches: list[int], odd: float
) -> None:
    _, layer = layer_of(normal, 16, 256, Option(4))
    x_I = normal(256, seed=1).bfloat16()
    x_I[3] = odd
    (product_O,) = matvec_cuda.products(x_I, [layer.packed("weight")], torch.bfloat16)
    assert not product_O.isfinite().any()
    (nothing_O,) = matvec_cuda.products(torch.zeros_like(x_I), [layer.packed("weight")], torch.bfloat16)
    assert (nothing_O == 0).all()


class Attention(nn.Module):
    """Layers named as a Llama's, the last of an input of its own."""

    def __init__(self, normal: MakeTensor, options: dict[str, Option]) -> None:
        super().__init__()
        for seed, (name, option) in enumerate(options.items()):
            self.add_module(name, layer_of(normal, 24 + 16 * seed, 256, option, seed)[1])


PROJECTIONS = {
    "q_proj": Option(3, 4, 64, 4),
    "k_proj": Option(5),
    "v_proj": Option(2, 6, 32, 8),
    "o_proj": Option(4),
}


@pytest.fixture
def attention(normal: MakeTensor) -> Attention:
    model = Attention(normal, PROJECTIONS)
    join_siblings(model)
    return model


def test_layers_with_one_input_are_multiplied_in_one_launch(
    normal: MakeTensor, attention: Attention, launches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CompressedLinear, "_is_decoding", lambda layer, x: True)
    x_1I = normal(1, 256, seed=9).bfloat16()
    alone = [decoded([layer], x_1I)[0] for layer in attention.children()]  # type: ignore[list-item]
    launches.clear()
    together = [layer(x_1I) for layer in attention.children()]
    assert launches == [1 + 1, 2 + 3 + 4, 5], "R of q and v, then q, k and v, then o"
    assert all(torch.equal(ours, peer) for ours, peer in zip(together, alone, strict=True))


def test_siblings_that_turn_out_to_have_inputs_of_their_own_part(
    normal: MakeTensor, attention: Attention, launches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CompressedLinear, "_is_decoding", lambda layer, x: True)
    query, key = attention.q_proj, attention.k_proj
    assert isinstance(query, CompressedLinear) and isinstance(key, CompressedLinear)
    x_1I, other_1I = normal(2, 1, 256, seed=9).bfloat16()
    query(x_1I)
    assert torch.equal(key(other_1I), decoded([key], other_1I)[0])
    assert query.siblings is not None and key.siblings is None


def test_a_layer_whose_sibling_is_elsewhere_multiplies_alone(
    normal: MakeTensor, attention: Attention, launches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CompressedLinear, "_is_decoding", lambda layer, x: True)
    query, key = attention.q_proj, attention.k_proj
    assert isinstance(query, CompressedLinear)
    x_1I = normal(1, 256, seed=9).bfloat16()
    expected = decoded([query], x_1I)[0]
    key.to("meta")
    assert torch.equal(query(x_1I), expected)


def test_siblings_follow_each_other_as_in_the_model(normal: MakeTensor) -> None:
    model = nn.Module()
    model.first, model.second = (Attention(normal, PROJECTIONS) for _ in range(2))
    model.lm_head = layer_of(normal, 40, 256, Option(6))[1]
    join_siblings(model)
    at: Siblings | None = model.first.q_proj.siblings
    seen: list[list[CompressedLinear]] = []
    for _ in range(6):
        assert at is not None
        seen.append(list(at.layers))
        at = at.following
    of = [list(part.children()) for part in (model.first, model.second)]
    assert seen == [of[0][:3], of[0][3:], of[1][:3], of[1][3:], [model.lm_head], of[0][:3]]


def test_what_lies_elsewhere_is_not_read_ahead(attention: Attention) -> None:
    query, output = attention.q_proj, attention.o_proj
    assert isinstance(query, CompressedLinear) and isinstance(output, CompressedLinear) and query.siblings
    ahead = query.siblings.later(torch.device("cpu"))
    assert [tensor.data_ptr() for tensor in ahead[:2]] == [
        output.weight.data_ptr(),  # type: ignore[operator]
        output.weight_scale.data_ptr(),  # type: ignore[operator, union-attr]
    ]
    assert len(ahead) == 2, "zero points that are unpacked at every product are not in memory yet"
    output.prepare()
    assert len(query.siblings.later(torch.device("cpu"))) == 3
    output.to("meta")
    assert query.siblings.later(torch.device("cpu")) == []


def test_layers_of_turned_and_of_plain_inputs_are_no_siblings(normal: MakeTensor) -> None:
    model = Attention(normal, PROJECTIONS | {"k_proj": Option(4, rotated=True)})
    join_siblings(model)
    found = {name: layer.siblings for name, layer in model.named_children()}
    assert found["q_proj"] is found["v_proj"] is not found["k_proj"]


def test_layers_without_the_kernel_are_no_siblings(normal: MakeTensor) -> None:
    model = Attention(normal, PROJECTIONS | {"k_proj": Option(0, 8, 0, 8)})
    join_siblings(model)
    found = {name: layer.siblings for name, layer in model.named_children()}
    assert found["k_proj"] is None
    assert isinstance(found["q_proj"], Siblings) and len(found["q_proj"].layers) == 2


def test_what_the_kernel_does_not_serve() -> None:
    assert matvec_cuda.serves(14336, 3, 64)
    assert matvec_cuda.serves(29568, 3, 64), "the widest of Qwen2-72B"
    assert not matvec_cuda.serves(832, 3, 64), "rows begin at places that loads of 16 bytes do not fit"
    assert not matvec_cuda.serves(1024, 3, 48)
    assert not matvec_cuda.serves(2**16, 3, 64), "x does not fit"
    assert not matvec_cuda.serves(1024, 0, 64)


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
@pytest.mark.parametrize("columns", [896, 8448])
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


@cuda
def test_siblings_on_cuda_give_what_they_give_alone(normal: MakeTensor, attention: Attention) -> None:
    layers = [layer.cuda() for layer in attention.children()]
    x_1I = normal(1, 256, seed=9).bfloat16().cuda()
    together = [layer(x_1I) for layer in layers]
    alone = [decoded([layer], x_1I)[0] for layer in layers]  # type: ignore[list-item]
    assert all(torch.equal(ours, peer) for ours, peer in zip(together, alone, strict=True))
