"""Hidden states compared: influence, recovery of the embedding, collision margin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from profiler.model.layers import LoadedModel
from profiler.studies.hidden_states import Negatives, Pool, influence

TOKENS_NT = torch.randint(128, (3, 20), generator=torch.Generator().manual_seed(0))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_block_that_gives_its_input_has_no_influence() -> None:
    hidden_NTd = random(2, 5, 8)
    assert influence(hidden_NTd, hidden_NTd).tolist() == pytest.approx([0, 0], abs=1e-12)
    assert influence(hidden_NTd, 3 * hidden_NTd).tolist() == pytest.approx([0, 0], abs=1e-12)
    assert influence(hidden_NTd, -hidden_NTd).tolist() == pytest.approx([2, 2])


def test_influence_is_the_mean_over_tokens_of_one_minus_cosine() -> None:
    hidden_NTd = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    output_NTd = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    assert influence(hidden_NTd, output_NTd).tolist() == [0.5]


def test_every_token_is_recovered_from_the_embedding_layer_itself(tiny_llama: LoadedModel) -> None:
    embedded_NTd = tiny_llama.model.get_input_embeddings()(TOKENS_NT)
    negatives = Negatives.drawn(tiny_llama, TOKENS_NT, 0)
    assert negatives.recovery(0, embedded_NTd).tolist() == [1.0] * 3


def test_random_states_recover_their_token_by_chance_alone(tiny_llama: LoadedModel) -> None:
    tokens_NT = torch.randint(128, (40, 64), generator=torch.Generator().manual_seed(1))
    negatives = Negatives.drawn(tiny_llama, tokens_NT, 0)
    assert negatives.recovery(0, random(40, 64, 64)).mean().item() == pytest.approx(1 / 101, abs=0.01)


def test_states_of_another_width_cannot_be_compared(tiny_llama: LoadedModel) -> None:
    negatives = Negatives.drawn(tiny_llama, TOKENS_NT, 0)
    assert negatives.fits(64)
    assert not negatives.fits(32)


def filled_pool(tokens_NT: Tensor, state_NTd: Tensor) -> Pool:
    pool = Pool(tokens_NT)
    for first in range(len(tokens_NT)):
        pool.add(first, state_NTd[first : first + 1])
    return pool


def test_the_margin_is_the_shift_over_the_distance_to_the_nearest_other_token() -> None:
    tokens_NT = torch.tensor([[1, 1, 2], [3, 1, 2]])
    state_NTd = torch.tensor([[[0.0, 0], [0.1, 0], [4, 0]], [[0, 2], [9, 9], [9, 0]]])
    changed_NTd = state_NTd + torch.tensor([0.0, 1.0])
    pool = filled_pool(tokens_NT, state_NTd)
    expected = (1 / 2 + 1 / (0.01 + 4) ** 0.5 + 1 / 3.9) / 3
    assert pool.margin(0, state_NTd[:1], changed_NTd[:1]).tolist() == pytest.approx([expected])


def test_an_unchanged_state_collides_with_nothing() -> None:
    state_NTd = random(3, 20, 8)
    assert filled_pool(TOKENS_NT, state_NTd).margin(0, state_NTd, state_NTd).tolist() == [0.0] * 3


def test_states_that_coincide_leave_a_finite_margin() -> None:
    state_NTd = torch.ones(3, 20, 8)
    margin = filled_pool(TOKENS_NT, state_NTd).margin(0, state_NTd, state_NTd + 1)
    assert torch.isfinite(margin).all()
