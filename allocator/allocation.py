"""From a menu, constraints and a budget to one option per layer, by the best solver for what is asked.

What lives here: `allocate`, which chooses among the exact knapsack, one knapsack per device, the Lagrangian
search and the integer programme. The solvers are `knapsack.py`, `problem.py` and `convex.py`; the
constraints' meaning is `rules.py`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from allocator.constraints.reduction import ConstrainedProblem, constrain
from allocator.constraints.rules import (
    Constraints,
    infeasible,
    smallest_constrained_bytes,
    tie_groups,
)
from allocator.errors import ConstraintError, InfeasibleError, InvalidProblemError
from allocator.problem import Integers, Menu, Solution
from allocator.resources.devices import Split, device_of_layer
from allocator.resources.lagrangian import solve_resources
from allocator.resources.problem import ResourceProblem, ResourceSolution
from allocator.solver.knapsack import solve

MILP_OPTION_CAP = 10_000
"""Most options for which the integer programme is tried where the Lagrangian search leaves a gap."""


@dataclass(frozen=True, slots=True)
class Resource:
    """A second limit: layer g's option k takes `use[g][k]` whole units, all layers at most `limit`."""

    name: str
    use: Sequence[Integers]
    limit: int


def allocate(
    menu: Menu,
    total_bytes: int,
    constraints: Constraints | None = None,
    resources: Sequence[Resource] = (),
    *,
    time_limit_seconds: float = 10.0,
) -> Solution:
    """One option per layer, choice (G,), when the whole checkpoint may take `total_bytes`.

    `Solution.total_bytes` counts the layers alone, as everywhere. Exact and proven for one resource, and for
    devices that leave the whole budget slack; otherwise the better of Lagrangian search and, up to
    `MILP_OPTION_CAP` options, the integer programme, with an honest gap. Raises `InfeasibleError` saying how
    far and which constraint, and the `ConstraintError`s of `constrain`.
    """
    constraints = constraints or Constraints()
    separate = replace(constraints, ties=(), auto_ties=False) if resources else constraints
    constrained = constrain(menu, separate, total_bytes)
    deadline = time.monotonic() + time_limit_seconds
    try:
        found = _solve(menu, constrained, constraints, resources, deadline)
    except InfeasibleError as error:
        smallest = smallest_constrained_bytes(menu, constraints)
        if smallest > total_bytes:
            raise infeasible(menu, constraints, total_bytes, smallest) from error
        raise InfeasibleError(str(error), smallest) from error
    return replace(found, choice=constrained.choice_of(found))


def _solve(
    menu: Menu,
    constrained: ConstrainedProblem,
    constraints: Constraints,
    resources: Sequence[Resource],
    deadline: float,
) -> Solution:
    """The solution over the groups of `constrained`."""
    if resources or constraints.monotone is not None:
        coupled = resource_problem(menu, constrained, constraints, resources)
        return _best_of_both(coupled, deadline).of_first_resource()
    if not constraints.devices:
        return solve(constrained.problem, time_limit_seconds=max(0.1, deadline - time.monotonic()))
    split = Split.of(menu, constrained, constraints)
    alone = split.each_alone(deadline)
    if alone is not None:
        return alone
    both = _best_of_both(resource_problem(menu, constrained, constraints), deadline)
    shared = split.at_prices(both.prices, deadline)
    found = both.of_first_resource()
    if shared is None or shared.cost >= found.cost:
        return found
    return replace(shared, lower_bound=found.lower_bound, gap=shared.cost - found.lower_bound, proven=False)


