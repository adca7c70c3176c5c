"""Plain low rank: what cutting a matrix keeps, by cosine and by relative error; and a prompt under two models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from compressor.lowrank.decompose import RankError
from profiler.evaluation.prompts import sample_pair
from profiler.model.checkpoint import find_model
from profiler.model.layers import LoadedModel, load_model, open_model
from profiler.studies.quality import BANDS, truncations
from profiler.studies.spectrum import energy_curve


@pytest.fixture
def opened(model_directory: Callable[[str], Path]) -> LoadedModel:
    return open_model(find_model(str(model_directory("llama"))))


def test_a_cut_keeps_the_energy_of_its_rank(opened: LoadedModel) -> None:
    weights = {layer.name: opened.weight(layer) for layer in opened.layers}
    found = list(truncations(opened, ranks=(4, 16)))
    assert [(row.layer, row.rank) for row in found] == [(name, rank) for name in weights for rank in (4, 16)]
    for row in found:
        kept = energy_curve(weights[row.layer])[row.rank - 1].item()
        assert row.squared_error == pytest.approx(1 - kept, abs=1e-9)
        assert row.cosine == pytest.approx(kept**0.5, abs=1e-9)
        assert row.rooted_error**2 == row.squared_error


def test_for_pure_truncation_cosine_and_rooted_error_are_one_figure(opened: LoadedModel) -> None:
    assert all(
        row.identity == pytest.approx(1, abs=1e-12) for row in truncations(opened, shares=(0.1, 0.5, 0.9))
    )


def test_rounded_factors_lose_more_and_break_the_identity(opened: LoadedModel) -> None:
    exact, eight, four = (list(truncations(opened, (8,), factor_bits=bits)) for bits in (0, 8, 4))
    for pure, fine, coarse in zip(exact, eight, four, strict=True):
        assert pure.squared_error < fine.squared_error < coarse.squared_error
        assert fine.size_ratio > coarse.size_ratio
    assert max(abs(row.identity - 1) for row in four) > 1e-7


def test_the_full_rank_is_the_matrix_and_earns_the_best_verdict(opened: LoadedModel) -> None:
    full = min(min(layer.rows, layer.columns) for layer in opened.layers)
    smallest = [row for row in truncations(opened, ranks=(1, full)) if row.rank == row.full_rank]
    assert smallest and all(row.verdict == "excellent" and row.squared_error < 1e-20 for row in smallest)
    for row in truncations(opened, ranks=(1, full)):
        assert row.cosine >= dict(BANDS)[row.verdict]


def test_a_matrix_of_zeros_is_kept_whole(tiny_llama: LoadedModel) -> None:
    name = tiny_llama.layers[0].name
    tiny_llama.model.get_submodule(name).weight.zero_()
    found = next(truncations(tiny_llama, ranks=(2,)))
    assert (found.layer, found.cosine, found.squared_error) == (name, 1.0, 0.0)


def test_a_rank_above_the_smaller_side_is_refused_before_anything_is_measured(opened: LoadedModel) -> None:
    with pytest.raises(
        RankError, match=r"rank 65 exceeds the smaller side of .*; use at most \d+, or --shares"
    ):
        next(truncations(opened, ranks=(65,)))


def test_a_model_is_itself_under_any_prompt() -> None:
    loaded = load_model(find_model("demo"))
    found = sample_pair(loaded, loaded, "It was a cold morning")
    assert found.reference == found.compressed != ""
    assert found.reference_repetition == found.compressed_repetition
    assert (found.logits_cosine, found.logits_mse) == (pytest.approx(1, abs=1e-6), 0)
