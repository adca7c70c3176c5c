"""The key-value cache under the same budget as the weights: options of every layer's keys and values, one problem.

What lives here: `CacheMenu` and the plan of weights and cache together. What the options are made of and what they cost
is the profiler's; bytes are those of one context and batch, so a menu is made for these.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from allocator.budget import Budget, parse_budget
from allocator.errors import BudgetAboveOriginalError, BudgetSyntaxError, InfeasibleError
from allocator.plan import MIB, Plan, PlanBudget, PlanCache, PlanCacheGroup
from allocator.planner import Planner
from allocator.problem import Floats, Integers, Menu, Problem, Solution
from allocator.solver.knapsack import solve


@dataclass(frozen=True, slots=True)
class CacheOption:
    """Bits of the coefficients, and the rank of every chunk of every key-value head, (H, C)."""

    bits: int
    ranks: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """The keys (`3.k`) or values (`3.v`) of one layer. `total_bytes` int64 and `cost` (predicted KL, nats/token)
    float64, both of the length of `options`."""

    name: str
    options: tuple[CacheOption, ...]
    total_bytes: Integers
    cost: Floats


@dataclass(frozen=True)
class CacheMenu:
    """What the cache of `batch` sequences of `context` tokens can be. `plain_bytes` is what it takes as it is."""

    context: int
    batch: int
    chunk_size: int
    plain_bytes: int
    bases_sha256: str
    groups: tuple[CacheGroup, ...]

    @cached_property
    def smallest_bytes(self) -> int:
        return sum(int(group.total_bytes.min()) for group in self.groups)

    def problem(self, budget_bytes: int) -> Problem:
        """The knapsack of the cache by itself."""
        counts = [len(group.options) for group in self.groups]
        return Problem(
            cost=np.concatenate([group.cost for group in self.groups]),
            size=np.concatenate([group.total_bytes for group in self.groups]),
            start=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            budget_bytes=budget_bytes,
        )


def joint_problem(menu: Menu, cache: CacheMenu, total_bytes: int) -> Problem:
    """The knapsack in which checkpoint and cache together may take `total_bytes`: layers first, then cache groups."""
    weights = menu.problem(total_bytes)
    cached = cache.problem(weights.budget_bytes)
    return Problem(
        cost=np.concatenate([weights.cost, cached.cost]),
        size=np.concatenate([weights.size, cached.size]),
        start=np.concatenate([weights.start, weights.start[-1] + cached.start[1:]]),
        budget_bytes=weights.budget_bytes,
    )


def parse_joint_budget(text: str) -> Budget:
    """Raises `BudgetSyntaxError`, for bits per weight too: they say nothing of a cache."""
    budget = parse_budget(text)
    if budget.unit == "BPW":
        raise BudgetSyntaxError(
            f"budget {budget.text} counts weights alone, but a context asks for a cache too;"
            " write both together like 700MiB or 25%"
        )
    return budget


def joint_bytes(menu: Menu, cache: CacheMenu, budget: Budget) -> int:
    """Bytes that checkpoint and cache may take together; a percentage is of both uncompressed.

    Raises `InfeasibleError` and `BudgetAboveOriginalError`.
    """
    original = menu.original_bytes + cache.plain_bytes
    smallest = menu.smallest_bytes + cache.smallest_bytes
    total = budget.total_bytes(original, menu.kept_bytes, menu.compressible_weights)
    if total < smallest:
        raise InfeasibleError(
            f"budget {budget.text} is {total:,} bytes, but the smallest weights take {menu.smallest_bytes:,} and the"
            f" smallest cache of {cache.batch} × {cache.context:,} tokens {cache.smallest_bytes:,}, together"
            f" {smallest:,} ({smallest / MIB:.2f}MiB); raise the budget, or serve less context or a smaller batch",
            smallest,
        )
    if total > original:
        raise BudgetAboveOriginalError(
            f"budget {budget.text} is {total:,} bytes, more than the original checkpoint and its plain cache,"
            f" {original:,}; nothing needs compressing, lower the budget"
        )
    return total


def joint_plan(planner: Planner, cache: CacheMenu, budget: Budget) -> Plan:
    """The plan of least predicted KL for weights and cache under one budget, with its certificate.

    Raises as `joint_bytes` does.
    """
    total = joint_bytes(planner.menu, cache, budget)
    found = solve(joint_problem(planner.menu, cache, total))
    return assembled(planner, cache, found, PlanBudget(text=budget.text, bytes=total))


def assembled(planner: Planner, cache: CacheMenu, found: Solution, budget: PlanBudget) -> Plan:
    """The plan of a solution of the joint problem."""
    layers = len(planner.menu.layers)
    plan = planner.plan(found.choice[:layers], budget=budget, bound=found, strategy="optimal")
    planned = planned_cache(cache, found.choice[layers:])
    predicted_kl = plan.predicted_kl + planned.predicted_kl
    low, high = planner.interval_factors
    return plan.model_copy(
        update={
            "cache": planned,
            "predicted_kl": predicted_kl,
            "predicted_kl_interval": (predicted_kl * low, predicted_kl * high),
            "lower_bound": min(found.lower_bound, predicted_kl),
            "gap": max(0.0, predicted_kl - found.lower_bound),
        }
    )


def planned_cache(cache: CacheMenu, choice: Integers) -> PlanCache:
    """What a plan says of a cache whose groups take the options `choice` (G,)."""
    groups = {
        group.name: PlanCacheGroup(
            bits=group.options[index].bits,
            ranks=group.options[index].ranks,
            bytes=int(group.total_bytes[index]),
            cost=float(group.cost[index]),
        )
        for group, index in zip(cache.groups, choice.tolist(), strict=True)
    }
    return PlanCache(
        context=cache.context,
        batch=cache.batch,
        chunk_size=cache.chunk_size,
        bases_sha256=cache.bases_sha256,
        total_bytes=sum(group.bytes for group in groups.values()),
        plain_bytes=cache.plain_bytes,
        predicted_kl=sum(group.cost for group in groups.values()),
        groups=groups,
    )
