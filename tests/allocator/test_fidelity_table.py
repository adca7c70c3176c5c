"""The published fidelity table of Qwen2-1.5B, as sensitivities: where rank goes with bits fixed and with bits free."""

from __future__ import annotations

import numpy as np
import pytest

from allocator.solver.certificate import verify
from benchmarks.fidelity_table import (
    FITS,
    PUBLISHED_FIDELITY,
    Comparison,
    Guess,
    blocks_text,
    build_menu,
    compare,
    fidelities,
    findings,
)

GUESSES = (Guess(), Guess(shares="rows"), Guess(absolute_r0=True))
MOST_SENSITIVE = [27, 0, 1, 25]


@pytest.fixture(scope="module", params=GUESSES, ids=str)
def guess(request: pytest.FixtureRequest) -> Guess:
    return request.param


@pytest.fixture(scope="module")
def comparison(guess: Guess) -> Comparison:
    return compare(guess)


def test_the_table_has_the_published_mean_and_the_published_values() -> None:
    table = fidelities()
    assert len(table) == 28
    assert table.mean() == pytest.approx(0.120, abs=1e-15)
    assert [table[block] for block in PUBLISHED_FIDELITY] == [0.308, 0.199, 0.166, 0.164]
    assert np.argsort(-table, kind="stable")[:4].tolist() == MOST_SENSITIVE


def test_ultra_is_the_published_assignment(comparison: Comparison) -> None:
    ranks = comparison.ultra.ranks
    assert (comparison.ultra.bits == 3).all()
    wide = [kind not in "kv" for kind in FITS]
    assert np.unique(ranks[[27, 0]][:, wide]).tolist() == [256]
    assert np.unique(ranks[[1, 25]]).tolist() == [128]
    assert np.unique(np.delete(ranks, MOST_SENSITIVE, axis=0)).tolist() == [40]


def test_with_bits_fixed_most_rank_is_on_the_four_most_sensitive_blocks(comparison: Comparison) -> None:
    rank = comparison.fixed.mean_rank
    others = np.delete(rank, MOST_SENSITIVE)
    assert (comparison.fixed.bits == 3).all()
    assert comparison.fixed.most_rank == MOST_SENSITIVE
    assert rank[27] > rank[0] > rank[1] >= rank[25] > 1.5 * others.max()


def test_with_bits_fixed_no_matrix_has_less_rank_than_one_of_a_less_sensitive_block(
    comparison: Comparison,
) -> None:
    ranks = comparison.fixed.ranks
    rest = np.delete(ranks, MOST_SENSITIVE, axis=0).max(axis=0)
    assert (np.diff(np.vstack([ranks[MOST_SENSITIVE], rest]), axis=0) <= 0).all()


def test_the_optimum_at_fixed_bits_beats_ultra_and_uniform_rank_within_their_bytes(
    comparison: Comparison,
) -> None:
    assert comparison.fixed.total_bytes <= comparison.ultra.total_bytes
    assert comparison.uniform.total_bytes <= comparison.ultra.total_bytes
    assert comparison.fixed.loss < comparison.ultra.loss < comparison.uniform.loss


def test_among_one_rank_per_block_the_optimum_is_concentrated_too_and_close_to_ultra(
    comparison: Comparison,
) -> None:
    per_block = comparison.per_block
    assert per_block.solution is not None
    assert per_block.solution.proven
    assert per_block.most_rank == MOST_SENSITIVE
    assert per_block.total_bytes <= comparison.ultra.total_bytes
    assert comparison.fixed.loss < per_block.loss <= comparison.ultra.loss < 1.01 * per_block.loss


def test_free_bits_are_strictly_better_and_leave_little_rank_to_those_blocks(comparison: Comparison) -> None:
    fixed, free = comparison.fixed, comparison.free
    assert free.total_bytes <= comparison.ultra.total_bytes
    assert free.loss < fixed.loss
    assert free.loss <= comparison.rankless.loss
    assert free.mean_rank.mean() < fixed.mean_rank.mean()
    assert free.published_share < fixed.published_share
    assert free.mean_bits[MOST_SENSITIVE].min() > np.delete(free.mean_bits, MOST_SENSITIVE).max()


def test_both_optima_are_proven_and_hold_under_the_independent_check(
    guess: Guess, comparison: Comparison
) -> None:
    budget = comparison.ultra.total_bytes
    for menu, found in (
        (build_menu(guess, bits=(3,)), comparison.fixed),
        (build_menu(guess), comparison.free),
    ):
        assert found.solution is not None
        assert found.solution.proven
        assert verify(menu.problem(budget), found.solution).holds


def test_the_sentences_are_made_from_the_result(guess: Guess, comparison: Comparison) -> None:
    bits, rank, *_ = findings(comparison, guess)
    assert f"{comparison.free.mean_bits[27]:.2f} in 27" in bits
    assert f"{(comparison.free.ranks > 0).sum()} of 196 matrices have any" in rank


def test_blocks_are_named_in_runs() -> None:
    assert blocks_text([26, 2, 3, 4, 0, 1, 7, 8]) == "0-4, 7, 8, 26"
    assert blocks_text([]) == "none"
