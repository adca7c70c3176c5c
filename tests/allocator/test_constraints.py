"""Constraints: every layer of an allocation respects them, and nothing that does is cheaper."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocator.allocation import Resource, allocate
from allocator.constraints.reduction import constrain
from allocator.constraints.rules import (
    Ban,
    BitsRange,
    Constraints,
    Device,
    Pattern,
    Pin,
    QualityFloor,
    tie_groups,
)
from allocator.constraints.ties import merge_of
from allocator.errors import (
    ConstraintError,
    ContradictoryPinsError,
    ExhaustedMenuError,
    InfeasibleError,
    InvalidProblemError,
    ProblemTooLargeError,
    UnmatchedPatternError,
)
from allocator.problem import LayerMenu, Menu
from allocator.resources.milp import solve_resources_milp
from allocator.resources.problem import ResourceProblem
from allocator.solver.knapsack import solve
from allocator.storage import Option

OPTIONS = tuple(Option(bits, rank, 64, 4 if rank else 0) for bits in (2, 3, 4) for rank in (0, 16))
NAMES = tuple(
    f"model.layers.{block}.{part}"
    for block in range(2)
    for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
)


def layer(name: str, cost: list[float], size: list[int], options: tuple[Option, ...] = OPTIONS) -> LayerMenu:
    total = np.array(size, dtype=np.int64)
    return LayerMenu(name, 8, 8, 128, options, total, np.array(cost) / 100, np.array(cost, dtype=np.float64))


@st.composite
def menus(draw: st.DrawFn) -> Menu:
    count = draw(st.integers(3, 6))
    shared = draw(st.lists(st.integers(0, 12), min_size=6, max_size=6))
    layers = []
    for name in NAMES[:count]:
        size = shared if draw(st.booleans()) else draw(st.lists(st.integers(0, 12), min_size=6, max_size=6))
        kept = draw(st.integers(1, 3))
        cost = draw(st.lists(st.integers(0, 9), min_size=6, max_size=6))
        layers.append(layer(name, cost[: 2 * kept], size[: 2 * kept], OPTIONS[: 2 * kept]))
    return Menu(tuple(layers), {"embed": 5})


def choices(menu: Menu) -> np.ndarray:
    return np.array(list(itertools.product(*(range(len(layer.options)) for layer in menu.layers))))


def bits_of(menu: Menu, choice: np.ndarray) -> list[int]:
    return [one.options[k].bits for one, k in zip(menu.layers, choice, strict=True)]


def best_cost(menu: Menu, total_bytes: int, holds=lambda choice: True) -> float | None:
    """The optimum by looking at every choice there is."""
    least = None
    for choice in choices(menu):
        size = sum(int(one.total_bytes[k]) for one, k in zip(menu.layers, choice, strict=True))
        cost = sum(float(one.cost[k]) for one, k in zip(menu.layers, choice, strict=True))
        if size + 5 <= total_bytes and (least is None or cost < least) and holds(choice):
            least = cost
    return least


def check(menu: Menu, constraints: Constraints, total_bytes: int, holds, resources=()) -> None:
    expected = best_cost(menu, total_bytes, holds)
    if expected is None:
        with pytest.raises(InfeasibleError):
            allocate(menu, total_bytes, constraints, resources)
        return
    found = allocate(menu, total_bytes, constraints, resources)
    assert holds(found.choice)
    assert found.cost == pytest.approx(expected)
    assert found.proven
    taken = list(zip(menu.layers, found.choice, strict=True))
    assert found.total_bytes == sum(one.total_bytes[k] for one, k in taken) <= total_bytes - 5
    assert found.cost == pytest.approx(sum(one.cost[k] for one, k in taken))


def attention_tied(menu: Menu):
    def holds(choice) -> bool:
        bits = dict(zip((one.name for one in menu.layers), bits_of(menu, choice), strict=True))
        pairs = [(name, name.replace("q_proj", "k_proj")) for name in bits if name.endswith("q_proj")]
        return all(bits[q] == bits[k] for q, k in pairs if k in bits)

    return holds


@settings(max_examples=60, deadline=None)
@given(menus(), st.integers(0, 70))
def test_without_constraints_the_knapsack_is_the_menus_own(menu, total_bytes):
    check(menu, Constraints(), total_bytes, lambda choice: True)


@settings(max_examples=120, deadline=None)
@given(menus(), st.integers(0, 70))
def test_tied_layers_share_bits_at_the_least_cost(menu, total_bytes):
    check(menu, Constraints(auto_ties=True), total_bytes, attention_tied(menu))


@settings(max_examples=60, deadline=None)
@given(menus(), st.integers(0, 70))
def test_a_tie_of_all_layers_has_one_width(menu, total_bytes):
    check(menu, Constraints(ties=(("*",),)), total_bytes, lambda choice: len(set(bits_of(menu, choice))) == 1)


@pytest.mark.parametrize("seed", range(4))
def test_merged_ties_and_the_integer_programme_with_equal_bits_agree(seed):
    rng = np.random.default_rng(seed)
    options = tuple(Option(bits, rank, 64, 4 if rank else 0) for bits in (2, 3, 4, 5) for rank in (0, 8, 16))
    names = [f"layers.{b}.{p}_proj" for b in range(8) for p in ("q", "k", "v", "o")]
    layers = []
    for name in names:
        size = np.sort(rng.integers(10**4, 10**6, len(options)))
        cost = rng.lognormal() * 2.0 ** -np.array([2 * o.bits + o.rank / 20 for o in options])
        layers.append(
            LayerMenu(name, 8, 8, 9, options, size, cost, cost * rng.lognormal(0, 0.2, len(options)))
        )
    menu, tied = Menu(tuple(layers), {}), Constraints(auto_ties=True)
    total_bytes = int(rng.uniform(1.2, 3) * sum(int(one.total_bytes[0]) for one in layers)) + 2 * 10**6
    merged = allocate(menu, total_bytes, tied)
    separate = constrain(menu, Constraints(), total_bytes)
    equal = replace(
        ResourceProblem.of(separate.problem),
        level=separate.bits,
        ties=tuple(np.array(group) for group in tie_groups(menu, tied) if len(group) > 1),
    )
    exact = solve_resources_milp(equal)
    assert merged.proven and exact.proven
    assert merged.cost == pytest.approx(exact.cost, rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(menus(), st.integers(0, 70), st.sampled_from(["falling", "rising"]), st.booleans())
def test_bits_are_monotone_in_depth_role_by_role(menu, total_bytes, direction, tied):
    def holds(choice) -> bool:
        if tied and not attention_tied(menu)(choice):
            return False
        bits = dict(zip((one.name for one in menu.layers), bits_of(menu, choice), strict=True))
        sign = -1 if direction == "falling" else 1
        steps = [(name, name.replace("layers.0", "layers.1")) for name in bits if "layers.0" in name]
        return all(sign * (bits[deep] - bits[shallow]) >= 0 for shallow, deep in steps if deep in bits)

    check(menu, Constraints(monotone=direction, auto_ties=tied), total_bytes, holds)


@settings(max_examples=60, deadline=None)
@given(menus(), st.integers(0, 70), st.integers(0, 40), st.integers(0, 40), st.integers(1, 3))
def test_every_device_keeps_its_budget(menu, total_bytes, first, second, shards):
    if len(menu.layers) < 4:
        return
    devices = (Device("a", ("*.layers.0.*",), first, shards), Device("b", ("*.layers.1.*",), second))

    def holds(choice) -> bool:
        size = [int(one.total_bytes[k]) for one, k in zip(menu.layers, choice, strict=True)]
        return sum(-(-s // shards) for s in size[:3]) <= first and sum(size[3:]) <= second

    check(menu, Constraints(devices=devices), total_bytes, holds)


@settings(max_examples=60, deadline=None)
@given(menus(), st.integers(0, 70), st.integers(0, 40), st.booleans(), st.randoms(use_true_random=False))
def test_a_second_resource_is_respected_with_ties_too(menu, total_bytes, limit, tied, random):
    use = [np.array([random.randrange(9) for _ in one.options], dtype=np.int64) for one in menu.layers]

    def holds(choice) -> bool:
        if tied and not attention_tied(menu)(choice):
            return False
        return sum(int(table[k]) for table, k in zip(use, choice, strict=True)) <= limit

    check(menu, Constraints(auto_ties=tied), total_bytes, holds, [Resource("latency", use, limit)])


@settings(max_examples=80, deadline=None)
@given(menus(), st.integers(0, 70), st.integers(2, 4), st.integers(2, 4), st.floats(0.02, 0.09))
def test_rules_hold_for_every_layer_they_match(menu, total_bytes, least, most, max_error):
    constraints = Constraints(
        bans=(Ban("*.q_proj", Pattern(rank=16)),),
        bits=(BitsRange(min(least, most), max(least, most), "*.0.*"),),
        floors=(QualityFloor("*.k_proj", max_error=max_error),),
    )

    def holds(choice) -> bool:
        for one, k in zip(menu.layers, choice, strict=True):
            option = one.options[k]
            if one.name.endswith("q_proj") and option.rank == 16:
                return False
            if ".0." in one.name and not min(least, most) <= option.bits <= max(least, most):
                return False
            if one.name.endswith("k_proj") and one.error[k] > max_error:
                return False
        return True

    try:
        check(menu, constraints, total_bytes, holds)
    except ExhaustedMenuError:
        assert best_cost(menu, 10**9, holds) is None


def wide_menu() -> Menu:
    cost, size = [9.0, 8, 4, 3, 2, 1], [2, 3, 4, 5, 6, 7]
    return Menu(tuple(layer(name, cost, size) for name in NAMES), {"embed": 5})


def test_a_pin_fixes_what_its_pattern_names_and_leaves_the_rest_free():
    menu = wide_menu()
    found = allocate(menu, 10**6, Constraints(pins=(Pin("*.down_proj", Pattern(bits=2)),)))
    pinned = [one.options[k] for one, k in zip(menu.layers, found.choice, strict=True) if "down" in one.name]
    assert pinned == [Option(2, 16, 64, 4)] * 2


def test_layers_fused_by_runtimes_are_tied_by_name_and_overlapping_ties_join():
    menu = wide_menu()
    assert tie_groups(menu, Constraints(auto_ties=True)) == [[0, 1], [2], [3, 4], [5]]
    joined = Constraints(auto_ties=True, ties=(("*.0.*.k_proj", "*.0.*.down_proj"),))
    assert tie_groups(menu, joined) == [[0, 1, 2], [3, 4], [5]]


@pytest.mark.parametrize(
    ("constraints", "error", "message"),
    [
        (
            Constraints(pins=(Pin("*.0.*", Pattern(bits=2)), Pin("*q_proj", Pattern(bits=4)))),
            ContradictoryPinsError,
            "0.self_attn.q_proj': the pin '\\*.0.\\*' to bits=2 contradicts the pin '\\*q_proj' to bits=4",
        ),
        (
            Constraints(pins=(Pin("*q_proj", Pattern(bits=2)),), bans=(Ban("*", Pattern(bits=2)),)),
            ContradictoryPinsError,
            "contradicts the ban of bits=2",
        ),
        (
            Constraints(pins=(Pin("*q_proj", Pattern(bits=2)),), bits=(BitsRange(min_bits=4),)),
            ContradictoryPinsError,
            "contradicts the 4 to 16 bits on '\\*': the options left have bits \\[2\\], 2 off",
        ),
        (
            Constraints(
                pins=(Pin("*q_proj", Pattern(bits=2)), Pin("*k_proj", Pattern(bits=3))), auto_ties=True
            ),
            ContradictoryPinsError,
            "tied layers share no bits: .*q_proj' may have bits \\[2\\]; .*k_proj' may have bits \\[3\\]",
        ),
        (Constraints(pins=(Pin("*q_proj", Pattern(bits=7)),)), ExhaustedMenuError, "bits \\[2, 3, 4\\]"),
        (Constraints(bits=(BitsRange(min_bits=6),)), ExhaustedMenuError, "2 off"),
        (
            Constraints(floors=(QualityFloor(max_error=0.005),)),
            ExhaustedMenuError,
            "the least error left is 0.01, 0.005 above",
        ),
        (
            Constraints(pins=(Pin("*.9.*", Pattern(bits=2)),)),
            UnmatchedPatternError,
            "no layer matches '\\*.9.\\*'",
        ),
        (Constraints(ties=(("*.9.*",),)), UnmatchedPatternError, "no layer matches"),
        (Constraints(devices=(Device("a", ("x",), 9),)), UnmatchedPatternError, "device 'a' has no layer"),
        (
            Constraints(devices=(Device("a", ("*",), 90), Device("b", ("*.0.*",), 90))),
            ConstraintError,
            "on devices 'a' and 'b'",
        ),
        (
            Constraints(
                auto_ties=True, devices=(Device("a", ("*q_proj",), 90), Device("b", ("*k_proj",), 90))
            ),
            ConstraintError,
            "tied to a layer on another device",
        ),
        (Constraints(devices=(Device("a", ("*",), 9, shards=0),)), ConstraintError, "at least one shard"),
        (Constraints(ties=(("*.down_proj",),), monotone="falling"), ConstraintError, "can't be monotone"),
    ],
)
def test_impossible_constraints_say_which_and_how_far(constraints, error, message):
    with pytest.raises(error, match=message):
        allocate(wide_menu(), 10**6, constraints)


@pytest.mark.parametrize(
    "change",
    [
        {"cost": np.array([9, 8, np.nan, 3, 2, 1])},
        {"cost": np.array([9, 8, np.inf, 3, 2, 1])},
        {"total_bytes": np.array([-1, 3, 4, 5, 6, 7])},
        {"total_bytes": np.array([0.5, 3, 4, 5, 6, 7])},
    ],
)
def test_a_menu_with_senseless_numbers_names_the_layer(change):
    layers = wide_menu().layers
    menu = Menu((layers[0], replace(layers[1], **change), *layers[2:]), {})
    with pytest.raises(InvalidProblemError, match="k_proj' has"):
        constrain(menu, Constraints(auto_ties=True), 100)


def test_too_small_a_budget_names_the_constraint_that_costs_most():
    constraints = Constraints(bits=(BitsRange(min_bits=4),), bans=(Ban("*.0.*", Pattern(rank=16)),))
    with pytest.raises(
        InfeasibleError, match="takes 41 bytes, 1 more than the budget; without the 4 to 16 bits"
    ) as e:
        allocate(wide_menu(), 40, constraints)
    assert e.value.smallest_bytes == 41
    assert allocate(wide_menu(), 41, constraints).total_bytes == 36


def test_too_small_a_device_is_named_with_its_shortfall():
    constraints = Constraints(devices=(Device("gpu0", ("*.0.*",), 5),))
    with pytest.raises(InfeasibleError, match="device 'gpu0'.*6 bytes.*1 more"):
        allocate(wide_menu(), 10**6, constraints)


@pytest.mark.parametrize("table", [[np.arange(6)] * 5, [np.arange(5)] * 6])
def test_a_resource_table_that_does_not_fit_the_menu_is_refused(table):
    with pytest.raises(ValueError, match="latency has"):
        allocate(wide_menu(), 100, None, [Resource("latency", table, 10)])


def test_a_product_beyond_the_cap_is_refused_with_both_numbers():
    many = np.zeros(32_000, dtype=np.int64)
    with pytest.raises(ProblemTooLargeError, match="1024000000 pairs.*cap of 20000000"):
        merge_of(many, many, many, many)


def test_the_merged_product_keeps_every_useful_sum_and_nothing_else():
    menu = wide_menu()
    tied = constrain(menu, Constraints(ties=(("*.0.*",),)), 10**6)
    first = slice(*tied.problem.start[:2])
    size, cost = tied.problem.size[first], tied.problem.cost[first]
    assert (np.diff(size) > 0).all()
    assert (np.diff(cost) < 0).all()
    relaxed = replace(tied.problem, budget_bytes=10**6)
    assert solve(relaxed).cost == pytest.approx(6.0)
