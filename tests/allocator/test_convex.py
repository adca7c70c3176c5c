"""HiGHS as method of record, and the continuous relaxation of the error curves."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocator.analysis.convex import CurveLimits, ErrorCurve, relax_curves, round_to_menu
from allocator.errors import InfeasibleError, InvalidProblemError
from allocator.problem import LayerMenu, Menu, Problem
from allocator.resources.milp import solve_milp
from allocator.solver.knapsack import solve
from allocator.storage import Option, layer_bytes

OPTIONS = tuple(
    Option(bits, rank, 64, 4 if rank else 0) for bits in range(2, 9) for rank in (0, 16, 32, 64, 128)
)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    count = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    numbers = st.lists(st.integers(0, 20), min_size=sum(count), max_size=sum(count))
    scale = draw(st.sampled_from([1, 1024, 10**9]))
    size = np.array(draw(numbers), dtype=np.int64) * scale + draw(st.sampled_from([0, 1]))
    cost = np.array(draw(numbers)) * draw(st.sampled_from([1e-9, 1.0, 1e9]))
    budget = draw(st.integers(0, 80)) * scale
    return Problem(cost, size, np.append(0, np.cumsum(count)).astype(np.int64), budget)


@settings(max_examples=150, deadline=None)
@given(problems())
def test_the_integer_programme_finds_the_optimum_of_raw_bytes(problem):
    costs = [
        float(problem.cost[taken].sum())
        for choice in itertools.product(*(range(n) for n in np.diff(problem.start)))
        for taken in (problem.start[:-1] + np.array(choice),)
        if problem.size[taken].sum() <= problem.budget_bytes
    ]
    if not costs:
        with pytest.raises(InfeasibleError):
            solve_milp(problem)
        return
    found = solve_milp(problem)
    taken = problem.start[:-1] + found.choice
    assert found.proven
    assert found.total_bytes == problem.size[taken].sum() <= problem.budget_bytes
    assert found.cost == pytest.approx(min(costs), rel=1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_the_exact_solver_and_the_integer_programme_agree_on_sixty_groups(seed):
    rng = np.random.default_rng(seed)
    size = rng.integers(1, 2**27, (60, 14))
    cost = rng.lognormal(0, 1, (60, 1)) / size * rng.lognormal(0, 0.1, size.shape)
    budget = int(np.quantile(size, 0.3, axis=1).sum())
    problem = Problem(cost.ravel(), size.ravel(), np.arange(61) * 14, budget)
    exact, programme = solve(problem), solve_milp(problem)
    assert exact.proven and programme.proven
    assert exact.cost == pytest.approx(programme.cost, rel=1e-9)
    assert programme.total_bytes <= budget


def curves(count: int = 24, seed: int = 0) -> list[ErrorCurve]:
    rng = np.random.default_rng(seed)
    shapes = [(512, 512), (2048, 512), (512, 2048)]
    return [
        ErrorCurve(
            name=f"layers.{index}",
            rows=shapes[index % 3][0],
            columns=shapes[index % 3][1],
            scale=float(rng.lognormal()),
            bits_decay=float(rng.uniform(1.7, 2.1)),
            rank_scale=float(rng.uniform(5, 200)),
            rank_decay=float(rng.uniform(0, 2.0)),
            rank_edge=float(rng.uniform(0, 1.5)),
            sensitivity=float(rng.lognormal()) * 1e-3,
        )
        for index in range(count)
    ]


def error(curve: ErrorCurve, bits: float, rank: float) -> float:
    share = 1 - rank / min(curve.rows, curve.columns)
    fall = (1 + rank / curve.rank_scale) ** -curve.rank_decay
    return curve.scale * 2 ** (-curve.bits_decay * bits) * fall * share**curve.rank_edge


def menu_of(some: list[ErrorCurve]) -> Menu:
    layers = []
    for curve in some:
        original = 2 * curve.rows * curve.columns
        total = np.array(
            [layer_bytes(curve.rows, curve.columns, o, original) for o in OPTIONS], dtype=np.int64
        )
        errors = np.array([error(curve, o.bits, o.rank) for o in OPTIONS])
        layers.append(
            LayerMenu(
                curve.name,
                curve.rows,
                curve.columns,
                original,
                OPTIONS,
                total,
                errors,
                errors * curve.sensitivity,
            )
        )
    return Menu(tuple(layers), {"embed": 4096})


@pytest.mark.parametrize("share", [0.16, 0.22, 0.3, 0.45])
def test_no_plan_on_any_grid_costs_less_than_the_relaxation(share):
    some = curves()
    menu = menu_of(some)
    total_bytes = int(menu.original_bytes * share)
    relaxed = relax_curves(some, total_bytes - menu.kept_bytes)
    exact = solve(menu.problem(total_bytes))
    assert relaxed.lower_bound <= exact.cost
    assert relaxed.cost <= exact.cost * (1 + 1e-6)
    assert relaxed.lower_bound >= 0.5 * exact.cost


def test_the_relaxation_is_tight_where_the_curve_is_convex():
    some = [replace(curve, rank_edge=0.0) for curve in curves()]
    relaxed = relax_curves(some, 6_500_000)
    assert relaxed.cost == pytest.approx(relaxed.lower_bound, rel=2e-3)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.16, 0.4))
def test_the_bound_holds_for_random_bits_and_ranks_within_the_budget(seed, share):
    some = curves(6, seed)
    budget = int(sum(2 * c.rows * c.columns for c in some) * share)
    relaxed = relax_curves(some, budget)
    rng = np.random.default_rng(seed)
    for _ in range(300):
        options = [Option(int(rng.integers(2, 9)), int(rng.integers(0, 64)), 128, 4) for _ in some]
        sizes = (layer_bytes(c.rows, c.columns, o, 0) for c, o in zip(some, options, strict=True))
        if sum(sizes) <= budget:
            cost = sum(c.sensitivity * error(c, o.bits, o.rank) for c, o in zip(some, options, strict=True))
            assert relaxed.lower_bound <= cost


def test_the_relaxed_point_lies_within_the_limits():
    limits = CurveLimits(min_bits=3, max_bits=6, max_rank_share=0.25)
    relaxed = relax_curves(curves(), 9_000_000, limits)
    assert (relaxed.bits >= 3).all() and (relaxed.bits <= 6).all()
    assert (relaxed.rank >= 0).all() and (relaxed.rank <= 128).all()
    assert relaxed.shadow_price > 0


@pytest.mark.parametrize("share", [0.16, 0.22, 0.3])
def test_rounding_fits_the_budget_and_is_close_to_the_exact_plan(share):
    some = curves()
    menu = menu_of(some)
    total_bytes = int(menu.original_bytes * share)
    rounded = round_to_menu(relax_curves(some, total_bytes - menu.kept_bytes), menu, total_bytes)
    exact = solve(menu.problem(total_bytes))
    taken = list(zip(menu.layers, rounded.choice, strict=True))
    assert sum(int(layer.total_bytes[k]) for layer, k in taken) == rounded.total_bytes
    assert rounded.total_bytes + menu.kept_bytes <= total_bytes
    assert rounded.lower_bound <= exact.cost <= rounded.cost <= 1.2 * exact.cost


def test_a_budget_below_the_fewest_bits_says_how_far():
    with pytest.raises(InfeasibleError, match="2 bits everywhere take"):
        relax_curves(curves(), 1000)


@pytest.mark.parametrize(
    "change", [{"scale": float("nan")}, {"bits_decay": 0.0}, {"rank_decay": -1.0}, {"rank_edge": -0.1}]
)
def test_a_curve_without_sense_is_refused(change):
    with pytest.raises(InvalidProblemError, match=r"layers\.0"):
        replace(curves(1)[0], **change)


def test_the_convex_solvers_are_loaded_only_when_called():
    code = "import sys, allocator.analysis.convex, allocator.allocation; sys.exit('cvxpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
