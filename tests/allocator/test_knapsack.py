"""The exact solver: optimal to the last bit where it says so, an honest gap where it doesn't."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocator.errors import InfeasibleError, InvalidProblemError, ProblemTooLargeError
from allocator.problem import Problem
from allocator.solver import core_search as core
from allocator.solver import knapsack, relaxation
from allocator.solver.certificate import verify
from allocator.solver.knapsack import Knapsack, solve
from benchmarks.instances import FAMILIES, MODELS, OPTIONS, model_instance, model_sizes, random_instance
from benchmarks.solver_correctness import agree, complaint, highs_cost, reference_cost, solve_or_none

instances = st.builds(lambda number: random_instance(5, number)[1], st.integers(0, 100_000))


def problem_of(groups: list[list[tuple[int, float]]], budget_bytes: int) -> Problem:
    """Groups of (bytes, cost) pairs."""
    options = [option for group in groups for option in group]
    return Problem(
        cost=np.array([cost for _, cost in options], dtype=np.float64),
        size=np.array([size for size, _ in options], dtype=np.int64),
        start=np.cumsum([0, *map(len, groups)]).astype(np.int64),
        budget_bytes=budget_bytes,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_two_thousand_adversarial_instances_match_the_reference(family: str) -> None:
    number = list(FAMILIES).index(family)
    for draw in range(112):
        problem = random_instance(2024, number + draw * len(FAMILIES))[1]
        solution = solve_or_none(problem)
        assert complaint(problem, solution, reference_cost(problem)) is None
        assert solution is None or solution.proven


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_agrees_with_highs(family: str) -> None:
    for seed in range(3):
        problem = FAMILIES[family](np.random.default_rng((77, seed)))
        assert agree(highs_cost(problem), reference_cost(problem))


@pytest.fixture
def crippled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Caps so small that lists are cut, stages left out and multipliers sampled even on toy problems."""
    monkeypatch.setattr(relaxation, "SAMPLE", 2)
    monkeypatch.setattr(relaxation, "NEAR", 2)
    monkeypatch.setattr(knapsack, "NEAR", 2)
    monkeypatch.setattr(relaxation, "RUN", 16)
    monkeypatch.setattr(core, "EXPANSION_CAP", 40)
    monkeypatch.setattr(core, "LADDER", 2)
    monkeypatch.setattr(knapsack, "BEAM", (2, 3))
    monkeypatch.setattr(knapsack, "PASSES", ((2, 3), (4, 6)))
    monkeypatch.setattr(knapsack, "PROGRAM_CAP", 0)
    yield


@pytest.mark.usefixtures("crippled")
def test_at_its_caps_it_never_proves_falsely_and_never_overstates_its_bound() -> None:
    unproven = 0
    for number in range(1500):
        problem = random_instance(31, number)[1]
        solution = solve_or_none(problem)
        assert complaint(problem, solution, reference_cost(problem)) is None
        if solution is not None:
            again = Knapsack.of(problem).solve(problem.budget_bytes)
            assert complaint(problem, again, reference_cost(problem)) is None
            unproven += not solution.proven
    assert unproven > 20


