"""Strategies: one choice per layer, read from the same menu as the optimum."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.errors import InfeasibleError, StrategyError
from allocator.problem import LayerMenu, Menu
from allocator.storage import KEEP, Option, layer_bytes
from allocator.strategies.strategies import (
    Optimal,
    Progressive,
    Rule,
    Uniform,
    choice_bytes,
    choice_cost,
    choose,
    disturbed,
    energy,
    interpolated_uniform_cost,
    manual,
    optimal,
    parse_strategy,
    policy,
    progressive,
    tiered,
    uniform,
    uniform_points,
)

PLAIN = tuple(Option(bits, 0, 64, 0) for bits in range(2, 9))
RANKED = tuple(Option(bits, 64, 64, factor_bits) for bits in range(2, 9) for factor_bits in (8, 4))
OPTIONS = (*PLAIN, *RANKED, Option(3, 0, 128, 0), KEEP)


def layer(name: str, rows: int = 256, columns: int = 256, options: tuple[Option, ...] = OPTIONS) -> LayerMenu:
    total = np.array([layer_bytes(rows, columns, o, 2 * rows * columns) for o in options], dtype=np.int64)
    error = np.array([2.0 ** (-2 * o.bits) / (1 + o.rank / 64) for o in options])
    return LayerMenu(name, rows, columns, 2 * rows * columns, options, total, error, error * rows)


def block_menu(blocks: int = 4) -> Menu:
    names = [
        f"model.layers.{block}.mlp.{part}" for block in range(blocks) for part in ("up_proj", "down_proj")
    ]
    return Menu(tuple(layer(name) for name in names), {"embed": 1000})


def bits_of(menu: Menu, choice: np.ndarray) -> list[int]:
    return [layer.options[k].bits for layer, k in zip(menu.layers, choice, strict=True)]


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("optimal", Optimal()),
        ("uniform:3", Uniform(3)),
        (" uniform:3:r64 ", Uniform(3, 64)),
        ("uniform:3:g128", Uniform(3, 0, 128)),
        ("uniform:16", Uniform(16)),
        ("uniform:2:r32:g128", Uniform(2, 32, 128)),
        ("uniform:3:rotated", Uniform(3, rotated=True)),
        ("uniform:2:r32:g128:rotated", Uniform(2, 32, 128, True)),
        ("progressive", Progressive(-2.0)),
        ("progressive:rise", Progressive(2.0)),
    ],
)
def test_a_strategy_text_is_read(text, parsed):
    assert parse_strategy(text) == parsed


@pytest.mark.parametrize(
    ("text", "nearest"), [("unifrom:3", "uniform"), ("optimum", "optimal"), ("progresive", "progressive")]
)
def test_an_unknown_strategy_names_the_nearest_and_the_list(text, nearest):
    with pytest.raises(
        StrategyError, match=f"did you mean '{nearest}'.*Known: optimal; uniform.*progressive"
    ):
        parse_strategy(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "uniform",
        "uniform:",
        "uniform:3:64",
        "uniform:3:g0",
        "uniform:1",
        "uniform:9",
        "uniform:3:rotated:r8",
        "optimal:3",
    ],
)
def test_a_malformed_strategy_is_refused(text):
    with pytest.raises(StrategyError):
        parse_strategy(text)


def test_uniform_takes_the_same_bits_everywhere():
    menu = block_menu()
    assert set(bits_of(menu, uniform(menu, 3))) == {3}
    assert all(menu.layers[0].options[k] == Option(3, 0, 64, 0) for k in uniform(menu, 3))


def test_only_a_strategy_that_says_so_rotates():
    turned = Option(3, 0, 64, 0, rotated=True)
    found = Menu((layer("model.layers.0.up_proj", options=(*PLAIN, turned, KEEP)),), {"embed": 1000})
    (choice,) = uniform(found, 3, rotated=True)
    assert found.layers[0].options[choice] == turned
    for plain in (uniform(found, 3), progressive(found, choice_bytes(found, uniform(found, 3)))):
        assert not found.layers[0].options[plain[0]].rotated
    with pytest.raises(StrategyError, match="does not offer 4 bits, group 64, rotated"):
        uniform(found, 4, rotated=True)


def test_uniform_prefers_four_bit_factors_and_takes_what_is_offered():
    menu = block_menu()
    assert menu.layers[0].options[uniform(menu, 3, 64)[0]].factor_bits == 4
    only_eight = Menu((layer("a", options=(Option(3, 64, 64, 8),)),), {})
    assert only_eight.layers[0].options[uniform(only_eight, 3, 64)[0]].factor_bits == 8


def test_uniform_names_the_layer_that_lacks_the_option():
    menu = Menu((layer("first"), layer("second", options=PLAIN[2:])), {})
    with pytest.raises(StrategyError, match="'second' does not offer 3 bits, group 64"):
        uniform(menu, 3)


def test_manual_uses_the_first_glob_that_matches():
    menu = block_menu(2)
    choice = manual(menu, {"*.0.*": Option(8, 0, 64, 0), "*": Option(2, 0, 64, 0)})
    assert bits_of(menu, choice) == [8, 8, 2, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"*.9.*": PLAIN[0]}, "no layer matches"), ({"*.0.*": PLAIN[0]}, "no rule covers 'model.layers.1")],
)
def test_manual_refuses_globs_without_layers_and_layers_without_globs(options, message):
    with pytest.raises(StrategyError, match=message):
        manual(block_menu(2), options)


def test_policy_rules_see_name_shape_and_size():
    menu = Menu((layer("a.q", 64, 64), layer("a.k", 64, 128), layer("a.big", 512, 512), layer("a.rest")), {})
    eight, four, three, two = (Option(bits, 0, 64, 0) for bits in (8, 4, 3, 2))
    rules = [Rule(eight, "*.q"), Rule(four, shape=(64, 128)), Rule(three, min_weights=512 * 512), Rule(two)]
    assert bits_of(menu, policy(menu, rules)) == [8, 4, 3, 2]
    assert bits_of(menu, policy(menu, [Rule(two, max_weights=64 * 64), Rule(eight)])) == [2, 8, 8, 8]


def test_energy_takes_the_smallest_option_that_keeps_the_share():
    menu = block_menu(1)
    kept = [1 - layer.error for layer in menu.layers]
    choice = energy(menu, kept, 0.99)
    for one, k, share in zip(menu.layers, choice, kept, strict=True):
        assert share[k] >= 0.99
        assert one.total_bytes[k] == one.total_bytes[share >= 0.99].min()


def test_energy_says_what_the_best_option_keeps():
    with pytest.raises(StrategyError, match="keeps at most 0.5"):
        energy(Menu((layer("a"),), {}), [np.full(len(OPTIONS), 0.5)], 0.9)


def test_progressive_bits_fall_or_rise_with_depth_and_fit():
    menu = block_menu(8)
    budget = choice_bytes(menu, uniform(menu, 4))
    for step, sign in ((-3.0, -1), (3.0, 1)):
        choice = progressive(menu, budget, step)
        bits = np.array(bits_of(menu, choice))
        assert (sign * np.diff(bits) >= 0).all()
        assert bits[0] != bits[-1]
        assert choice_bytes(menu, choice) <= budget


def test_progressive_uses_the_budget():
    menu = block_menu(8)
    budget = choice_bytes(menu, uniform(menu, 5))
    assert choice_bytes(menu, progressive(menu, budget, 0.0)) == budget


def test_tiers_lose_a_bit_each_and_fit():
    menu = block_menu(4)
    budget = choice_bytes(menu, uniform(menu, 4))
    choice = tiered(menu, budget, [["*.0.*"], ["*.1.*", "*.2.*"]])
    first, middle, last = (bits_of(menu, choice)[index] for index in (0, 2, 6))
    assert first > middle > last
    assert choice_bytes(menu, choice) <= budget


def test_a_budget_below_the_fewest_bits_says_how_far():
    menu = block_menu()
    smallest = choice_bytes(menu, uniform(menu, 2))
    with pytest.raises(InfeasibleError, match="1 more than the budget") as caught:
        progressive(menu, smallest - 1)
    assert caught.value.smallest_bytes == smallest


@given(st.floats(2.5, 8.0))
def test_the_optimum_is_never_worse_than_any_strategy_at_its_bytes(level):
    menu = block_menu()
    budget = int(choice_bytes(menu, uniform(menu, 8)) * level / 8)
    for strategy in (Progressive(-2.0), Progressive(2.0)):
        choice = choose(strategy, menu, budget)
        best = choose(Optimal(), menu, choice_bytes(menu, choice))
        assert choice_cost(menu, best) <= choice_cost(menu, choice) * (1 + 1e-12)
        assert choice_bytes(menu, best) <= choice_bytes(menu, choice)


def test_uniform_points_are_the_offered_widths_at_menu_bytes():
    menu = block_menu()
    points = uniform_points(menu)
    assert len(points) == 7
    assert points[1] == (choice_bytes(menu, uniform(menu, 3)), choice_cost(menu, uniform(menu, 3)))


def test_interpolation_is_linear_in_bytes_and_log_cost():
    points = [(100, 1.0), (200, 0.01)]
    assert interpolated_uniform_cost(points, 100) == pytest.approx(1.0)
    assert interpolated_uniform_cost(points, 150) == pytest.approx(0.1)
    assert interpolated_uniform_cost(points[::-1], 175) == pytest.approx(math.sqrt(0.1 * 0.01))


@pytest.mark.parametrize(("points", "at"), [([(1, 1.0), (2, 0.5)], 3), ([(1, 0.0)], 1), ([], 1)])
def test_interpolation_never_extrapolates(points, at):
    with pytest.raises(StrategyError):
        interpolated_uniform_cost(points, at)


@pytest.mark.parametrize("bits", [2.5, 3.5])
def test_disturbed_plans_use_the_budget_and_differ_by_seed(bits: float) -> None:
    menu = block_menu()
    total_bytes = menu.kept_bytes + int(bits * menu.compressible_weights / 8)
    choices = [disturbed(menu, total_bytes, seed) for seed in range(8)]
    assert all(choice_bytes(menu, choice) <= total_bytes for choice in choices)
    assert len({tuple(choice) for choice in choices}) > 4
    assert np.array_equal(choices[3], disturbed(menu, total_bytes, 3))


def test_undisturbed_a_disturbed_plan_is_the_optimum() -> None:
    menu = block_menu()
    total_bytes = menu.kept_bytes + 3 * menu.compressible_weights // 8
    assert np.array_equal(disturbed(menu, total_bytes, 0, spread=0.0), optimal(menu, total_bytes))
