"""Weights and key-value cache under one budget: the optimum of both, its bytes, and budgets that cannot be."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.errors import BudgetAboveOriginalError, BudgetSyntaxError, InfeasibleError
from allocator.kv_cache import CacheGroup, CacheMenu, CacheOption, joint_bytes, joint_plan, parse_joint_budget
from allocator.plan import Plan, PlanModel, load_plan
from allocator.planner import Planner
from allocator.problem import LayerMenu, Menu
from allocator.storage import KEEP, Option


def layer(name: str, sizes: list[int], costs: list[float]) -> LayerMenu:
    options = (Option(2, 0, 64, 0), Option(4, 0, 64, 0), KEEP)
    return LayerMenu(name, 64, 64, sizes[-1], options, np.array(sizes), np.array(costs), np.array(costs))


def group(name: str, sizes: list[int], costs: list[float]) -> CacheGroup:
    options = tuple(CacheOption(bits, ((rank, rank),)) for bits, rank in ((4, 2), (8, 4), (16, 4)))
    return CacheGroup(name, options, np.array(sizes), np.array(costs))


MENU = Menu(
    (layer("0.a", [100, 180, 700], [0.9, 0.2, 0]), layer("1.a", [100, 210, 700], [0.5, 0.1, 0])), {"e": 50}
)
CACHE = CacheMenu(
    context=64,
    batch=2,
    chunk_size=4,
    plain_bytes=1200,
    bases_sha256="b",
    groups=(group("0.k", [90, 230, 600], [0.4, 0.05, 0]), group("0.v", [80, 260, 600], [1.4, 0.1, 0])),
)


def planner(menu: Menu = MENU) -> Planner:
    return Planner(menu, PlanModel(id="m", revision=None, weights_sha256="w"), "p", (0.8, 1.25))


def planned(text: str) -> Plan:
    return joint_plan(planner(), CACHE, parse_joint_budget(text))


@given(st.integers(420, 2650))
def test_no_way_to_spend_the_budget_on_both_loses_less(total: int) -> None:
    tables = [
        *((table.total_bytes.tolist(), table.cost.tolist()) for table in MENU.layers),
        *((table.total_bytes.tolist(), table.cost.tolist()) for table in CACHE.groups),
    ]
    least = min(
        sum(costs[k] for (_, costs), k in zip(tables, choice, strict=True))
        for choice in product(range(3), repeat=4)
        if 50 + sum(sizes[k] for (sizes, _), k in zip(tables, choice, strict=True)) <= total
    )
    plan = planned(f"{total}B")
    assert plan.cache is not None
    assert plan.predicted_kl == pytest.approx(least, abs=1e-12)
    assert plan.lower_bound == pytest.approx(least, abs=1e-9)
    assert plan.total_bytes + plan.cache.total_bytes <= total == plan.budget.bytes


def test_weights_and_cache_are_told_apart() -> None:
    plan = planned("1000B")
    assert plan.cache is not None
    assert plan.total_bytes == 50 + sum(layer.bytes for layer in plan.layers.values())
    assert plan.cache.total_bytes == sum(group.bytes for group in plan.cache.groups.values())
    weights = sum(layer.cost for layer in plan.layers.values())
    assert plan.predicted_kl == pytest.approx(weights + plan.cache.predicted_kl)
    assert plan.predicted_kl_interval == pytest.approx((0.8 * plan.predicted_kl, 1.25 * plan.predicted_kl))
    assert (plan.cache.context, plan.cache.batch, plan.cache.plain_bytes) == (64, 2, 1200)


def test_a_share_is_of_checkpoint_and_plain_cache() -> None:
    assert joint_bytes(MENU, CACHE, parse_joint_budget("50%")) == (1450 + 1200) // 2


def test_a_dearer_cache_gets_more_of_the_budget() -> None:
    dearer = replace(CACHE, groups=tuple(replace(g, cost=10 * g.cost) for g in CACHE.groups))
    plain, moved = planned("800B"), joint_plan(planner(), dearer, parse_joint_budget("800B"))
    assert plain.cache is not None and moved.cache is not None
    assert moved.cache.total_bytes > plain.cache.total_bytes


def test_a_plan_with_a_cache_is_read_as_it_was_written(tmp_path) -> None:  # type: ignore[no-untyped-def]
    plan = planned("900B")
    plan.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    without = plan.model_copy(update={"cache": None})
    assert b'"cache"' in plan.document() and b'"cache"' not in without.document()


def test_budgets_that_cannot_be_are_refused() -> None:
    with pytest.raises(
        InfeasibleError, match="smallest weights take 250 and the smallest cache of 2 × 64 tokens 170"
    ):
        planned("400B")
    with pytest.raises(
        BudgetAboveOriginalError, match="more than the original checkpoint and its plain cache, 2,650"
    ):
        planned("3KB")
    with pytest.raises(BudgetSyntaxError, match="counts weights alone, but a context asks for a cache too"):
        planned("3bpw")
