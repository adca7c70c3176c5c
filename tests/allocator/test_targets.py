"""Targets: no plan is made that the runtime cannot execute, and none is better that it can."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocator.allocation import allocate
from allocator.constraints.rules import Constraints, smallest_constrained_bytes
from allocator.errors import ContradictoryPinsError, InfeasibleError, PlanError, StrategyError, TargetError
from allocator.export.ggml import TYPES
from allocator.problem import Integers, LayerMenu, Menu
from allocator.storage import KEEP, Option, layer_bytes
from allocator.strategies.strategies import uniform
from allocator.targets import TARGETS, check_compressible, check_fused, check_tables, target_named

OPTIONS = (
    *(Option(bits, 0, size, 0) for bits in (2, 3, 4, 5, 8) for size in (32, 64, 128)),
    *(Option(bits, 64, 64, factor_bits) for bits in (3, 4) for factor_bits in (4, 16)),
    Option(0, 32, 0, 16),
    Option(0, 16, 0, 16, heads=2),
    KEEP,
)
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def layer(
    name: str, rows: int, columns: int, options: tuple[Option, ...] = OPTIONS, seed: int = 0
) -> LayerMenu:
    rng = np.random.default_rng([seed, *name.encode()])
    size = np.array([layer_bytes(rows, columns, o, 2 * rows * columns) for o in options], dtype=np.int64)
    error = np.array([0.0 if o == KEEP else 4.0**-o.bits * o.group_size**0.1 / (1 + o.rank) for o in options])
    return LayerMenu(
        name, rows, columns, 2 * rows * columns, options, size, error, error * rng.lognormal(0, 2)
    )


def menu(blocks: int = 2, hidden: int = 256, seed: int = 0) -> Menu:
    sides = {
        "q_proj": (hidden, hidden),
        "k_proj": (64, hidden),
        "v_proj": (64, hidden),
        "o_proj": (hidden, hidden),
    }
    sides |= {"gate_proj": (512, hidden), "up_proj": (512, hidden), "down_proj": (hidden, 512)}
    layers = [
        layer(f"model.layers.{b}.{name}", *shape, seed=seed)
        for b in range(blocks)
        for name, shape in sides.items()
    ]
    return Menu(tuple(layers), {"embed": 10_000})


def planned(found: Menu, target: str, share: float) -> tuple[Menu, Integers, int]:
    """The optimum for a target at a share of the original bytes."""
    runtime = target_named(target)
    restricted, total = runtime.restricted(found), int(found.original_bytes * share)
    solution = allocate(restricted, total, runtime.constrained(Constraints()))
    assert solution.proven
    return restricted, solution.choice, total


def options_of(found: Menu, choice: Integers) -> dict[str, Option]:
    return {one.name: one.options[k] for one, k in zip(found.layers, choice.tolist(), strict=True)}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("share", [0.35, 0.5, 0.8])
def test_every_layer_of_a_plan_has_what_the_runtime_executes(target: str, share: float) -> None:
    found, runtime = menu(), target_named(target)
    restricted, choice, total = planned(found, target, share)
    for one, option in zip(found.layers, options_of(restricted, choice).values(), strict=True):
        assert runtime.executes(one, option)
    sizes = [int(one.total_bytes[k]) for one, k in zip(restricted.layers, choice, strict=True)]
    assert restricted.kept_bytes + sum(sizes) <= total


@pytest.mark.parametrize("share", [0.35, 0.42, 0.5, 0.6, 0.8])
@pytest.mark.parametrize("seed", range(4))
def test_layers_that_vllm_fuses_share_bits_and_group_size(share: float, seed: int) -> None:
    restricted, choice, _ = planned(menu(seed=seed), "vllm", share)
    taken = options_of(restricted, choice)
    for block, group in product(range(2), FUSED):
        schemes = {
            (taken[f"model.layers.{block}.{name}"].bits, taken[f"model.layers.{block}.{name}"].group_size)
            for name in group
        }
        assert len(schemes) == 1


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.3, 1.0))
def test_the_fused_optimum_is_the_best_of_all_choices_that_share(seed: int, share: float) -> None:
    """By brute force over a gate and an up projection that share bits and group size."""
    few = (Option(4, 0, 32, 0), Option(4, 0, 128, 0), Option(8, 0, 64, 0), Option(4, 64, 128, 16), KEEP)
    pair = Menu(tuple(layer(f"0.{n}", 512, 256, few, seed) for n in ("gate_proj", "up_proj")), {})
    total, runtime = int(pair.original_bytes * share), target_named("vllm")
    gate, up = pair.layers
    feasible = [
        (gate.cost[i] + up.cost[j], i, j)
        for i, j in product(range(len(few)), repeat=2)
        if (few[i].bits, few[i].group_size) == (few[j].bits, few[j].group_size)
        and gate.total_bytes[i] + up.total_bytes[j] <= total
    ]
    shared = runtime.constrained(Constraints())
    if not feasible:
        with pytest.raises(InfeasibleError) as refused:
            allocate(pair, total, shared)
        assert refused.value.smallest_bytes == smallest_constrained_bytes(pair, shared)
        assert allocate(pair, refused.value.smallest_bytes, shared).proven
        return
    assert allocate(pair, total, shared).cost == pytest.approx(min(feasible)[0], rel=1e-12)


def test_vllm_keeps_matrices_that_its_kernels_do_not_take() -> None:
    """Rows by 64, columns by 128 and by the group; ranks only as 16-bit factors."""
    runtime = target_named("vllm")
    for rows, columns in ((256, 192), (96, 256), (256, 320)):
        odd = layer("odd", rows, columns)
        assert [o for o in OPTIONS if runtime.executes(odd, o)] == [KEEP]
    whole = layer("whole", 64, 384)
    left = [o for o in OPTIONS if runtime.executes(whole, o)]
    assert {o.bits for o in left} == {4, 8, 16}
    assert {o.factor_bits for o in left if o.rank} == {16}


@pytest.mark.parametrize("target", ["gptqmodel", "llama.cpp", "llm-compressor"])
def test_tools_that_quantize_by_themselves_get_no_rank(target: str) -> None:
    assert {o.rank for one in target_named(target).restricted(menu()).layers for o in one.options} == {0}


@pytest.mark.parametrize("target", sorted(set(TARGETS) - {"transformers"}))
def test_only_this_product_s_own_checkpoint_rotates(target: str) -> None:
    rotated = Option(4, 0, 64, 0, rotated=True)
    found = layer("model.layers.0.mlp.up_proj", 256, 256, (*OPTIONS, rotated))
    assert not target_named(target).executes(found, rotated)
    assert target_named("transformers").executes(found, rotated)


def test_sizes_for_llama_cpp_are_those_of_its_types() -> None:
    """Bits per weight by llama.cpp's own table, scales included."""
    assert {bits: kind.bits_per_weight for bits, kind in TYPES.items()} == {
        2: 2.625, 3: 3.4375, 4: 4.5, 5: 5.5, 6: 6.5625, 8: 8.5, 16: 16.0,
    }  # fmt: skip
    for one in target_named("llama.cpp").restricted(menu(hidden=512)).layers:
        for option, size in zip(one.options, one.total_bytes, strict=True):
            assert size * 8 == TYPES[option.bits].bits_per_weight * one.weights