def resource_problem(
    menu: Menu, constrained: ConstrainedProblem, constraints: Constraints, resources: Sequence[Resource] = ()
) -> ResourceProblem:
    """The groups of `constrained` with every device and resource as a limit, monotone bits as chains.

    With `resources`, `constrained` must be without merged ties; the ties become equal levels instead.
    """
    problem = replace(ResourceProblem.of(constrained.problem), level=constrained.bits)
    group_of_layer = constrained.group_of_layer()
    owner = np.repeat(np.arange(problem.group_count), np.diff(problem.start))
    for index, device in enumerate(constraints.devices):
        on_device = (device_of_layer(menu, constraints) == index).nonzero()[0]
        mine = np.isin(owner, group_of_layer[on_device])
        use = np.where(mine, -(-constrained.problem.size // device.shards), 0)
        problem = problem.with_resource(f"device {device.name!r}", use, device.budget_bytes)
    layer_of_group = np.empty(problem.group_count, dtype=np.int64)
    layer_of_group[group_of_layer] = np.arange(len(menu.layers))
    for resource in resources:
        problem = problem.with_resource(
            resource.name, _use(menu, constrained, resource, layer_of_group), resource.limit
        )
    chains = _chains(menu, constraints, group_of_layer)
    if constraints.monotone == "rising":
        chains = tuple(chain[::-1] for chain in chains)
    ties: tuple[Integers, ...] = ()
    if resources and constraints.tie_group_sizes:
        raise ConstraintError(
            "ties of group sizes and a second resource together are not offered; drop one of them"
        )
    if resources:
        groups = (group for group in tie_groups(menu, constraints) if len(group) > 1)
        ties = tuple(group_of_layer[np.array(group)] for group in groups)
    if ties and chains:
        raise ConstraintError(
            "ties, monotone bits and a second resource together are not offered; drop one of them"
        )
    return replace(problem, chains=chains, ties=ties)


def _use(
    menu: Menu, constrained: ConstrainedProblem, resource: Resource, layer_of_group: Integers
) -> Integers:
    """The resource's use by every option of the constrained problem, (N,)."""
    if len(resource.use) != len(menu.layers):
        raise InvalidProblemError(
            f"{resource.name} has a table for {len(resource.use)} layers, the menu has {len(menu.layers)}"
        )
    column = np.concatenate([batch.options.column for batch in constrained.batches])
    parts = []
    for group, layer in enumerate(layer_of_group):
        table = np.asarray(resource.use[layer])
        if table.shape != menu.layers[layer].total_bytes.shape:
            raise InvalidProblemError(
                f"{resource.name} has {table.size} entries for {menu.layers[layer].name!r}, "
                f"which has {len(menu.layers[layer].options)} options"
            )
        parts.append(table[column[constrained.problem.start[group] : constrained.problem.start[group + 1]]])
    return np.concatenate(parts)


def _chains(menu: Menu, constraints: Constraints, group_of_layer: Integers) -> tuple[Integers, ...]:
    """Groups whose layers' names differ in the block number alone, in ascending blocks."""
    if constraints.monotone is None:
        return ()
    by_role: dict[str, list[tuple[int, int]]] = {}
    for index, layer in enumerate(menu.layers):
        match = re.search(r"(?:^|\.)(\d+)(?=\.)", layer.name)
        if match is not None:
            role = layer.name[: match.start(1)] + "*" + layer.name[match.end(1) :]
            by_role.setdefault(role, []).append((int(match.group(1)), int(group_of_layer[index])))
    chains = {
        tuple(group for _, group in sorted(members)) for members in by_role.values() if len(members) > 1
    }
    used: set[int] = set()
    for chain in sorted(chains):
        if used & set(chain) or len(set(chain)) < len(chain):
            raise ConstraintError(
                "ties join layers of different blocks or roles; bits can't be monotone then"
            )
        used |= set(chain)
    return tuple(np.array(chain, dtype=np.int64) for chain in sorted(chains))


def _best_of_both(problem: ResourceProblem, deadline: float) -> ResourceSolution:
    """Lagrangian search, and where it leaves a gap on a small problem the integer programme too."""
    small = len(problem.cost) <= MILP_OPTION_CAP
    left = max(0.1, deadline - time.monotonic())
    try:
        lagrangian = solve_resources(problem, time_limit_seconds=left)
    except InfeasibleError:
        if not small:
            raise
        lagrangian = None
    if not small or (lagrangian is not None and lagrangian.proven):
        assert lagrangian is not None
        return lagrangian
    from allocator.resources.milp import solve_resources_milp

    try:
        exact = solve_resources_milp(problem, time_limit_seconds=max(0.1, deadline - time.monotonic()))
    except InfeasibleError:
        if lagrangian is None:
            raise
        return lagrangian
    if lagrangian is None or exact.proven:
        return replace(exact, prices=lagrangian.prices) if lagrangian is not None else exact
    better = exact if exact.cost < lagrangian.cost else lagrangian
    bound = min(better.cost, max(exact.lower_bound, lagrangian.lower_bound))
    return replace(better, lower_bound=bound, gap=better.cost - bound, prices=lagrangian.prices)
