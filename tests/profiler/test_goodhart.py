"""Plans ranked by KL and by tasks: where both agree, and where they part."""

from __future__ import annotations

import numpy as np
import pytest

from profiler.studies.task_correlation import task_agreement

PLANS = ("a", "b", "c")
KL = np.array([0.1, 0.2, 0.4])


def scores(*shares: float, documents: int = 1000) -> np.ndarray:
    """Documents that a plan of share s gets right, the same ones first."""
    return np.stack([np.arange(documents) < share * documents for share in shares]).astype(float)


def test_a_task_that_falls_with_kl_parts_nowhere() -> None:
    found = task_agreement("t", PLANS, KL, np.exp(KL), scores(0.9, 0.8, 0.5))
    assert found.kl_correlation == found.perplexity_correlation == pytest.approx(1)
    assert (found.documents, found.pairs, found.clear_pairs, found.partings) == (1000, 3, 3, ())


def test_a_plan_of_less_kl_that_a_task_has_clearly_worse_is_named() -> None:
    found = task_agreement("t", PLANS, KL, np.exp(KL), scores(0.7, 0.8, 0.5))
    (parting,) = found.partings
    assert (parting.less_kl, parting.preferred) == ("a", "b")
    assert parting.difference == pytest.approx(0.1) and parting.standard_error < 0.011
    assert found.kl_correlation == pytest.approx(0.5)


def test_perplexity_may_agree_where_kl_does_not() -> None:
    found = task_agreement("t", PLANS, KL, np.array([12.0, 11.0, 15.0]), scores(0.7, 0.8, 0.5))
    assert found.perplexity_correlation == pytest.approx(1)


def test_differences_within_the_error_tell_nothing() -> None:
    draw = np.random.default_rng(0)
    even = (draw.random((3, 400)) < 0.5).astype(float)
    assert task_agreement("t", PLANS, KL, KL, even).clear_pairs == 0


def test_a_task_that_nobody_can_do_has_no_order() -> None:
    found = task_agreement("t", PLANS, KL, KL, np.zeros((3, 50)))
    assert found.kl_correlation is None and found.clear_pairs == 0
