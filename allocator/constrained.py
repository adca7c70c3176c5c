"""The knapsack that is left when constraints are respected, and the way back to one option per layer.

What lives here: `ConstrainedProblem`, and `constrain` and `constrain_near`, which make it from a menu:
forbidden options gone, tie groups merged. The constraints and their rules are `constraints.py`, the merging
is `ties.py`, the reduced-cost fixing is `shortlist.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from allocator.constraints import Constraints, allowed_options, option_bits, tie_groups
from allocator.errors import ContradictoryPinsError
from allocator.problem import Floats, Integers, Menu, Problem, Solution
from allocator.shortlist import shortlist
from allocator.ties import Mask, Member, Settled, TiedOptions, groups_per_chunk, tie


@dataclass(frozen=True, slots=True)
class Batch:
    """Tie groups of one shape: `layers` (M, B) int64 indices into the menu, and their merged options."""

    layers: Integers
    options: TiedOptions | Settled


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
    alike = _alike(menu, tie_groups(menu, constraints), allowed)
    batches = [batch for same in alike for batch in same.merged(by_bits=constraints.monotone is not None)]
    return _assembled(menu, batches, total_bytes)


def constrain_near(menu: Menu, constraints: Constraints, total_bytes: int) -> ConstrainedProblem:
    """`constrain` without the options that no optimum at exactly `total_bytes` can take (`shortlist.py`).

    Much smaller and of equal optimum, but good for this one budget, and neither for devices nor for monotone
    bits.
    """
    allowed = allowed_options(menu, constraints.rules)
    if not allowed and not constraints.ties and not constraints.auto_ties:
        return _untied(menu, total_bytes)
    alike = _alike(menu, tie_groups(menu, constraints), allowed)
    return _assembled(menu, _shortlisted(alike, total_bytes - menu.kept_bytes), total_bytes)


def _assembled(menu: Menu, batches: list[Batch], total_bytes: int) -> ConstrainedProblem:
    options = [batch.options for batch in batches]
    count = np.concatenate([option.count for option in options])
    problem = Problem(
        cost=np.concatenate([option.cost for option in options]),
        size=np.concatenate([option.size for option in options]),
        start=np.append(0, np.cumsum(count)).astype(np.int64),
        budget_bytes=total_bytes - menu.kept_bytes,
    )
    bits = np.concatenate([option.bits for option in options])
    return ConstrainedProblem(problem, bits, tuple(batches), len(menu.layers))


def _untied(menu: Menu, total_bytes: int) -> ConstrainedProblem:
    """The menu as it is: no copy beyond the one that `Menu.problem` makes."""
    problem = menu.problem(total_bytes)
    count = np.diff(problem.start)
    column = np.arange(len(problem.cost)) - np.repeat(problem.start[:-1], count)
    bits = np.concatenate([option_bits(layer.options) for layer in menu.layers])
    options = TiedOptions((), (), problem.cost, problem.size, bits, column, count)
    layers = np.arange(len(menu.layers))[None, :]
    return ConstrainedProblem(problem, bits, (Batch(layers, options),), len(menu.layers))


@dataclass(frozen=True, slots=True)
class Alike:
    """Tie groups of one shape before they are merged: layers (M, B) int64 and a `Member` for each of the M
    rows."""

    layers: Integers
    members: tuple[Member, ...]

    def take(self, groups: Integers, cost: Sequence[Floats]) -> Alike:
        members = (Member(m.bits, m.size, c) for m, c in zip(self.members, cost, strict=True))
        return Alike(self.layers[:, groups], tuple(members))

    def merged(self, by_bits: bool = False) -> Iterator[Batch]:
        """The merged batches, few enough groups at a time."""
        step = groups_per_chunk(tuple(member.bits for member in self.members))
        for first in range(0, self.layers.shape[1], step):
            chunk = np.arange(first, min(first + step, self.layers.shape[1]))
            part = self.take(chunk, [member.cost[:, first : first + step] for member in self.members])
            yield Batch(part.layers, tie(part.members, by_bits))

    def settled(self, options: Integers) -> Batch:
        """The batch in which every member keeps one option, (M, B)."""
        group = np.arange(self.layers.shape[1])
        pairs = list(zip(self.members, options, strict=True))
        cost = np.sum([member.cost[option, group] for member, option in pairs], axis=0)
        size = np.sum([member.size[option] for member, option in pairs], axis=0)
        return Batch(self.layers, Settled(options, cost, size, self.members[0].bits[options[0]]))


def _alike(menu: Menu, groups: list[list[int]], allowed: dict[int, Mask]) -> list[Alike]:
    """Tie groups whose members offer equal bits and bytes, together. Raises `ContradictoryPinsError`."""
    bits_of: dict[int, tuple[int, Integers]] = {}
    distinct: dict[bytes, int] = {}
    shape_of: dict[tuple[int, bytes], int] = {}
    shapes = []
    for layer in menu.layers:
        if id(layer.options) not in bits_of:
            bits = option_bits(layer.options)
            bits_of[id(layer.options)] = distinct.setdefault(bits.tobytes(), len(distinct)), bits
        key = bits_of[id(layer.options)][0], layer.total_bytes.tobytes()
        shapes.append(shape_of.setdefault(key, len(shape_of)))
    by_shape: dict[tuple[int, ...], list[list[int]]] = {}
    for group in groups:
        by_shape.setdefault(tuple([shapes[index] for index in group]), []).append(group)
    found = []
    for same in by_shape.values():
        layers = np.array(same, dtype=np.int64).T
        first = [menu.layers[row[0]] for row in layers]
        members = tuple(
            Member(bits_of[id(layer.options)][1], layer.total_bytes, _costs(menu, row, allowed))
            for layer, row in zip(first, layers, strict=True)
        )
        _check_shared_bits(menu, layers, members)
        found.append(Alike(layers, members))
    return found


def _check_shared_bits(menu: Menu, layers: Integers, members: tuple[Member, ...]) -> None:
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
        f"{menu.layers[index].name!r} may have bits {sorted(set(member.bits[usable].tolist()))}"
        for index, member in zip(layers[:, without[0]], members, strict=True)
        for usable in (np.isfinite(member.cost[:, without[0]]),)
    )
    raise ContradictoryPinsError(f"tied layers share no bits: {offers}; loosen their pins or untie them")


def _shortlisted(alike: Sequence[Alike], budget_bytes: int) -> list[Batch]:
    """The batches with only the options that a better choice may take; whole where nothing fits the
    budget."""
    kept = shortlist([same.members for same in alike], budget_bytes)
    if kept is None:
        return [batch for same in alike for batch in same.merged()]
    batches: list[Batch] = []
    for same, masks in zip(alike, kept, strict=True):
        open_groups = np.any([mask.sum(axis=0) > 1 for mask in masks], axis=0)
        settled, unsettled = np.flatnonzero(~open_groups), np.flatnonzero(open_groups)
        if len(settled):
            options = np.array([mask[:, settled].argmax(axis=0) for mask in masks])
            costs = [member.cost[:, settled] for member in same.members]
            batches.append(same.take(settled, costs).settled(options))
        if len(unsettled):
            costs = [
                np.where(mask[:, unsettled], member.cost[:, unsettled], np.inf)
                for member, mask in zip(same.members, masks, strict=True)
            ]
            batches.extend(same.take(unsettled, costs).merged())
    return batches


def _costs(menu: Menu, layers: Integers, allowed: dict[int, Mask]) -> Floats:
    """Costs (K, B) of equal-shaped layers, infinite where an option is not allowed."""
    cost = np.array([menu.layers[index].cost for index in layers], dtype=np.float64)
    for row, index in enumerate(layers.tolist()):
        if index in allowed:
            cost[row, ~allowed[index]] = np.inf
    return np.ascontiguousarray(cost.T)
