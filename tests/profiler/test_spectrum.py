"""Spectra: how the energy of matrices and heads spreads over singular values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allocator.plan import PlanModel
from profiler.model.checkpoint import find_model
from profiler.model.heads import heads_of
from profiler.model.layers import LoadedModel, open_model
from profiler.studies.spectrum import SHARES, energy_curve, rank_for, spectrum_document, spectrum_of

MODEL = PlanModel(id="tiny", revision=None, weights_sha256="0" * 64)


def opened(directory: Path) -> LoadedModel:
    return open_model(find_model(str(directory)))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 1000))
def test_energy_rises_to_one(rows: int, columns: int, seed: int) -> None:
    energy_r = energy_curve(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))
    assert len(energy_r) == min(rows, columns)
    assert (energy_r.diff() >= 0).all()
    assert energy_r[0] > 0
    assert energy_r[-1] == 1


def test_energy_is_the_share_of_squared_singular_values() -> None:
    w_OI = torch.diag(torch.tensor([3.0, 2.0, 1.0]))[:, [2, 0, 1]]
    assert energy_curve(w_OI).tolist() == pytest.approx([9 / 14, 13 / 14, 1])


def test_what_is_left_out_is_the_relative_squared_error_of_the_best_cut() -> None:
    w_OI = torch.randn(12, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, value, right = torch.linalg.svd(w_OI, full_matrices=False)
    cut_OI = (left[:, :5] * value[:5]) @ right[:5]
    error = ((w_OI - cut_OI).square().sum() / w_OI.square().sum()).item()
    assert 1 - energy_curve(w_OI)[4].item() == pytest.approx(error)


def test_the_rank_is_the_least_that_holds_the_share() -> None:
    energy_r = energy_curve(torch.diag(torch.tensor([3.0, 2.0, 1.0])))
    assert [rank_for(energy_r, share) for share in (0.1, 9 / 14, 0.65, 13 / 14, 0.95, 1.0)] == [
        1,
        1,
        2,
        2,
        3,
        3,
    ]


def test_a_matrix_of_rank_two_holds_everything_in_two() -> None:
    factor = torch.randn(10, 2, generator=torch.Generator().manual_seed(0))
    assert spectrum_of(factor @ factor.T).ranks[-1] == 2


def test_a_matrix_of_zeros_needs_no_more_than_one() -> None:
    assert spectrum_of(torch.zeros(4, 6)).ranks == (1,) * len(SHARES)


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("llama", {"q": 4, "k": 2, "v": 2, "o": 4}),
        ("gpt2", {"q": 4, "k": 4, "v": 4, "o": 4}),
        ("gpt_neo", {"q": 4, "k": 4, "v": 4, "o": 4}),
        ("opt", {"q": 4, "k": 4, "v": 4, "o": 4}),
    ],
)
def test_heads_are_found_grouped_queries_too(
    model_directory: Callable[[str], Path], architecture: str, expected: dict[str, int]
) -> None:
    loaded = opened(model_directory(architecture))
    heads = [head for layer in loaded.layers_of(0) for head in heads_of(loaded, layer)]
    assert {role: sum(head.role == role for head in heads) for role in "qkvo"} == expected
    assert {head.width for head in heads} == {16}


def test_heads_cut_a_layer_without_gap_or_overlap(model_directory: Callable[[str], Path]) -> None:
    loaded = opened(model_directory("gpt2"))
    fused, output = (layer for layer in loaded.layers_of(0) if "attn" in layer.name)
    w_OI = loaded.weight(fused)
    assert torch.equal(torch.cat([head.cut(w_OI) for head in heads_of(loaded, fused)]), w_OI)
    w_OI = loaded.weight(output)
    assert torch.equal(torch.cat([head.cut(w_OI) for head in heads_of(loaded, output)], dim=1), w_OI)


def test_the_document_has_every_layer_and_the_heads_of_the_attention(
    model_directory: Callable[[str], Path],
) -> None:
    loaded = opened(model_directory("llama"))
    document = spectrum_document(loaded, MODEL)
    assert list(document.layers) == [layer.name for layer in loaded.layers]
    for name, layer in document.layers.items():
        assert layer.spectrum.energy[-1] == 1
        assert list(layer.spectrum.ranks) == sorted(layer.spectrum.ranks)
        assert bool(layer.heads) == ("self_attn" in name)
        for head in layer.heads:
            assert head.spectrum.full_rank == 16
