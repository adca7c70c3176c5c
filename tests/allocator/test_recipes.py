"""Recipes for rank at fixed bits: what each gives a block, and the options it takes."""

from __future__ import annotations

import numpy as np
import pytest

from allocator.errors import StrategyError
from allocator.problem import LayerMenu, Menu
from allocator.storage import Option, layer_bytes
from allocator.strategies.recipes import RECIPES, Recipe, Sensitivities
from allocator.strategies.strategies import ByRecipe, by_recipe, choice_bytes, choose, parse_strategy
from benchmarks.fidelity_table import Assignment, Guess, build_menu, fidelities, ultra

TABLE = Sensitivities(
    (0.2, 0.05, 0.04, 0.06, 0.03, 0.3, 0.1, 0.02),
    ("high", "low", "low", "low", "low", "critical", "high", "low"),
)
RANKS = (16, 32, 64, 96, 128, 256)


def menu_of(width: int, ranks: tuple[int, ...] = RANKS, blocks: int = 8) -> Menu:
    options = (Option(3), *(Option(3, rank, 64, factors) for rank in ranks for factors in (4, 8)))
    size = np.array([layer_bytes(width, width, o, 2 * width**2) for o in options], dtype=np.int64)
    error = np.array([1 / (1 + o.rank) for o in options])
    layers = [
        LayerMenu(f"model.layers.{block}.{part}", width, width, 2 * width**2, options, size, error, error)
        for block in range(blocks)
        for part in ("up", "down")
    ]
    return Menu(tuple(layers), {"embed": 1000})


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        ("uniform-rank", [64] * 8),
        ("fidelity", [256, 64, 64, 256, 64, 256, 256, 64]),
        ("aggressive", [256, 48, 48, 48, 48, 256, 48, 48]),
        ("tiered", [96, 48, 48, 48, 48, 192, 96, 48]),
        ("ultra", [256, 40, 40, 128, 40, 256, 128, 40]),
        ("extreme", [128, 32, 32, 128, 32, 384, 128, 32]),
        ("proportional", [128, 32, 26, 38, 19, 192, 64, 13]),
    ],
)
def test_a_recipe_gives_every_block_a_rank(name: str, ranks: list[int]) -> None:
    assert list(Recipe(name).ranks(1536, 8, TABLE)) == ranks


@pytest.mark.parametrize("name", RECIPES)
def test_ranks_follow_the_width_of_the_model(name: str) -> None:
    published, narrow = (np.array(Recipe(name).ranks(width, 8, TABLE)) for width in (1536, 384))
    assert (abs(narrow - published / 4) <= 0.5).all()
    assert min(Recipe(name).ranks(1, 8, TABLE)) == 1


def test_blocks_that_cost_nothing_share_alike() -> None:
    assert Recipe("proportional").ranks(1536, 2, Sensitivities((0.0, 0.0), ("low", "low"))) == (64, 64)


def test_ultra_on_the_published_table_is_the_published_assignment() -> None:
    guess, table = Guess(), fidelities()
    menu = build_menu(guess, bits=(3,), ranks=(40, 128, 256))
    sensitivities = Sensitivities(tuple(table.tolist()), ("low",) * len(table))
    found = Assignment.of(menu, by_recipe(menu, Recipe("ultra"), sensitivities))
    expected = ultra(guess)
    assert (found.ranks == expected.ranks).all() and (found.bits == 3).all()
    assert found.total_bytes == expected.total_bytes


def test_the_nearest_rank_that_was_profiled_is_taken_with_the_fewest_factor_bits() -> None:
    menu = menu_of(1536, ranks=(16, 64, 200))
    choice = by_recipe(menu, Recipe("ultra"), TABLE)
    taken = [layer.options[k] for layer, k in zip(menu.layers, choice, strict=True)]
    assert [option.rank for option in taken[::2]] == [200, 64, 64, 200, 64, 200, 200, 64]
    assert {(option.bits, option.factor_bits) for option in taken} == {(3, 4)}


def test_a_recipe_is_read_with_its_bits() -> None:
    assert parse_strategy("ultra") == ByRecipe(Recipe("ultra", 3))
    assert parse_strategy("uniform-rank:2") == ByRecipe(Recipe("uniform-rank", 2))
    for text in ("ultra:9", "ultra:3:r64", "extreme:"):
        with pytest.raises(StrategyError, match="malformed"):
            parse_strategy(text)


def test_a_recipe_has_bytes_of_its_own() -> None:
    menu = menu_of(384)
    small, large = (choice_bytes(menu, choose(ByRecipe(Recipe("ultra"), TABLE), menu, b)) for b in (1, 10**9))
    assert small == large


def test_sensitivities_are_needed_and_must_be_of_the_model() -> None:
    menu = menu_of(384)
    with pytest.raises(
        StrategyError, match="goes by the fidelity of blocks, and the profile has no fidelity"
    ):
        by_recipe(menu, Recipe("ultra"))
    with pytest.raises(StrategyError, match="is of 8 blocks and the model has 4"):
        by_recipe(menu_of(384, blocks=4), Recipe("ultra"), TABLE)
    by_recipe(menu, Recipe("uniform-rank"))


def test_a_menu_without_rank_at_these_bits_says_what_to_profile() -> None:
    with pytest.raises(
        StrategyError, match="offers no rank at 4 bits and group 64, .* profile with --bits 4"
    ):
        by_recipe(menu_of(384), Recipe("ultra", 4), TABLE)