def test_llama_cpp_rows_are_whole_blocks() -> None:
    """256 weights for the k-types, 32 for q8_0: elsewhere llama-quantize would take another type."""
    odd, runtime = layer("odd", 64, 288), target_named("llama.cpp")
    assert {o.bits for o in OPTIONS if runtime.executes(odd, o)} == {8, 16}


def test_the_native_target_restricts_nothing() -> None:
    found = menu()
    assert [one.options for one in target_named("transformers").restricted(found).layers] == [OPTIONS] * 14


# Bad input


def test_an_unknown_target_lists_the_known_ones() -> None:
    with pytest.raises(
        TargetError, match=r"target 'onnx' is unknown; choose from transformers, vllm.*llama\.cpp"
    ):
        target_named("onnx")


@pytest.mark.parametrize("target", ["vllm", "gptqmodel", "llama.cpp"])
def test_a_budget_that_the_target_makes_infeasible_names_the_smallest_feasible(target: str) -> None:
    found, runtime = menu(), target_named(target)
    restricted, required = runtime.restricted(found), runtime.constrained(Constraints())
    with pytest.raises(InfeasibleError) as refused:
        allocate(restricted, int(found.original_bytes * 0.1), required)
    smallest = refused.value.smallest_bytes
    assert f"{smallest} bytes" in str(refused.value)
    assert allocate(restricted, smallest, required).proven
    with pytest.raises(InfeasibleError):
        allocate(restricted, smallest - 1, required)


def test_a_strategy_that_splits_what_vllm_fuses_is_refused() -> None:
    restricted = target_named("vllm").restricted(menu())
    same = uniform(restricted, 4, 0, 64)
    check_fused(restricted, same, "vllm", "uniform:4")
    split = same.copy()
    split[1] = restricted.layers[1].options.index(KEEP)
    with pytest.raises(
        StrategyError, match=r"q_proj' and .*k_proj' and .*v_proj' different.*vllm fuses them"
    ):
        check_fused(restricted, split, "vllm", "policy")
    check_fused(restricted, split, "gptqmodel", "policy")


def test_fused_layers_without_a_common_group_size_are_named() -> None:
    options = {"gate_proj": (Option(4, 0, 64, 0),), "up_proj": (Option(4, 0, 128, 0),)}
    pair = Menu(tuple(layer(f"0.{name}", 512, 256, few) for name, few in options.items()), {})
    with pytest.raises(
        ContradictoryPinsError, match="share no bits with one group size: '0.gate_proj' may have"
    ):
        allocate(pair, 10**9, Constraints(auto_ties=True, tie_group_sizes=True))


def test_a_plan_for_llama_cpp_is_not_compressed_here() -> None:
    with pytest.raises(PlanError, match=r"the plan is for llama\.cpp.*--format llama-quantize"):
        check_compressible("llama.cpp")
    for target in (None, "vllm", "transformers"):
        check_compressible(target)


def with_table(found: Menu) -> Menu:
    options = (*(Option(bits, 0, size, 0) for bits in (8, 6, 4) for size in (32, 64, 128)), KEEP)
    return replace(
        found, layers=(*found.layers, replace(layer("embed", 512, 256, options), table="tied")), kept={}
    )


def test_a_runtime_that_keeps_tables_refuses_a_menu_that_offers_them() -> None:
    for target in ("vllm", "llm-compressor", "gptqmodel"):
        check_tables(menu(), target)
        with pytest.raises(TargetError, match=f"target {target} holds embeddings.*plan without --embeddings"):
            check_tables(with_table(menu()), target)


def test_llama_cpp_takes_tables_at_the_sizes_of_its_types() -> None:
    check_tables(with_table(menu()), "llama.cpp")
    table = TARGETS["llama.cpp"].restricted(with_table(menu())).layers[-1]
    sizes = dict(zip((o.bits for o in table.options), table.total_bytes.tolist(), strict=True))
    assert table.table == "tied"
    assert sizes == {
        8: TYPES[8].tensor_bytes(512, 256),
        6: TYPES[6].tensor_bytes(512, 256),
        4: TYPES[4].tensor_bytes(512, 256),
        16: 2 * 512 * 256,
    }
