"""Evaluation: the measures are what their definitions say."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from profiler.evaluation.divergence import (
    Fidelity,
    Reference,
    live_logits,
    measure,
    stored_logits,
    tokens_per_second,
)
from profiler.model.checkpoint import ModelRef, find_model
from profiler.model.layers import LoadedModel, load_model, open_model
from profiler.statistics.calibration import sample_tokens

Load = Callable[[ModelRef], LoadedModel]

TOKENS_NT = torch.randint(128, (6, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def damaged(tiny_llama: LoadedModel) -> nn.Module:
    model = deepcopy(tiny_llama.model)
    generator = torch.Generator().manual_seed(2)
    for layer in tiny_llama.layers:
        weight = model.get_submodule(layer.name).weight
        weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(TOKENS_NT).logits[:, :-1].double()


@torch.inference_mode()
def window_logits(reference: Reference) -> Tensor:
    """(N, T − 1, V), window by window."""
    return torch.stack(
        [
            torch.cat(list(pieces))
            for first in range(len(TOKENS_NT))
            for pieces in reference.logits(first, TOKENS_NT[first : first + 1])
        ]
    )


def test_a_model_is_no_distance_from_itself(tiny_llama: LoadedModel) -> None:
    found = measure(tiny_llama.model, live_logits(tiny_llama), TOKENS_NT)
    assert found.kl_nats == pytest.approx(0, abs=1e-7)
    assert found.perplexity == found.reference_perplexity
    assert found.logits_cosine == pytest.approx(1)
    assert found.top1_agreement == 1
    assert found.tokens == 6 * 19


def test_measures_are_those_computed_directly(tiny_llama: LoadedModel, damaged: nn.Module) -> None:
    found = measure(damaged, live_logits(tiny_llama), TOKENS_NT)
    p, q = logits(tiny_llama.model), logits(damaged)
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    kl_NT = (log_p.exp() * (log_p - log_q)).sum(-1)
    taken = TOKENS_NT[:, 1:, None]
    expected = Fidelity(
        kl_nats=kl_NT.mean().item(),
        kl_standard_error=kl_NT.mean(dim=1).std().item() / 6**0.5,
        perplexity=(-log_q.gather(-1, taken)).mean().exp().item(),
        reference_perplexity=(-log_p.gather(-1, taken)).mean().exp().item(),
        logits_cosine=torch.cosine_similarity(p, q, dim=-1).mean().item(),
        top1_agreement=(p.argmax(-1) == q.argmax(-1)).double().mean().item(),
        tokens=6 * 19,
    )
    assert expected.kl_nats > 0.01
    for name in Fidelity.__dataclass_fields__:
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-4), name


@pytest.mark.parametrize("load", [load_model, open_model])
@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neo", "llama", "mixtral", "opt"])
def test_stored_logits_are_those_of_the_model_as_it_was(
    model_directory: Callable[[str], Path], tmp_path: Path, architecture: str, load: Load
) -> None:
    """To the bit, after its layers were overwritten and its tables exchanged; those stay as they now are."""
    loaded = load(find_model(str(model_directory(architecture))))
    before = window_logits(live_logits(loaded))
    stored = stored_logits(loaded, TOKENS_NT, tmp_path / "hidden.f32")
    if loaded.offload is None:
        for layer in loaded.layers:
            loaded.model.get_submodule(layer.name).weight.data.zero_()
    tables = loaded.model.get_input_embeddings(), loaded.model.get_output_embeddings()
    for table in tables:
        table.weight = nn.Parameter(torch.full_like(table.weight, 0.1), requires_grad=False)
    assert torch.equal(window_logits(stored), before)
    assert all((table.weight == 0.1).all() for table in tables)


def test_stored_logits_measure_as_live_ones_do(
    tiny_llama: LoadedModel, damaged: nn.Module, tmp_path: Path
) -> None:
    live = measure(damaged, live_logits(tiny_llama), TOKENS_NT)
    stored = stored_logits(tiny_llama, TOKENS_NT, tmp_path / "hidden.f32")
    assert measure(damaged, stored, TOKENS_NT) == live


def test_one_window_has_no_standard_error(tiny_llama: LoadedModel) -> None:
    found = measure(tiny_llama.model, live_logits(tiny_llama), TOKENS_NT[:1])
    assert found.kl_standard_error != found.kl_standard_error


def test_on_its_own_samples_the_original_has_the_lower_perplexity(
    tiny_llama: LoadedModel, damaged: nn.Module
) -> None:
    found = measure(damaged, live_logits(tiny_llama), sample_tokens(tiny_llama, 1024, 3))
    assert found.reference_perplexity < found.perplexity


def test_progress_counts_every_window(tiny_llama: LoadedModel) -> None:
    seen: list[tuple[int, int]] = []

    def note(stage: str, done: int, total: int) -> None:
        seen.append((done, total))

    measure(tiny_llama.model, live_logits(tiny_llama), TOKENS_NT, note)
    assert seen == sorted(set(seen))
    assert seen[-1] == (6, 6)


def test_speed_is_a_positive_number(tiny_llama: LoadedModel) -> None:
    assert tokens_per_second(tiny_llama, new_tokens=4) > 0
