"""Budgets per device: one exact knapsack for each device, as far as the budget of the whole allows.

What lives here: which device a layer is on, and `Split`, the groups by device. Where devices and the whole
budget bind at once, `allocation.py` bounds the optimum by the Lagrangian dual and asks `Split.at_prices` for
a choice.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from allocator.constraints.reduction import ConstrainedProblem
from allocator.constraints.rules import Constraints, Device
from allocator.errors import ConstraintError, InfeasibleError, UnmatchedPatternError
from allocator.problem import Floats, Integers, Menu, Problem, Solution
from allocator.solver.knapsack import solve


def device_of_layer(menu: Menu, constraints: Constraints) -> Integers:
    """The device of every layer, (G,) int64, −1 where none is named.

    Raises `UnmatchedPatternError` for a device without layers, `ConstraintError` for a layer on two.
    """
    device_of = np.full(len(menu.layers), -1, dtype=np.int64)
    for index, device in enumerate(constraints.devices):
        if device.shards < 1 or device.budget_bytes < 0:
            raise ConstraintError(
                f"device {device.name!r} has {device.shards} shards and {device.budget_bytes} bytes; "
                "it needs at least one shard and a budget that is not negative"
            )
        mine = [
            g
            for g, layer in enumerate(menu.layers)
            if any(fnmatchcase(layer.name, glob) for glob in device.globs)
        ]
        if not mine:
            raise UnmatchedPatternError(
                f"device {device.name!r} has no layer: nothing matches {device.globs}"
            )
        twice = [g for g in mine if device_of[g] >= 0]
        if twice:
            other = constraints.devices[device_of[twice[0]]].name
            raise ConstraintError(
                f"{menu.layers[twice[0]].name!r} is on devices {other!r} and {device.name!r}"
            )
        device_of[mine] = index
    return device_of


@dataclass(frozen=True, slots=True)
class Split:
    """The groups of a problem by device: device_of_group (G,) int64 into `devices`, −1 for a group on
    none."""

    problem: Problem
    devices: tuple[Device, ...]
    device_of_group: Integers

    @classmethod
    def of(cls, menu: Menu, constrained: ConstrainedProblem, constraints: Constraints) -> Split:
        """Raises `ConstraintError` where tied layers are on two devices."""
        device_of = device_of_layer(menu, constraints)
        group_of = constrained.group_of_layer()
        device_of_group = np.full(constrained.problem.group_count, -1, dtype=np.int64)
        device_of_group[group_of] = device_of
        apart = np.flatnonzero(device_of_group[group_of] != device_of)
        if len(apart):
            raise ConstraintError(
                f"{menu.layers[apart[0]].name!r} is tied to a layer on another device; untie them"
            )
        return cls(constrained.problem, constraints.devices, device_of_group)

    def each_alone(self, deadline: float) -> Solution | None:
        """Every device's own optimum; None where together they exceed the whole budget, so that both bind."""
        choice = np.zeros(self.problem.group_count, dtype=np.int64)
        bound, proven = 0.0, True
        for index in range(-1, len(self.devices)):
            groups = np.flatnonzero(self.device_of_group == index)
            if len(groups):
                found = self._solve(groups, index, self.problem.budget_bytes, deadline)
                choice[groups] = found.choice
                bound += found.lower_bound
                proven &= found.proven
        return self._solution(choice, bound, proven)

    def at_prices(self, prices: Floats, deadline: float) -> Solution | None:
        """Devices with a price of their own at their own optimum, the others sharing the rest of the budget.

        prices (1 + devices,): the whole budget's first. None where a device without a price exceeds its
        budget. The bound is not a bound of the whole problem and left at minus infinity.
        """
        choice = np.zeros(self.problem.group_count, dtype=np.int64)
        bound_devices = np.flatnonzero(prices[1:] > 1e-9 * prices.max())
        for index in bound_devices.tolist():
            groups = np.flatnonzero(self.device_of_group == index)
            choice[groups] = self._solve(groups, index, self.problem.budget_bytes, deadline).choice
        rest = np.flatnonzero(~np.isin(self.device_of_group, bound_devices))
        settled = np.setdiff1d(np.arange(self.problem.group_count), rest)
        left = self.problem.budget_bytes - int(self._taken(choice)[settled].sum())
        try:
            if len(rest):
                choice[rest] = self._solve(rest, -1, left, deadline).choice
        except InfeasibleError:
            return None
        return self._solution(choice, -np.inf, False) if self._fits(choice) else None

    def _solve(self, groups: Integers, index: int, budget_bytes: int, deadline: float) -> Solution:
        """The knapsack of some groups, in bytes per shard on a device, in whole bytes for index −1."""
        problem = self.problem
        count = np.diff(problem.start)[groups]
        start = np.append(0, np.cumsum(count)).astype(np.int64)
        options = np.arange(start[-1]) + np.repeat(problem.start[groups] - start[:-1], count)
        size, name = problem.size[options], "the layers on no device"
        if index >= 0:
            device = self.devices[index]
            size, budget_bytes, name = (
                -(-size // device.shards),
                device.budget_bytes,
                f"device {device.name!r}",
            )
        try:
            left = max(0.1, deadline - time.monotonic())
            return solve(Problem(problem.cost[options], size, start, budget_bytes), time_limit_seconds=left)
        except InfeasibleError as error:
            raise InfeasibleError(
                f"{name}: the smallest options take {error.smallest_bytes} bytes on each shard, "
                f"{error.smallest_bytes - budget_bytes} more than its budget; raise it or move "
                "layers elsewhere",
                error.smallest_bytes,
            ) from error

    def _taken(self, choice: Integers) -> Integers:
        return np.asarray(self.problem.size[self.problem.start[:-1] + choice])

    def _fits(self, choice: Integers) -> bool:
        size = self._taken(choice)
        return all(
            int((-(-size[self.device_of_group == index] // device.shards)).sum()) <= device.budget_bytes
            for index, device in enumerate(self.devices)
        )

    def _solution(self, choice: Integers, bound: float, proven: bool) -> Solution | None:
        total = int(self._taken(choice).sum())
        if total > self.problem.budget_bytes:
            return None
        cost = float(self.problem.cost[self.problem.start[:-1] + choice].sum())
        bound = min(bound, cost)
        return Solution(choice, cost, total, bound, cost - bound, proven, 0.0)
