"""The ways to choose an option for every layer without searching, and the text that names them.

What lives here: functions (Menu, ...) -> choice (G,) int64, the option taken, counted within its layer. All
of them read the bytes and costs of the menu, so every comparison with the optimum is at equal accounting. The
optimum itself is `knapsack.py`; plans made from a choice are `plan.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase

import numpy as np

from allocator.errors import InfeasibleError, StrategyError
from allocator.problem import Floats, Integers, LayerMenu, Menu
from allocator.solver.knapsack import solve
from allocator.storage import KEEP_BITS, Option
from allocator.strategies.recipes import RECIPES, Recipe, Sensitivities

FACTOR_PREFERENCE = (4, 8, KEEP_BITS)
"""Factor bits in the order in which `uniform:3:r64` takes them, as far as they are offered."""
SEARCH_STEPS = 50
"""Halvings of the bit level that `progressive` and `tiered` search for."""


@dataclass(frozen=True, slots=True)
class Optimal:
    """The proven optimum."""


@dataclass(frozen=True, slots=True)
class Uniform:
    """The same bits, rank and group size everywhere, of rotated inputs or not."""

    bits: int
    rank: int = 0
    group_size: int = 64
    rotated: bool = False


@dataclass(frozen=True, slots=True)
class Progressive:
    """Bits that change linearly with depth, `step_bits` from the first block to the last (negative: they
    fall)."""

    step_bits: float = -2.0


@dataclass(frozen=True, slots=True)
class ByRules:
    """The first of `rules` that matches each layer."""

    rules: tuple[Rule, ...]


@dataclass(frozen=True, slots=True)
class ByRecipe:
    """The ranks that a recipe gives every block, at its bits."""

    recipe: Recipe
    sensitivities: Sensitivities | None = None


Strategy = Optimal | Uniform | Progressive | ByRules | ByRecipe

GRAMMAR = {
    "optimal": "optimal",
    "uniform": "uniform:BITS[:rRANK][:gGROUP][:rotated], like uniform:3 or uniform:3:r64",
    "progressive": "progressive[:fall|:rise]",
    "policy": "policy, with a file of rules",
    **{name: f"{name}[:BITS]" for name in RECIPES},
}
"""Strategies that a text can name. The others take arguments that a text cannot hold."""


def parse_strategy(text: str, rules: tuple[Rule, ...] = ()) -> Strategy:
    """Read `optimal`, `uniform:3`, `uniform:3:r64:g128`, `progressive:rise`, `ultra:3`, or `policy` of rules.

    Raises `StrategyError` with the nearest known name and the whole list.
    """
    name, *fields = text.strip().split(":")
    if name not in GRAMMAR:
        near = get_close_matches(name, GRAMMAR, n=1, cutoff=0.0)
        raise StrategyError(
            f"strategy {text!r} is unknown; did you mean {near[0] if near else 'optimal'!r}? "
            f"Known: {'; '.join(GRAMMAR.values())}"
        )
    if name == "uniform":
        return _parse_uniform(text, fields)
    if name == "progressive" and fields in ([], ["fall"], ["rise"]):
        return Progressive(2.0 if fields == ["rise"] else -2.0)
    if name in RECIPES and (not fields or re.fullmatch("[2-8]", ":".join(fields))):
        return ByRecipe(Recipe(name, *map(int, fields)))
    if name == "policy" and not fields:
        if not rules:
            raise StrategyError("strategy 'policy' needs rules; give a file with --policy")
        return ByRules(rules)
    if name == "optimal" and not fields:
        return Optimal()
    raise _malformed(text, name)


def _parse_uniform(text: str, fields: list[str]) -> Uniform:
    match = re.fullmatch(r"([0-9]{1,2})(?::r([0-9]{1,6}))?(?::g([0-9]{1,6}))?(:rotated)?", ":".join(fields))
    if match is None:
        raise _malformed(text, "uniform")
    bits, rank, group_size, rotated = match.groups()
    if int(bits) not in (*range(2, 9), KEEP_BITS):
        raise StrategyError(
            f"strategy {text!r} asks for {bits} bits; write 2 to 8, or {KEEP_BITS} to keep the layers"
        )
    if group_size is not None and int(group_size) == 0:
        raise StrategyError(f"strategy {text!r} asks for groups of 0 weights; write a group size like g64")
    return Uniform(int(bits), int(rank or 0), int(group_size or 64), rotated is not None)


def _malformed(text: str, name: str) -> StrategyError:
    return StrategyError(f"strategy {text!r} is malformed; write {GRAMMAR[name]}")


def choose(strategy: Strategy, menu: Menu, total_bytes: int) -> Integers:
    """The choice (G,) of `strategy` when the whole checkpoint may take `total_bytes`.

    `Uniform`, `ByRules` and `ByRecipe` have the bytes they have: compare `choice_bytes` with the budget. Only
    `Optimal` buys tables, every other strategy keeps them.
    """
    if isinstance(strategy, Optimal):
        return optimal(menu, total_bytes)
    return menu.with_tables_kept(_chosen(strategy, menu.without_tables(), total_bytes))


def _chosen(strategy: Uniform | Progressive | ByRules | ByRecipe, menu: Menu, total_bytes: int) -> Integers:
    if isinstance(strategy, Uniform):
        return uniform(menu, strategy.bits, strategy.rank, strategy.group_size, strategy.rotated)
    if isinstance(strategy, Progressive):
        return progressive(menu, total_bytes, strategy.step_bits)
    if isinstance(strategy, ByRules):
        return policy(menu, strategy.rules)
    return by_recipe(menu, strategy.recipe, strategy.sensitivities)


def choice_bytes(menu: Menu, choice: Integers) -> int:
    """Bytes of the whole checkpoint, kept tensors included, under `choice` (G,)."""
    return menu.kept_bytes + sum(
        int(layer.total_bytes[k]) for layer, k in zip(menu.layers, choice, strict=True)
    )


def choice_cost(menu: Menu, choice: Integers) -> float:
    """Predicted KL in nats per token under `choice` (G,)."""
    return float(sum(layer.cost[k] for layer, k in zip(menu.layers, choice, strict=True)))


def optimal(menu: Menu, total_bytes: int) -> Integers:
    """The choice of the exact solver. Raises `InfeasibleError`."""
    return solve(menu.problem(total_bytes)).choice


def disturbed(menu: Menu, total_bytes: int, seed: int, spread: float = 1.0) -> Integers:
    """The choice of least cost once every layer's costs are multiplied by a random factor, e^(spread·N(0, 1)).

    Seeds give different plans of about the same bytes, none of them absurd: what a prediction is tried on. Raises
    `InfeasibleError`.
    """
    factor_G = np.exp(spread * np.random.default_rng(seed).standard_normal(len(menu.layers)))
    layers = [
        replace(layer, cost=layer.cost * factor) for layer, factor in zip(menu.layers, factor_G, strict=True)
    ]
    return optimal(Menu(tuple(layers), menu.kept), total_bytes)


def uniform(menu: Menu, bits: int, rank: int = 0, group_size: int = 64, rotated: bool = False) -> Integers:
    """`bits`, `rank` and `group_size` everywhere; factors of 4 bits where they are offered, else 8, else 16.

    Raises `StrategyError` naming the first layer whose menu lacks the option.
    """
    if bits == KEEP_BITS:
        candidates = [Option(KEEP_BITS, 0, 0, 0)]
    elif rank == 0:
        candidates = [Option(bits, 0, group_size, 0, rotated=rotated)]
    else:
        candidates = [
            Option(bits, rank, group_size, factor_bits, rotated=rotated) for factor_bits in FACTOR_PREFERENCE
        ]
    return _choice(_first_offered(layer, candidates) for layer in menu.layers)


def manual(menu: Menu, options: Mapping[str, Option]) -> Integers:
    """The option of the first glob that matches each layer's name.

    Raises `StrategyError` for a layer without a match, a glob without a layer, or an option that is not
    offered.
    """
    for glob in options:
        if not any(fnmatchcase(layer.name, glob) for layer in menu.layers):
            raise StrategyError(f"no layer matches {glob!r}; names look like {menu.layers[0].name!r}")
    rules = [Rule(option, glob) for glob, option in options.items()]
    return policy(menu, rules)


@dataclass(frozen=True, slots=True)
class Rule:
    """`option` for layers whose name matches `name`, whose shape is `shape` (rows, columns) if given, whose
    number of weights lies in [min_weights, max_weights], whose smaller side is at least `min_side`, and which
    lie in the first or last blocks, if either is given."""

    option: Option
    name: str = "*"
    shape: tuple[int, int] | None = None
    min_weights: int = 0
    max_weights: int | None = None
    min_side: int = 0
    first_blocks: int = 0
    last_blocks: int = 0

    def matches(self, layer: LayerMenu, menu: Menu) -> bool:
        if not fnmatchcase(layer.name, self.name) or layer.weights < self.min_weights:
            return False
        if self.shape is not None and self.shape != (layer.rows, layer.columns):
            return False
        if min(layer.rows, layer.columns) < self.min_side or not self._lies_in(layer, menu):
            return False
        return self.max_weights is None or layer.weights <= self.max_weights

    def _lies_in(self, layer: LayerMenu, menu: Menu) -> bool:
        if not self.first_blocks and not self.last_blocks:
            return True
        block, last = block_index(layer.name), max(block_index(other.name) for other in menu.layers)
        return block < self.first_blocks or block > last - self.last_blocks


def policy(menu: Menu, rules: Sequence[Rule]) -> Integers:
    """The option of the first rule that matches each layer.

    Raises `StrategyError` for a layer without one, and for an option that cannot be or was not measured.
    """

    def option_of(layer: LayerMenu) -> Option:
        option = next((rule.option for rule in rules if rule.matches(layer, menu)), None)
        if option is None:
            raise StrategyError(f"no rule covers {layer.name!r}; add one for '*' at the end")
        side = min(layer.rows // option.heads, layer.columns)
        if option.rank > side:
            raise StrategyError(
                f"rank {option.rank} of {layer.name!r} exceeds the smaller side of a {layer.rows} × {layer.columns}"
                f" matrix; use at most {side}"
            )
        return option

    return _choice(_first_offered(layer, [option_of(layer)]) for layer in menu.layers)


def by_recipe(menu: Menu, recipe: Recipe, sensitivities: Sensitivities | None = None) -> Integers:
    """The recipe's bits everywhere, at group 64, with the offered rank nearest to the one it gives the layer's block.

    Raises `StrategyError` naming the first layer that offers no rank at these bits, or where the recipe goes by
    sensitivities and there are none.
    """
    blocks = 1 + max(block_index(layer.name) for layer in menu.layers)
    ranks = recipe.ranks(hidden_size(menu), blocks, sensitivities)
    return _choice(_nearest_rank(layer, recipe, ranks[block_index(layer.name)]) for layer in menu.layers)


def hidden_size(menu: Menu) -> int:
    """The most common smaller side of its matrices."""
    sides = [min(layer.rows, layer.columns) for layer in menu.layers]
    return max(sorted(set(sides)), key=sides.count)


def _nearest_rank(layer: LayerMenu, recipe: Recipe, rank: int) -> int:
    """The option of `recipe.bits` whose rank is nearest by ratio, of equals the larger; factors of the fewest bits."""
    offered = [o for o in layer.options if o.rank and (o.bits, o.group_size) == (recipe.bits, 64)]
    if not offered:
        raise StrategyError(
            f"{layer.name!r} offers no rank at {recipe.bits} bits and group 64, which strategy {recipe.name} needs;"
            f" profile with --bits {recipe.bits} and --ranks"
        )
    best = min(offered, key=lambda o: (abs(math.log(o.rank / rank)), -o.rank, o.factor_bits))
    return layer.options.index(best)


def energy(menu: Menu, kept: Sequence[Floats], share: float) -> Integers:
    """The smallest option of each layer that keeps at least `share` of its energy.

    kept[g] float64 of the length of layer g's options: the energy share that each option keeps, in [0, 1]; 1
    − error is the common choice. Raises `StrategyError` naming the first layer whose best option keeps less.
    """
    if not 0 <= share <= 1:
        raise StrategyError(f"energy share is {share}; it lies between 0 and 1")
    choice = []
    for layer, layer_kept in zip(menu.layers, kept, strict=True):
        enough = np.asarray(layer_kept) >= share
        if not enough.any():
            raise StrategyError(
                f"{layer.name!r} keeps at most {np.max(layer_kept):.6g} of its energy, less than {share}; "
                "lower the share or offer more bits"
            )
        choice.append(int(np.argmin(np.where(enough, layer.total_bytes, np.iinfo(np.int64).max))))
    return _choice(choice)


def progressive(menu: Menu, total_bytes: int, step_bits: float = -2.0, group_size: int = 64) -> Integers:
    """Bits change linearly by `step_bits` from the first block to the last, as high as `total_bytes` allow.

    Raises `InfeasibleError` when even the fewest bits everywhere do not fit.
    """
    depth = np.array([block_index(layer.name) for layer in menu.layers], dtype=np.float64)
    return _highest_level(menu, total_bytes, step_bits * depth / max(depth.max(), 1.0), group_size)


def tiered(menu: Menu, total_bytes: int, tiers: Sequence[Sequence[str]], group_size: int = 64) -> Integers:
    """Each tier of layer globs gets one bit less than the tier before it, as high as `total_bytes` allow.

    A layer belongs to the first tier that matches; layers that no tier names form the last one.
    Raises `InfeasibleError` when even the fewest bits everywhere do not fit.
    """

    def tier_of(layer: LayerMenu) -> int:
        for index, globs in enumerate(tiers):
            if any(fnmatchcase(layer.name, glob) for glob in globs):
                return index
        return len(tiers)

    offset = -np.array([tier_of(layer) for layer in menu.layers], dtype=np.float64)
    return _highest_level(menu, total_bytes, offset, group_size)


def block_index(name: str) -> int:
    """The first whole number between the dots of a layer's name; 0 where there is none."""
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)


