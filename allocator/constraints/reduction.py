"""The knapsack that is left when constraints are respected, and the way back to one option per layer.

What lives here: `ConstrainedProblem`, and `constrain`, which makes it from a menu: forbidden options gone,
tie groups merged. The constraints and their rules are `rules.py`, the merging is `ties.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from allocator.constraints.rules import (
    Constraints,
    allowed_options,
    option_bits,
    tie_groups,
    tied_bits,
    tied_values,
)
from allocator.constraints.ties import Mask, Member, TiedOptions, groups_per_chunk, tie
from allocator.errors import ContradictoryPinsError, InvalidProblemError
from allocator.problem import Floats, Integers, Menu, Problem, Solution
from allocator.storage import Option


@dataclass(frozen=True, slots=True)
class Batch:
    """Tie groups of one shape: `layers` (M, B) int64 indices into the menu, and their merged options."""

    layers: Integers
    options: TiedOptions


@dataclass(frozen=True, slots=True)
class ConstrainedProblem:
    """The knapsack over tie groups and the way back to layers.

    `bits` (N,) int64 of every option of `problem`; groups are those of the batches, one batch after the
    other.
    """

    problem: Problem
    bits: Integers
    batches: tuple[Batch, ...]
    layer_count: int

    def choice_of(self, solution: Solution) -> Integers:
        """The option of every layer of the menu, (G,) int64, that a solution of `problem` stands for."""
        choice = np.empty(self.layer_count, dtype=np.int64)
        first = 0
        for batch in self.batches:
            groups = batch.layers.shape[1]
            choice[batch.layers] = batch.options.member_choice(solution.choice[first : first + groups])
            first += groups
        return choice

    def group_of_layer(self) -> Integers:
        """The group of `problem` that every layer belongs to, (G,) int64."""
        group = np.empty(self.layer_count, dtype=np.int64)
        first = 0
        for batch in self.batches:
            group[batch.layers] = np.arange(first, first + batch.layers.shape[1])
            first += batch.layers.shape[1]
        return group


def constrain(menu: Menu, constraints: Constraints, total_bytes: int) -> ConstrainedProblem:
    """The knapsack in which the whole checkpoint may take `total_bytes` and all rules and ties hold.

    Devices and monotone bits are not part of a knapsack; with monotone bits, options are kept that only they
    can need. Raises a `ConstraintError` naming the constraint, the layer and how far the nearest option is,
    or `ProblemTooLargeError`.
    """
    allowed = allowed_options(menu, constraints.rules)
    if not allowed and not constraints.ties and not constraints.auto_ties and constraints.monotone is None:
        return _untied(menu, total_bytes)
    alike = _alike(menu, constraints, allowed)
    batches = [batch for same in alike for batch in same.merged(by_bits=constraints.monotone is not None)]
    options = [batch.options for batch in batches]
    count = np.concatenate([option.count for option in options])
    problem = Problem(
        cost=np.concatenate([option.cost for option in options]),
        size=np.concatenate([option.size for option in options]),
        start=np.append(0, np.cumsum(count)).astype(np.int64),
        budget_bytes=total_bytes - menu.kept_bytes,
    )
    bits = tied_bits(np.concatenate([option.bits for option in options]), constraints)
    return ConstrainedProblem(problem, bits, tuple(batches), len(menu.layers))


def _untied(menu: Menu, total_bytes: int) -> ConstrainedProblem:
    """The menu as it is: no copy beyond the one that `Menu.problem` makes."""
    problem = menu.problem(total_bytes)
    count = np.diff(problem.start)
    column = np.arange(len(problem.cost)) - np.repeat(problem.start[:-1], count)
    bits_of = {key: option_bits(options) for key, options in _distinct_options(menu).items()}
    bits = np.concatenate([bits_of[id(layer.options)] for layer in menu.layers])
    options = TiedOptions((), (), problem.cost, problem.size, bits, column, count)
    layers = np.arange(len(menu.layers))[None, :]
    return ConstrainedProblem(problem, bits, (Batch(layers, options),), len(menu.layers))


@dataclass(frozen=True, slots=True)
class Alike:
    """Tie groups of one shape before they are merged: layers (M, B) int64 and a `Member` for each of the M
    rows."""

    layers: Integers
    members: tuple[Member, ...]

    def merged(self, by_bits: bool) -> Iterator[Batch]:
        """The merged batches, few enough groups at a time."""
        step = groups_per_chunk(tuple(member.bits for member in self.members))
        for first in range(0, self.layers.shape[1], step):
            chunk = slice(first, first + step)
            members = tuple(Member(m.bits, m.size, m.cost[:, chunk]) for m in self.members)
            yield Batch(self.layers[:, chunk], tie(members, by_bits))


def _alike(menu: Menu, constraints: Constraints, allowed: dict[int, Mask]) -> list[Alike]:
    """Tie groups whose members offer equal bits and bytes, together. Raises `ContradictoryPinsError`."""
    bits_of = {key: tied_values(options, constraints) for key, options in _distinct_options(menu).items()}
    offer_of: dict[bytes, int] = {}
    offers = {key: offer_of.setdefault(bits.tobytes(), len(offer_of)) for key, bits in bits_of.items()}
    shape_of: dict[tuple[int, bytes], int] = {}
    shapes = []
    for layer in menu.layers:
        key = offers[id(layer.options)], layer.total_bytes.tobytes()
        shapes.append(shape_of.setdefault(key, len(shape_of)))
    by_shape: dict[tuple[int, ...], list[list[int]]] = {}
    for group in tie_groups(menu, constraints):
        by_shape.setdefault(tuple([shapes[index] for index in group]), []).append(group)
    found = []
    for same in by_shape.values():
        layers = np.array(same, dtype=np.int64).T
        first = [menu.layers[row[0]] for row in layers]
        members = tuple(
            Member(bits_of[id(layer.options)], layer.total_bytes, _costs(menu, row, allowed))
            for layer, row in zip(first, layers, strict=True)
        )
        _check_shared_bits(menu, layers, members, constraints)
        found.append(Alike(layers, members))
    return found


def _distinct_options(menu: Menu) -> dict[int, tuple[Option, ...]]:
    """Every distinct tuple of options by its id: layers mostly share a few tuples."""
    return {id(layer.options): layer.options for layer in menu.layers}


def _check_shared_bits(
    menu: Menu, layers: Integers, members: tuple[Member, ...], constraints: Constraints
) -> None:
    offered = np.array(
        [
            np.all([np.isfinite(member.cost[member.bits == bits]).any(axis=0) for member in members], axis=0)
            for bits in np.unique(members[0].bits)
        ]
    )
    without = np.flatnonzero(~offered.any(axis=0))
    if not len(without):
        return
    offers = "; ".join(
        f"{menu.layers[index].name!r} may have bits {sorted(set(tied_bits(member.bits[usable], constraints).tolist()))}"
        for index, member in zip(layers[:, without[0]], members, strict=True)
        for usable in (np.isfinite(member.cost[:, without[0]]),)
    )
    shared = "bits with one group size" if constraints.tie_group_sizes else "bits"
    raise ContradictoryPinsError(f"tied layers share no {shared}: {offers}; loosen their pins or untie them")


def _costs(menu: Menu, layers: Integers, allowed: dict[int, Mask]) -> Floats:
    """Costs (K, B) of equal-shaped layers, infinite where an option is not allowed."""
    first = menu.layers[layers[0]]
    if not np.issubdtype(first.total_bytes.dtype, np.integer) or (first.total_bytes < 0).any():
        raise InvalidProblemError(
            f"{first.name!r} has sizes that are not whole, non-negative bytes; fix its menu"
        )
    cost = np.array([menu.layers[index].cost for index in layers], dtype=np.float64)
    if not np.isfinite(cost).all():
        bad = menu.layers[layers[np.flatnonzero(~np.isfinite(cost).all(axis=1))[0]]]
        raise InvalidProblemError(
            f"{bad.name!r} has a cost that is not finite; profile it again or drop the option"
        )
    for row, index in enumerate(layers.tolist()):
        if index in allowed:
            cost[row, ~allowed[index]] = np.inf
    return np.ascontiguousarray(cost.T)
