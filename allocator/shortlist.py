"""Which options of tied layers can still be part of an optimum: reduced-cost fixing before any product is
formed.

What lives here: `shortlist`. For a multiplier λ the best options of a tie group separate into its members
once its bits are fixed, so the Lagrangian bound of the whole model needs no product of menus: at every bits
value the minima of cost + λ·bytes are summed over the members, and the best sum is taken. A feasible choice
at the best λ, improved by one swap, leaves a small gap; an option whose group can only be worse than its best
by more than that gap can't be in a better choice (Dantzig 1957 for the bound; Kellerer, Pferschy & Pisinger,
ch. 11 for the fixing). The few groups left with more than one option go to `ties.py`.

Shapes as in `ties.py`: a batch is B tie groups of one shape with M members; cost (K, B) a member; L shared
bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from allocator.problem import Floats, Integers
from allocator.ties import Mask, Member

SAMPLE_STEP = 16
"""One in so many tie groups guesses the multiplier."""
TANGENT_LIMIT = 60
ROUNDING = 1e-12
"""Share of the summed terms by which an option may exceed the gap and still be kept."""


@dataclass(frozen=True, slots=True)
class Pick:
    """A minimiser at one multiplier: its cost, bytes, and per batch the options taken, (M, B) int64."""

    cost: float
    total_bytes: int
    options: tuple[Integers, ...]


def shared_bits(members: Sequence[Member]) -> list[int]:
    """The bits that every member offers, ascending."""
    return sorted(set.intersection(*(set(member.bits.tolist()) for member in members)))


def shortlist(batches: Sequence[Sequence[Member]], budget_bytes: int) -> list[list[Mask]] | None:
    """For every batch and member the options (K, B) that a better choice than the incumbent may take, the
    incumbent's included. None where nothing fits `budget_bytes`. Every group must have finite costs at some
    shared bits."""
    price, base = _best_price(batches, budget_bytes)
    if base is None:
        return None
    best = [[_best_by_bits(m, shared_bits(members), price)[0] for m in members] for members in batches]
    least = sum(float(np.sum(values, axis=0).min(axis=0).sum()) for values in best)
    gap = max(0.0, base.cost + price * budget_bytes - least)
    swap = _best_swap(batches, base, budget_bytes - base.total_bytes)
    if swap is not None:
        gap = max(0.0, gap + swap.cost_added)
    margin = gap + ROUNDING * (abs(base.cost) + price * budget_bytes)
    kept = [
        _within(members, values, options, price, margin)
        for members, values, options in zip(batches, best, base.options, strict=True)
    ]
    if swap is not None:
        kept[swap.batch][swap.member][swap.option, swap.group] = True
    return kept


def _best_price(batches: Sequence[Sequence[Member]], budget_bytes: int) -> tuple[float, Pick | None]:
    """The multiplier at which minimisers pass from over the budget to within it, and the one within.

    A sample of groups gives the first guesses; tangents of the concave dual intersect from there.
    """
    least = _least_bytes(batches)
    if least > budget_bytes:
        return 0.0, None
    over: Pick | None = None
    within: Pick | None = None
    for price in _guesses(batches, budget_bytes, least):
        trial = _minimise(batches, price)
        if trial.total_bytes > budget_bytes:
            over = trial
        else:
            within = trial
            if price == 0:
                return 0.0, within
        if over is not None and within is not None:
            return _intersect(batches, budget_bytes, over, within)
    return 0.0, None


def _intersect(
    batches: Sequence[Sequence[Member]], budget_bytes: int, over: Pick, within: Pick
) -> tuple[float, Pick]:
    """The best price between two minimisers, and the minimiser there that fits.

    Groups whose minimiser is the same at both ends keep it in between and are not read again.
    """
    base = tuple(options.copy() for options in within.options)
    groups = [np.arange(options.shape[1]) for options in base]
    spent, cost = within.total_bytes, within.cost
    price = 0.0
    for _ in range(TANGENT_LIMIT):
        moved = [
            np.flatnonzero((o != w).any(axis=0)) for o, w in zip(over.options, within.options, strict=True)
        ]
        batches = [_at(members, index) for members, index in zip(batches, moved, strict=True)]
        groups = [group[index] for group, index in zip(groups, moved, strict=True)]
        over, within = _part(batches, over, moved), _part(batches, within, moved)
        price = max(0.0, (within.cost - over.cost) / (over.total_bytes - within.total_bytes))
        middle = _minimise(batches, price)
        if not within.total_bytes < middle.total_bytes < over.total_bytes:
            break
        if spent - within.total_bytes + middle.total_bytes > budget_bytes:
            over = middle
            continue
        spent, cost = spent - within.total_bytes + middle.total_bytes, cost - within.cost + middle.cost
        for options, group, chosen in zip(base, groups, middle.options, strict=True):
            options[:, group] = chosen
        within = middle
    return price, Pick(cost, spent, base)


def _at(members: Sequence[Member], groups: Integers) -> list[Member]:
    """The members of some of the tie groups."""
    if len(groups) == members[0].cost.shape[1]:
        return list(members)
    return [Member(member.bits, member.size, member.cost[:, groups]) for member in members]


def _part(batches: Sequence[Sequence[Member]], pick: Pick, groups: Sequence[Integers]) -> Pick:
    """What `pick` takes in the groups that `batches` holds, `groups` of those it was made for."""
    options = tuple(options[:, index] for options, index in zip(pick.options, groups, strict=True))
    return _priced(batches, options)


def _priced(batches: Sequence[Sequence[Member]], taken: tuple[Integers, ...]) -> Pick:
    cost, total_bytes = 0.0, 0
    for members, options in zip(batches, taken, strict=True):
        group = np.arange(options.shape[1])
        for member, option in zip(members, options, strict=True):
            cost += float(member.cost[option, group].sum())
            total_bytes += int(member.size[option].sum())
    return Pick(cost, total_bytes, taken)


def _least_bytes(batches: Sequence[Sequence[Member]]) -> int:
    """The bytes of the smallest options everywhere that share bits and have finite costs."""
    total = 0
    for members in batches:
        by_bits = [
            np.sum([_least_size(member, bits) for member in members], axis=0) for bits in shared_bits(members)
        ]
        total += int(np.min(by_bits, axis=0).sum())
    return total


def _least_size(member: Member, bits: int) -> Floats:
    """The smallest bytes (B,) of the options of `bits` with a finite cost, infinite where there is none."""
    rows = np.flatnonzero(member.bits == bits)
    rows = rows[np.argsort(member.size[rows], kind="stable")]
    least = np.full(member.cost.shape[1], np.inf)
    for k in rows[::-1]:
        least[np.isfinite(member.cost[k])] = member.size[k]
    return least


def _guesses(batches: Sequence[Sequence[Member]], budget_bytes: int, least: int) -> list[float]:
    """Multipliers to try in turn, from a sample of groups if there are many; zero and a huge one come
    last."""
    spread = max(
        1e-300, *(float(np.ptp(m.cost[np.isfinite(m.cost)])) for members in batches for m in members)
    )
    ladder = [spread, 0.0, *(spread * 4.0**power for power in range(1, 40))]
    sample = [[Member(m.bits, m.size, m.cost[:, ::SAMPLE_STEP]) for m in members] for members in batches]
    aim = int(_least_bytes(sample) / max(1, least) * budget_bytes)
    low, high = _minimise(sample, 0.0), _minimise(sample, spread)
    if not high.total_bytes <= aim < low.total_bytes:
        return ladder
    price, _ = _intersect(sample, aim, low, high)
    return [*(price * factor for factor in (1.02, 0.98, 1.1, 0.9, 1.5, 0.6, 4.0, 0.2)), *ladder]


def _minimise(batches: Sequence[Sequence[Member]], price: float) -> Pick:
    """The options of least cost + price·bytes in every tie group."""
    taken = []
    for members in batches:
        group = np.arange(members[0].cost.shape[1])
        best = [_best_by_bits(member, shared_bits(members), price) for member in members]
        level = np.sum([value for value, _ in best], axis=0).argmin(axis=0)
        taken.append(np.array([option[level, group] for _, option in best], dtype=np.int64))
    return _priced(batches, tuple(taken))


def _best_by_bits(member: Member, bits: Sequence[int], price: float) -> tuple[Floats, Integers]:
    """The least cost + price·bytes at each of `bits`, and the option that has it: (L, B) each."""
    shape = len(bits), member.cost.shape[1]
    best, option = np.full(shape, np.inf), np.zeros(shape, dtype=np.int64)
    value, better = np.empty(shape[1]), np.empty(shape[1], dtype=np.bool_)
    level_of = {value: level for level, value in enumerate(bits)}
    for k, (option_bits, size) in enumerate(zip(member.bits.tolist(), member.size.tolist(), strict=True)):
        level = level_of.get(option_bits)
        if level is None:
            continue
        np.add(member.cost[k], price * size, out=value)
        np.less(value, best[level], out=better)
        np.minimum(value, best[level], out=best[level])
        np.copyto(option[level], k, where=better)
    return best, option


@dataclass(frozen=True, slots=True)
class Swap:
    """One member of one tie group takes another option."""

    batch: int
    member: int
    option: int
    group: int
    cost_added: float


def _best_swap(batches: Sequence[Sequence[Member]], base: Pick, slack: int) -> Swap | None:
    """The swap at unchanged bits that lowers the cost most within `slack` bytes, if any does."""
    found: Swap | None = None
    for batch, (members, options) in enumerate(zip(batches, base.options, strict=True)):
        group = np.arange(options.shape[1])
        for index, (member, taken) in enumerate(zip(members, options, strict=True)):
            taken_cost, taken_size, taken_bits = (
                member.cost[taken, group],
                member.size[taken],
                member.bits[taken],
            )
            for k, (bits, size) in enumerate(zip(member.bits.tolist(), member.size.tolist(), strict=True)):
                added = member.cost[k] - taken_cost
                added[(size - taken_size > slack) | (taken_bits != bits)] = np.inf
                g = int(added.argmin())
                if added[g] < (found.cost_added if found else 0.0):
                    found = Swap(batch, index, k, g, float(added[g]))
    return found


def _within(
    members: Sequence[Member], best: Sequence[Floats], taken: Integers, price: float, margin: float
) -> list[Mask]:
    """The options (K, B) whose group value, with them forced, is within `margin` of the best, and those
    taken.

    best: the least value (L, B) of each member at each of the shared bits.
    """
    total = np.sum(best, axis=0)
    ceiling = total.min(axis=0) + margin
    level_of = {value: level for level, value in enumerate(shared_bits(members))}
    kept = []
    for member, least, option in zip(members, best, taken, strict=True):
        mask = np.zeros(member.cost.shape, dtype=np.bool_)
        possible = np.isfinite(total)
        others = np.subtract(total, least, out=np.zeros_like(total), where=possible)
        limit = np.where(possible, ceiling - others, -np.inf)
        for k, (option_bits, size) in enumerate(zip(member.bits.tolist(), member.size.tolist(), strict=True)):
            level = level_of.get(option_bits)
            if level is not None:
                np.less_equal(member.cost[k] + price * size, limit[level], out=mask[k])
        mask[option, np.arange(len(option))] = True
        kept.append(mask)
    return kept