def test_the_last_resort_agrees_with_the_reference_and_keeps_stdout_clean(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(knapsack, "BEAM", (1, 1))
    monkeypatch.setattr(knapsack, "PASSES", ())
    proven = 0
    for number in range(108):
        problem = random_instance(61, number)[1]
        solution = solve_or_none(problem)
        assert complaint(problem, solution, reference_cost(problem)) is None
        proven += solution is not None and solution.proven
    assert proven > 80
    assert capfd.readouterr().out == ""


def test_without_time_it_returns_the_first_incumbent_with_its_gap() -> None:
    problem = model_instance("Llama-3-70B", 35, seed=0)
    hurried, exact = solve(problem, time_limit_seconds=0), solve(problem)
    assert exact.proven and not hurried.proven
    assert hurried.lower_bound <= exact.cost <= hurried.cost
    assert hurried.gap == pytest.approx(hurried.cost - hurried.lower_bound)
    assert 0 < hurried.gap < 1e-3 * hurried.cost
    assert verify(problem, hurried).holds


@pytest.mark.parametrize("model", ["Qwen2-1.5B", "Llama-3-70B", "MoE-5k"])
def test_models_are_solved_to_a_proof_that_verifies(model: str) -> None:
    problem = model_instance(model, 35, seed=8)
    solution = solve(problem)
    assert solution.proven and solution.gap == 0
    certificate = verify(problem, solution)
    assert certificate.holds, certificate.faults
    assert certificate.gap < 1e-4 * certificate.cost


@pytest.mark.parametrize("family", FAMILIES)
def test_a_table_read_once_has_the_optimum_of_every_budget(family: str) -> None:
    for seed in range(12):
        problem = FAMILIES[family](np.random.default_rng((7, seed)))
        knapsack = Knapsack.of(problem)
        for share in (0.1, 0.5, 0.9, 1.0, 1.5):
            budgeted = replace(problem, budget_bytes=int(problem.budget_bytes * share))
            if solve_or_none(budgeted) is None:
                with pytest.raises(InfeasibleError):
                    knapsack.solve(budgeted.budget_bytes)
                continue
            solution = knapsack.solve(budgeted.budget_bytes)
            assert solution.proven
            assert complaint(budgeted, solution, reference_cost(budgeted)) is None
            assert verify(budgeted, solution).holds


@pytest.mark.parametrize("model", ["Qwen2-1.5B", "Llama-3-70B"])
def test_a_model_read_once_is_solved_at_the_cost_it_has_alone(model: str) -> None:
    problem = model_instance(model, 35, seed=3)
    knapsack = Knapsack.of(problem)
    for share in (0.8, 1.0, 1.3):
        budgeted = replace(problem, budget_bytes=int(problem.budget_bytes * share))
        found, alone = knapsack.solve(budgeted.budget_bytes), solve(budgeted)
        assert found.proven and alone.proven
        assert found.cost == pytest.approx(alone.cost, rel=1e-12)
        assert found.shadow_price == pytest.approx(alone.shadow_price)
        assert verify(budgeted, found).holds


@given(instances)
@settings(deadline=None, max_examples=150)
def test_every_answer_verifies(problem: Problem) -> None:
    solution = solve_or_none(problem)
    if solution is not None:
        assert verify(problem, solution).holds


@given(instances, st.integers(0, 1000))
@settings(deadline=None, max_examples=150)
def test_more_budget_never_costs_more(problem: Problem, more: int) -> None:
    less, greater = (
        solve_or_none(replace(problem, budget_bytes=problem.budget_bytes + extra)) for extra in (0, more)
    )
    assert less is None or (greater is not None and greater.cost <= less.cost)


@given(instances)
@settings(deadline=None, max_examples=50)
def test_equal_problems_get_equal_answers(problem: Problem) -> None:
    first, second = solve_or_none(problem), solve_or_none(problem)
    assert (first is None) == (second is None)
    if first is not None and second is not None:
        assert first.choice.tolist() == second.choice.tolist()


@given(instances, st.integers(-40, 40))
@settings(deadline=None, max_examples=100)
def test_scaling_all_costs_by_a_power_of_two_changes_nothing(problem: Problem, power: int) -> None:
    plain, scaled = solve_or_none(problem), solve_or_none(replace(problem, cost=problem.cost * 2.0**power))
    if plain is not None and scaled is not None:
        assert scaled.cost == plain.cost * 2.0**power


def test_groups_may_differ_widely_in_options() -> None:
    generator = np.random.default_rng(4)
    groups = [
        [(int(size), float(cost)) for size, cost in generator.integers(1, 500, (count, 2))]
        for count in (1, 300, 2, 7, 40, 1, 5)
    ]
    problem = problem_of(groups, 900)
    assert solve(problem).cost == reference_cost(problem)


def test_a_slack_budget_takes_the_smallest_of_the_cheapest_options_at_no_price() -> None:
    solution = solve(problem_of([[(9, 1.0), (5, 1.0), (2, 3.0)], [(4, 2.0), (8, 0.0)]], 10**15))
    assert solution.choice.tolist() == [1, 1]
    assert (solution.cost, solution.total_bytes, solution.gap) == (1.0, 13, 0.0)
    assert solution.proven and solution.shadow_price == 0.0


def test_the_smallest_budget_takes_the_cheapest_of_the_smallest_options() -> None:
    solution = solve(problem_of([[(9, 1.0), (5, 8.0), (5, 7.0)], [(4, 2.0), (8, 0.0)]], 9))
    assert solution.choice.tolist() == [2, 0]
    assert solution.proven


def test_below_the_smallest_budget_it_says_how_far() -> None:
    with pytest.raises(InfeasibleError, match="raise it by 2 bytes") as failure:
        solve(problem_of([[(9, 1.0), (5, 8.0)], [(4, 2.0)]], 7))
    assert failure.value.smallest_bytes == 9


def test_bytes_without_a_common_divisor_of_the_slack_are_never_promised() -> None:
    solution = solve(problem_of([[(0, 10.0), (60, 0.0)], [(0, 9.0), (60, 1.0)]], 119))
    assert (solution.total_bytes, solution.cost, solution.proven) == (60, 9.0, True)


@pytest.mark.parametrize("layers", [2_000, 20_000])
def test_identical_layers_are_counted_not_enumerated(layers: int) -> None:
    groups = [[(10, 8.0), (16, 3.0), (23, 1.0)]] * layers + [[(7, 5.0), (12, 2.5)]] * 3
    problem = problem_of(groups, 13 * layers + 5)
    solution = solve(problem)
    assert solution.proven
    assert solution.cost == counted_optimum(layers, problem.budget_bytes)


def counted_optimum(layers: int, budget_bytes: int) -> float:
    """The least cost over how many layers take 16 and 23 bytes and how many of three others take 12."""
    middle, large = np.meshgrid(np.arange(layers + 1), np.arange(min(layers, 40) + 1))
    costs = []
    for other in range(4):
        size = 10 * layers + 6 * middle + 13 * large + 21 + 5 * other
        cost = 8.0 * layers - 5 * middle - 7 * large + 15 - 2.5 * other
        costs.append(cost[(middle + large <= layers) & (size <= budget_bytes)].min())
    return float(min(costs))


def test_exactly_linear_costs_are_proven_at_scale() -> None:
    generator = np.random.default_rng(0)
    size = generator.integers(10**6, 10**8, 2_000 * 35)
    problem = Problem(10.0**9 - size / 8, size, np.arange(2_001) * 35, int(size.sum() / 35) + 12345)
    solution = solve(problem)
    assert solution.proven
    assert solution.total_bytes == problem.budget_bytes


@pytest.mark.parametrize("bits_per_weight", [3.01, 4.37])
def test_equal_layers_of_a_real_model_are_proven(bits_per_weight: float) -> None:
    shapes, options = MODELS["Qwen2-1.5B"], OPTIONS[35]
    weights = np.array([rows * columns for rows, columns in shapes])
    error = np.array([4.0**-option.bits / (1 + option.rank / 40) for option in options])
    problem = Problem(
        cost=np.multiply.outer(weights / weights.sum(), error).ravel(),
        size=model_sizes(shapes, options).ravel(),
        start=np.arange(len(shapes) + 1) * len(options),
        budget_bytes=int(bits_per_weight * weights.sum() / 8),
    )
    solution = solve(problem)
    assert solution.proven
    assert verify(problem, solution).holds


def test_too_many_options_are_refused_with_the_number_and_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knapsack, "OPTION_CAP", 3)
    with pytest.raises(ProblemTooLargeError, match="4 options exceed the cap of 3"):
        solve(problem_of([[(1, 1.0), (2, 0.5)], [(1, 1.0), (2, 0.5)]], 3))


@pytest.mark.parametrize(
    ("cost", "size", "start", "complaint"),
    [
        ([np.nan], [1], [0, 1], "costs must be finite"),
        ([np.inf], [1], [0, 1], "costs must be finite"),
        ([1.0], [-1], [0, 1], "sizes cannot be negative"),
        ([1.0], [0.5], [0, 1], "whole bytes"),
        ([1.0], [1], [0, 1, 1], "group 1 has no option"),
        ([1.0, 2.0], [1], [0, 2], "they go in pairs"),
        ([1.0], [1], [0, 2], "start must run"),
    ],
)
def test_bad_input_is_named(cost: list[float], size: list[float], start: list[int], complaint: str) -> None:
    with pytest.raises(InvalidProblemError, match=complaint):
        solve(Problem(np.array(cost), np.array(size), np.array(start), 10))
