"""What a plan must respect besides its budget.

What lives here: `Constraints`, the rules that forbid options, the tie groups, and the errors that say which
of them leaves nothing and how far. The knapsack under constraints is `reduction.py`, solving with them
`allocation.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from fnmatch import translate
from typing import Literal

import numpy as np

from allocator.constraints.ties import Mask
from allocator.errors import (
    ConstraintError,
    ContradictoryPinsError,
    ExhaustedMenuError,
    InfeasibleError,
    UnmatchedPatternError,
)
from allocator.problem import Integers, LayerMenu, Menu
from allocator.storage import Option

FUSED = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Last parts of the names of layers that runtimes fuse and that share bits when `auto_ties` is set."""

GROUP_RADIX = 2**20
"""Above every group size, so that bits and group size fit one number."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """Options with these values; None is any value."""

    bits: int | None = None
    rank: int | None = None
    group_size: int | None = None
    factor_bits: int | None = None
    heads: int | None = None
    rotated: bool | None = None

    def matches(self, options: tuple[Option, ...]) -> Mask:
        wanted = [(field.name, getattr(self, field.name)) for field in fields(self)]
        wanted = [(name, value) for name, value in wanted if value is not None]
        return np.array(
            [all(getattr(o, name) == value for name, value in wanted) for o in options], dtype=np.bool_
        )

    def __str__(self) -> str:
        given = ((field.name, getattr(self, field.name)) for field in fields(self))
        return " ".join(f"{name}={value}" for name, value in given if value is not None) or "any option"


@dataclass(frozen=True, slots=True)
class Pin:
    """Layers that match `glob` take an option that matches `pattern`."""

    glob: str
    pattern: Pattern

    def allows(self, layer: LayerMenu) -> Mask:
        return self.pattern.matches(layer.options)

    def shortfall(self, layer: LayerMenu, allowed: Mask) -> str:
        return f"the {allowed.sum()} options left have {_bits_text(layer, allowed)}"

    def __str__(self) -> str:
        return f"pin {self.glob!r} to {self.pattern}"


@dataclass(frozen=True, slots=True)
class Ban:
    """Layers that match `glob` take no option that matches `pattern`."""

    glob: str
    pattern: Pattern

    def allows(self, layer: LayerMenu) -> Mask:
        return ~self.pattern.matches(layer.options)

    def shortfall(self, layer: LayerMenu, allowed: Mask) -> str:
        return f"it forbids each of the {allowed.sum()} options left"

    def __str__(self) -> str:
        return f"ban of {self.pattern} on {self.glob!r}"


@dataclass(frozen=True, slots=True)
class BitsRange:
    """Layers that match `glob` have at least `min_bits` and at most `max_bits`."""

    min_bits: int = 0
    max_bits: int = 16
    glob: str = "*"

    def allows(self, layer: LayerMenu) -> Mask:
        bits = option_bits(layer.options)
        return (bits >= self.min_bits) & (bits <= self.max_bits)

    def shortfall(self, layer: LayerMenu, allowed: Mask) -> str:
        bits = option_bits(layer.options)[allowed]
        distance = np.maximum(self.min_bits - bits, bits - self.max_bits).min()
        return f"the options left have {_bits_text(layer, allowed)}, {distance} off"

    def __str__(self) -> str:
        return f"{self.min_bits} to {self.max_bits} bits on {self.glob!r}"


@dataclass(frozen=True, slots=True)
class QualityFloor:
    """Layers that match `glob` have a relative squared error of at most `max_error` and a predicted KL of at
    most `max_cost` nats per token each."""

    glob: str = "*"
    max_error: float = float("inf")
    max_cost: float = float("inf")

    def allows(self, layer: LayerMenu) -> Mask:
        return np.asarray((layer.error <= self.max_error) & (layer.cost <= self.max_cost))

    def shortfall(self, layer: LayerMenu, allowed: Mask) -> str:
        least_error, least_cost = layer.error[allowed].min(), layer.cost[allowed].min()
        off = [
            f"the least {name} left is {least:.6g}, {least - limit:.3g} above"
            for name, least, limit in (
                ("error", least_error, self.max_error),
                ("cost", least_cost, self.max_cost),
            )
            if least > limit
        ]
        return " and ".join(off) or "no option meets both limits at once"

    def __str__(self) -> str:
        limits = {"error": self.max_error, "cost": self.max_cost}
        told = " and ".join(f"{name} ≤ {limit:g}" for name, limit in limits.items() if np.isfinite(limit))
        return f"floor {told or 'without a limit'} on {self.glob!r}"


Rule = Pin | Ban | BitsRange | QualityFloor


@dataclass(frozen=True, slots=True)
class Device:
    """One pipeline stage: the layers that match one of `globs` live on `shards` devices that split each of
    them evenly (tensor parallel), each with `budget_bytes` for them."""

    name: str
    globs: tuple[str, ...]
    budget_bytes: int
    shards: int = 1


@dataclass(frozen=True, slots=True)
class Constraints:
    """Everything a plan must respect besides its budget.

    ties: each a tuple of globs; the layers that match any of them share bits. auto_ties: layers of one parent
    named as in `FUSED` share bits. Ties that overlap are one tie. tie_group_sizes: tied layers share the group size
    too. monotone: bits never rise (`falling`) or never fall (`rising`) from block to block among layers whose names
    differ in the block number alone.
    """

    ties: tuple[tuple[str, ...], ...] = ()
    auto_ties: bool = False
    tie_group_sizes: bool = False
    pins: tuple[Pin, ...] = ()
    bans: tuple[Ban, ...] = ()
    bits: tuple[BitsRange, ...] = ()
    floors: tuple[QualityFloor, ...] = ()
    monotone: Literal["falling", "rising"] | None = None
    devices: tuple[Device, ...] = ()

    @property
    def rules(self) -> tuple[Rule, ...]:
        return (*self.pins, *self.bans, *self.bits, *self.floors)


def infeasible(
    menu: Menu, constraints: Constraints, total_bytes: int, smallest_bytes: int
) -> InfeasibleError:
    """The error that says how far `total_bytes` is below `smallest_bytes` and which constraint costs most."""
    return InfeasibleError(
        f"under these constraints the smallest checkpoint takes {smallest_bytes} bytes, "
        f"{smallest_bytes - total_bytes} more than the budget; {relief(menu, constraints, smallest_bytes)}",
        smallest_bytes,
    )


def relief(menu: Menu, constraints: Constraints, smallest_bytes: int) -> str:
    """What to do about a budget below `smallest_bytes`: the rule whose loss saves most, or a larger budget."""
    freed = []
    for rule in constraints.rules:
        relaxed = _without(constraints, rule)
        freed.append((smallest_bytes - smallest_constrained_bytes(menu, relaxed), str(rule)))
    saved, rule_text = max(freed, default=(0, ""))
    return f"without the {rule_text} it would take {saved} less" if saved > 0 else "raise the budget"


def smallest_constrained_bytes(menu: Menu, constraints: Constraints) -> int:
    """Bytes of the smallest checkpoint in which all rules and ties hold; monotone bits and devices aside."""
    allowed = allowed_options(menu, constraints.rules)
    total = menu.kept_bytes
    for group in tie_groups(menu, constraints):
        least = [_least_by_tie(menu.layers[index], allowed.get(index), constraints) for index in group]
        shared = set.intersection(*(set(by_tie) for by_tie in least))
        total += min((sum(by_tie[tie] for by_tie in least) for tie in shared), default=0)
    return total


def _least_by_tie(layer: LayerMenu, allowed: Mask | None, constraints: Constraints) -> dict[int, int]:
    tie, size = tied_values(layer.options, constraints), layer.total_bytes
    if allowed is not None:
        tie, size = tie[allowed], size[allowed]
    order = np.lexsort((size, tie))
    present, first = np.unique(tie[order], return_index=True)
    return dict(zip(present.tolist(), size[order][first].tolist(), strict=True))


def allowed_options(menu: Menu, rules: Iterable[Rule]) -> dict[int, Mask]:
    """Which options of each layer the rules leave; layers without a rule are absent."""
    allowed: dict[int, Mask] = {}
    applied: dict[int, list[Rule]] = {}
    for rule in rules:
        for index in matching_layers(menu, rule.glob):
            layer = menu.layers[index]
            before = allowed.get(index, np.ones(len(layer.options), dtype=np.bool_))
            after = before & rule.allows(layer)
            if not after.any():
                raise _exhausted(layer, rule, applied.get(index, []), before)
            allowed[index] = after
            applied.setdefault(index, []).append(rule)
    return {index: mask for index, mask in allowed.items() if not mask.all()}


def _exhausted(layer: LayerMenu, rule: Rule, applied: list[Rule], allowed: Mask) -> ConstraintError:
    pins = [earlier for earlier in applied if isinstance(earlier, Pin)]
    if pins:
        return ContradictoryPinsError(
            f"{layer.name!r}: the {pins[0]} contradicts the {rule}: {rule.shortfall(layer, allowed)}; "
            "drop one of them"
        )
    after = f" after the {applied[-1]}" if applied else ""
    return ExhaustedMenuError(
        f"{layer.name!r}: the {rule} leaves no option{after}: {rule.shortfall(layer, allowed)}; "
        "loosen it or profile the layer with more options"
    )


def matching_layers(menu: Menu, glob: str) -> list[int]:
    """Indices of the layers whose name matches `glob`. Raises `UnmatchedPatternError` where there is none."""
    if glob == "*":
        return list(range(len(menu.layers)))
    matches = re.compile(translate(glob)).match
    found = [index for index, layer in enumerate(menu.layers) if matches(layer.name)]
    if not found:
        raise UnmatchedPatternError(f"no layer matches {glob!r}; names look like {menu.layers[0].name!r}")
    return found


def tie_groups(menu: Menu, constraints: Constraints) -> list[list[int]]:
    """Every layer once, with the layers that must share its bits; groups and members in menu order."""
    owner = list(range(len(menu.layers)))

    def root(index: int) -> int:
        while owner[index] != index:
            owner[index] = owner[owner[index]]
            index = owner[index]
        return index

    for members in _fused_layers(menu) if constraints.auto_ties else ():
        for index in members[1:]:
            owner[index] = members[0]
    for globs in constraints.ties:
        members = [index for glob in globs for index in matching_layers(menu, glob)]
        for index in members:
            low, high = sorted((root(members[0]), root(index)))
            owner[high] = low
    groups: dict[int, list[int]] = {}
    for index in range(len(owner)):
        groups.setdefault(root(index), []).append(index)
    return list(groups.values())


def _fused_layers(menu: Menu) -> list[list[int]]:
    kind_of = {part: kind for kind, parts in enumerate(FUSED) for part in parts}
    fused: dict[tuple[str, int], list[int]] = {}
    for index, layer in enumerate(menu.layers):
        parent, _, part = layer.name.rpartition(".")
        kind = kind_of.get(part)
        if kind is not None:
            fused.setdefault((parent, kind), []).append(index)
    return list(fused.values())


def option_bits(options: tuple[Option, ...]) -> Integers:
    """Bits of every option, (K,) int64."""
    return np.array([option.bits for option in options], dtype=np.int64)


def tied_values(options: tuple[Option, ...], constraints: Constraints) -> Integers:
    """What tied layers share, as one number of every option, (K,) int64: bits, or bits and group size."""
    bits = option_bits(options)
    if not constraints.tie_group_sizes:
        return bits
    return bits * GROUP_RADIX + np.array([option.group_size for option in options], dtype=np.int64)


def tied_bits(values: Integers, constraints: Constraints) -> Integers:
    """The bits in what `tied_values` returns."""
    return values // GROUP_RADIX if constraints.tie_group_sizes else values


def _without(constraints: Constraints, rule: Rule) -> Constraints:
    return replace(
        constraints,
        pins=tuple(r for r in constraints.pins if r is not rule),
        bans=tuple(r for r in constraints.bans if r is not rule),
        bits=tuple(r for r in constraints.bits if r is not rule),
        floors=tuple(r for r in constraints.floors if r is not rule),
    )


def _bits_text(layer: LayerMenu, allowed: Mask) -> str:
    return f"bits {sorted(set(option_bits(layer.options)[allowed].tolist()))}"
