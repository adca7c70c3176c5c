"""Plans next to the optimum: they fit, they differ in one or two layers, and the least dear come first."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from allocator.plan import optimal_choice
from allocator.problem import LayerMenu, Menu
from allocator.storage import Option
from allocator.strategies.neighbours import neighbours
from allocator.strategies.strategies import choice_bytes, choice_cost


@st.composite
def menus(draw: st.DrawFn) -> Menu:
    generator = np.random.default_rng(draw(st.integers(0, 10_000)))
    layers = []
    for index in range(draw(st.integers(1, 6))):
        count = draw(st.integers(1, 5))
        options = tuple(Option(bits, 0, 64, 0) for bits in (2, 3, 4, 5, 6)[:count])
        size = generator.integers(1, 100, count)
        cost = generator.random(count)
        layers.append(LayerMenu(f"layer.{index}", 8, 8, 128, options, size, cost, cost))
    return Menu(tuple(layers), {"kept": 7})


@settings(deadline=None, max_examples=60)
@given(menu=menus(), share=st.floats(0, 1), count=st.integers(0, 5))
def test_neighbours_fit_and_move_one_or_two_layers_each_of_its_own(
    menu: Menu, share: float, count: int
) -> None:
    smallest = menu.kept_bytes + sum(int(layer.total_bytes.min()) for layer in menu.layers)
    largest = menu.kept_bytes + sum(int(layer.total_bytes.max()) for layer in menu.layers)
    total_bytes = int(smallest + share * (largest - smallest))
    solution = optimal_choice(menu, total_bytes)
    found = neighbours(menu, solution.choice, total_bytes, solution.shadow_price, count)
    assert len(found) <= count
    moved = [set(np.flatnonzero(other != solution.choice).tolist()) for other in found]
    assert all(1 <= len(layers) <= 2 for layers in moved)
    assert sum(map(len, moved)) == len(set().union(*moved)), "no layer moves in two of them"
    assert all(choice_bytes(menu, other) <= total_bytes for other in found)
    costs = [choice_cost(menu, other) for other in found]
    assert costs == sorted(costs)
    assert all(cost >= solution.cost - 1e-9 for cost in costs), "the optimum stays the optimum"


def test_the_nearest_neighbour_is_the_best_single_change_that_fits() -> None:
    options = tuple(Option(bits, 0, 64, 0) for bits in (2, 3, 4))
    layers = tuple(
        LayerMenu(name, 8, 8, 128, options, np.array([10, 20, 30]), cost, cost)
        for name, cost in (("a", np.array([9.0, 4.0, 1.0])), ("b", np.array([3.0, 2.5, 2.0])))
    )
    menu = Menu(layers, {})
    chosen = optimal_choice(menu, 40).choice
    assert chosen.tolist() == [2, 0]
    (nearest,) = neighbours(menu, chosen, 40, 0.05, 1)
    assert nearest.tolist() == [1, 1]
