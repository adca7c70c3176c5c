"""A feasible choice under several resources, next to a proven bound.

What lives here: `solve_resources`. The bound is the maximum of the Lagrangian dual (`dual.py`). Minimisers
around the best multipliers are starting points: where groups are coupled by chains or ties, whole sub-choices
of each chain or tie become the options of one uncoupled group (Dantzig & Wolfe 1960) and are combined first;
then one or two groups at a time are swapped, until every limit holds and no swap saves.
`convex.solve_resources_milp` is the method of record.
"""

from __future__ import annotations

import time

import numpy as np

from allocator.errors import InfeasibleError
from allocator.problem import Floats, Integers, Problem
from allocator.resources.dual import Bundle, Lagrangian, Mask, maximise
from allocator.resources.problem import ResourceProblem, ResourceSolution, check_each_resource, least_use
from allocator.solver.knapsack import solve

CANDIDATES = 300
"""Single swaps of lowest reduced cost that pairs are formed from."""
SWAP_ROUNDS = 60
STARTS = 2
"""Minimisers from which swaps start."""
POOL_FACTORS = np.geomspace(0.6, 1.6, 24)
"""Multiples of the best multipliers at which sub-choices of chains and ties are collected."""


def solve_resources(problem: ResourceProblem, *, time_limit_seconds: float = 10.0) -> ResourceSolution:
    """A feasible choice and a proven bound, by Lagrangian search.

    Raises `InfeasibleError` naming a resource that no choice can satisfy and by how much, or, where each
    could be satisfied alone, saying that they cannot be together or that no feasible choice was found.
    """
    deadline = time.monotonic() + time_limit_seconds
    lagrangian = Lagrangian.of(problem)
    check_each_resource(problem)
    bundle = maximise(lagrangian, deadline)
    reduced = lagrangian.priced(bundle.prices)
    best: Integers | None = None
    for choice in [*_pooled(problem, lagrangian, bundle), *bundle.nearest(STARTS)]:
        found = _improve(problem, lagrangian, reduced, choice, bundle.prices, deadline)
        if found is not None and (best is None or problem.cost_of(found) < problem.cost_of(best)):
            best = found
        if best is not None and time.monotonic() > deadline:
            break
    if best is None:
        raise InfeasibleError(
            f"no choice within all of {', '.join(problem.names)} was found; raise one limit, or let "
            "solve_resources_milp decide",
            least_use(problem, 0),
        )
    cost = problem.cost_of(best)
    span = float((bundle.prices * np.ptp(problem.use, axis=1)).sum())
    bound = min(bundle.bound, cost)
    return ResourceSolution(
        best, cost, problem.used_by(best), bound, cost - bound, cost - bound <= 1e-9 * span, bundle.prices
    )


def _pooled(problem: ResourceProblem, lagrangian: Lagrangian, bundle: Bundle) -> list[Integers]:
    """The best combination of whole sub-choices of chains and ties, as a choice (G,); none without any."""
    if not problem.coupled:
        return []
    near = [lagrangian.minimise(bundle.prices * factor)[0] for factor in POOL_FACTORS]
    choices = np.unique(np.array([*near, *bundle.nearest(len(POOL_FACTORS))]), axis=0)
    lone = np.setdiff1d(np.arange(problem.group_count), np.concatenate(problem.coupled))
    columns = [(tied, np.unique(choices[:, tied], axis=0)) for tied in problem.coupled]
    columns += [(lone[g : g + 1], np.arange(n)[:, None]) for g, n in enumerate(np.diff(problem.start)[lone])]
    taken = [problem.start[groups] + options for groups, options in columns]
    combined = ResourceProblem(
        np.concatenate([problem.cost[options].sum(axis=1) for options in taken]),
        np.concatenate([problem.use[:, options].sum(axis=2) for options in taken], axis=1),
        np.append(0, np.cumsum([len(options) for options in taken])).astype(np.int64),
        problem.limit,
        problem.names,
    )
    try:
        found = _uncoupled_choice(combined)
    except InfeasibleError:
        return []
    choice = np.empty(problem.group_count, dtype=np.int64)
    for (groups, options), k in zip(columns, found, strict=True):
        choice[groups] = options[k]
    return [choice]


def _uncoupled_choice(problem: ResourceProblem) -> Integers:
    if len(problem.names) > 1:
        return solve_resources(problem).choice
    return solve(Problem(problem.cost, problem.use[0], problem.start, int(problem.limit[0]))).choice