def uniform_points(menu: Menu, group_size: int = 64) -> list[tuple[int, float]]:
    """(checkpoint bytes, predicted KL) of every uniform bit width without rank that all layers offer."""
    offered = [
        {o.bits for o in layer.options if o.rank == 0 and o.group_size == group_size} for layer in menu.layers
    ]
    choices = [uniform(menu, bits, 0, group_size) for bits in sorted(set.intersection(*offered))]
    return [(choice_bytes(menu, choice), choice_cost(menu, choice)) for choice in choices]


def interpolated_uniform_cost(points: Sequence[tuple[int, float]], total_bytes: int) -> float:
    """The cost that uniform compression would have at `total_bytes`: log cost is linear in bytes between
    points.

    `points` are (bytes, cost) of uniform plans, costs positive. Raises `StrategyError` outside their range.
    """
    ordered = sorted(points)
    sizes = np.array([size for size, _ in ordered], dtype=np.float64)
    costs = np.array([cost for _, cost in ordered], dtype=np.float64)
    if not len(ordered) or (costs <= 0).any():
        raise StrategyError("interpolation needs at least one uniform point, each with a positive cost")
    if not sizes[0] <= total_bytes <= sizes[-1]:
        raise StrategyError(
            f"{total_bytes} bytes lie outside the uniform points, {int(sizes[0])} to {int(sizes[-1])} bytes"
        )
    return float(np.exp(np.interp(total_bytes, sizes, np.log(costs))))