def _improve(
    problem: ResourceProblem,
    lagrangian: Lagrangian,
    reduced: Floats,
    choice: Integers,
    prices: Floats,
    deadline: float,
) -> Integers | None:
    """Swaps one or two groups at a time: first until every limit holds, then while the cost falls.

    Returns None where no pair of swaps lowers the excess further before it is gone.
    """
    choice = choice.copy()
    family = _families(problem)
    scale = np.maximum(problem.limit, 1).astype(np.float64)
    for _ in range(SWAP_ROUNDS):
        slack = problem.limit - problem.used_by(choice)
        swaps = _candidates(problem, lagrangian, reduced, choice, slack)
        pair = _best_pair(problem, lagrangian, swaps, choice, slack / scale, scale, family, prices)
        if pair is None or time.monotonic() > deadline:
            break
        for group, option in pair:
            choice[group] = option
    return (
        choice if (problem.used_by(choice) <= problem.limit).all() and problem.keeps_levels(choice) else None
    )


def _families(problem: ResourceProblem) -> Integers:
    """Groups that may not be swapped in pairs: a group with itself, and members of one chain."""
    family = np.arange(problem.group_count)
    for chain in problem.chains:
        family[chain] = chain[0]
    return family


def _candidates(
    problem: ResourceProblem, lagrangian: Lagrangian, reduced: Floats, choice: Integers, slack: Integers
) -> tuple[Integers, Integers]:
    """Single swaps (group, option) of lowest reduced cost that keep chains monotone and ties equal."""
    each = np.arange(len(choice))
    rise = reduced - reduced[each, choice][:, None]
    rise[each, choice] = np.inf
    if problem.coupled:
        rise[~_level_keeping_swaps(problem, lagrangian, choice)] = np.inf
    flat = rise.ravel()
    count = min(CANDIDATES, int(np.isfinite(flat).sum()))
    lowest = np.argpartition(flat, count - 1)[:count] if count else np.empty(0, dtype=np.int64)
    lowest = lowest[np.argsort(flat[lowest], kind="stable")]
    group, option = np.divmod(lowest, reduced.shape[1])
    return group, option


def _level_keeping_swaps(problem: ResourceProblem, lagrangian: Lagrangian, choice: Integers) -> Mask:
    assert problem.level is not None
    level = problem.level[problem.start[:-1] + choice]
    highest, lowest = np.full(len(choice), np.inf), np.full(len(choice), -np.inf)
    for chain in problem.chains:
        highest[chain[1:]] = level[chain[:-1]]
        lowest[chain[:-1]] = level[chain[1:]]
    for tie in problem.ties:
        highest[tie] = lowest[tie] = level[tie]
    count = np.diff(problem.start)
    width = lagrangian.cost.shape[1]
    index = problem.start[:-1, None] + np.minimum(np.arange(width), count[:, None] - 1)
    options = problem.level[index]
    return np.asarray((options <= highest[:, None]) & (options >= lowest[:, None]))


def _best_pair(
    problem: ResourceProblem,
    lagrangian: Lagrangian,
    swaps: tuple[Integers, Integers],
    choice: Integers,
    slack: Floats,
    scale: Floats,
    family: Integers,
    prices: Floats,
) -> list[tuple[int, int]] | None:
    """The pair (or single) of swaps that leaves least excess and, without excess, least cost; None if none
    helps.

    slack (R,) and the uses are in shares of the limits; exact whole units are rechecked by the caller.
    """
    group, option = swaps
    if not len(group):
        return None
    cost = lagrangian.cost[group, option] - lagrangian.cost[group, choice[group]]
    use = (lagrangian.use[:, group, option] - lagrangian.use[:, group, choice[group]]) / scale[:, None]
    cost = np.append(cost, 0.0)
    use = np.column_stack([use, np.zeros(len(scale))])
    families = np.append(family[group], -1)
    excess = np.zeros((len(cost), len(cost)))
    for r in range(len(scale)):
        over = use[r][:, None] + use[r][None, :] - slack[r]
        excess += np.maximum(over, 0.0, out=over)
    pair_cost = cost[:, None] + cost[None, :]
    pair_cost[families[:, None] == families[None, :]] = np.inf
    now = float(np.maximum(-slack, 0.0).sum())
    score = np.where(excess <= 0, pair_cost, np.inf)
    if now <= 0 and score.min() >= 0:
        return None
    if not np.isfinite(score.min()):
        penalty = 2 * float((prices * scale).sum())
        score = np.where(excess < now, pair_cost + penalty * (excess - now), np.inf)
    if not np.isfinite(score.min()):
        return None
    i, j = np.unravel_index(int(score.argmin()), score.shape)
    return [(int(group[k]), int(option[k])) for k in (i, j) if k < len(group)]