def _choice(indices: Iterable[int]) -> Integers:
    return np.fromiter(indices, dtype=np.int64)


def _first_offered(layer: LayerMenu, candidates: Sequence[Option]) -> int:
    for option in candidates:
        if option in layer.options:
            return layer.options.index(option)
    wanted = candidates[0]
    rank = f", rank {wanted.rank} with {wanted.factor_bits}-bit factors" if wanted.rank else ""
    rotated = ", rotated" if wanted.rotated else ""
    offered = ", ".join(sorted({_spelled(option) for option in layer.options})[:12])
    raise StrategyError(
        f"{layer.name!r} does not offer {wanted.bits} bits, group {wanted.group_size}{rank}{rotated}; "
        f"it offers {offered}; profile it with that option or choose another"
    )


def _spelled(option: Option) -> str:
    factors = f"/{option.factor_bits}" if option.rank else ""
    if option.heads > 1:
        factors += f" in each of {option.heads} heads"
    rotated = " rotated" if option.rotated else ""
    return f"{option.bits} bits g{option.group_size} r{option.rank}{factors}{rotated}"


def _highest_level(menu: Menu, total_bytes: int, offset: Floats, group_size: int) -> Integers:
    """The highest level at which options of bits nearest to level + offset (G,) fit, by bisection."""
    plain = [_plain_options(layer, group_size) for layer in menu.layers]

    def at(level: float) -> Integers:
        return _choice(
            index[int(np.argmin(np.abs(bits - (level + shift))))]
            for (bits, index), shift in zip(plain, offset, strict=True)
        )

    low, high = -float(np.abs(offset).max()) - 1, KEEP_BITS + float(np.abs(offset).max()) + 1
    smallest = choice_bytes(menu, at(low))
    if smallest > total_bytes:
        raise InfeasibleError(
            f"the fewest bits everywhere take {smallest} bytes, {smallest - total_bytes} more than the "
            "budget; raise it or offer fewer bits",
            smallest,
        )
    if choice_bytes(menu, at(high)) <= total_bytes:
        return at(high)
    for _ in range(SEARCH_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if choice_bytes(menu, at(middle)) <= total_bytes else (low, middle)
    return at(low)


def _plain_options(layer: LayerMenu, group_size: int) -> tuple[Floats, list[int]]:
    """Bits and indices of the options without rank or rotation, in ascending bits."""
    plain = sorted(
        (option.bits, index)
        for index, option in enumerate(layer.options)
        if not option.rank
        and not option.rotated
        and (option.bits == KEEP_BITS or option.group_size == group_size)
    )
    if not plain:
        raise StrategyError(f"{layer.name!r} offers no option without rank at group {group_size}")
    return np.array([bits for bits, _ in plain], dtype=np.float64), [index for _, index in plain]
