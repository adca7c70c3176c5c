"""A model read block by block: the same numbers as the whole one, one block in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from profiler.model import offload
from profiler.model.checkpoint import find_model
from profiler.model.layers import LoadedModel, load_model, open_model

ARCHITECTURES = ("gpt2", "gpt_neo", "llama", "mixtral", "opt")
TOKENS_NT = torch.randint(128, (2, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=ARCHITECTURES)
def both(
    request: pytest.FixtureRequest, model_directory: Callable[[str], Path]
) -> tuple[LoadedModel, LoadedModel]:
    ref = find_model(str(model_directory(request.param)))
    return open_model(ref), load_model(ref)


def in_memory(block: nn.Module) -> list[str]:
    return [
        name for name, parameter in block.named_parameters() if not parameter.is_meta and parameter.numel()
    ]


@torch.no_grad()
def test_logits_are_those_of_the_whole_model(both: tuple[LoadedModel, LoadedModel]) -> None:
    opened, whole = (loaded.model(TOKENS_NT, use_cache=False).logits for loaded in both)
    assert torch.equal(opened, whole)


def test_weights_and_kept_tensors_are_those_of_the_whole_model(both: tuple[LoadedModel, LoadedModel]) -> None:
    opened, whole = both
    assert opened.storage_dtype == whole.storage_dtype
    assert opened.layers == whole.layers
    for layer in opened.layers:
        assert torch.equal(opened.weight(layer), whole.weight(layer))
    kept = dict(whole.kept_tensors())
    found = dict(opened.kept_tensors())
    assert found.keys() == kept.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in kept.items())


@torch.no_grad()
def test_one_block_is_in_memory_at_a_time(both: tuple[LoadedModel, LoadedModel]) -> None:
    opened, _ = both
    seen: list[int] = []

    def look(block: nn.Module, arguments: object) -> None:
        seen.append(sum(bool(in_memory(other)) for other in opened.blocks))

    opened.blocks[1].register_forward_pre_hook(look)
    opened.model(TOKENS_NT, use_cache=False)
    assert seen == [1]
    assert not any(in_memory(block) for block in opened.blocks)


@torch.no_grad()
def test_replaced_weights_are_used_while_they_are_replaced(both: tuple[LoadedModel, LoadedModel]) -> None:
    opened, whole = both
    before = opened.model(TOKENS_NT, use_cache=False).logits
    with opened.replacing(lambda layer: 0.5 * opened.weight(layer)):
        halved = opened.model(TOKENS_NT, use_cache=False).logits
    for layer in whole.layers:
        whole.model.get_submodule(layer.name).weight.mul_(0.5)
    assert torch.equal(halved, whole.model(TOKENS_NT, use_cache=False).logits)
    assert torch.equal(opened.model(TOKENS_NT, use_cache=False).logits, before)


def test_a_block_left_in_the_middle_of_a_call_is_dropped_by_the_next(
    model_directory: Callable[[str], Path],
) -> None:
    opened = open_model(find_model(str(model_directory("llama"))))

    def stop(block: nn.Module, arguments: object) -> None:
        raise KeyboardInterrupt

    handle = opened.blocks[0].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        opened.model(TOKENS_NT, use_cache=False)
    handle.remove()
    opened.model(TOKENS_NT, use_cache=False)
    assert not any(in_memory(block) for block in opened.blocks)


def test_a_model_that_stays_in_memory_is_the_same_for_gradients_after_inference(
    model_directory: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "_fits", lambda model, device: True)
    opened = open_model(find_model(str(model_directory("llama"))))
    assert opened.stays_in_memory
    tokens_NT = torch.arange(16)[None]
    with torch.inference_mode():
        expected_NTV = opened.model(tokens_NT).logits.clone()
    hidden_NTd = opened.model.get_input_embeddings()(tokens_NT).detach().requires_grad_()
    found_NTV = opened.model(inputs_embeds=hidden_NTd).logits
    found_NTV.sum().backward()
    assert hidden_NTd.grad is not None
    assert hidden_NTd.grad.abs().sum() > 0
    torch.testing.assert_close(found_NTV.detach(), expected_NTV, rtol=1e-5, atol=1e-5)


def test_only_what_is_replaced_is_read_again(
    model_directory: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "_fits", lambda model, device: True)
    opened = open_model(find_model(str(model_directory("llama"))))
    tokens_NT = torch.arange(16)[None]
    first = opened.layers[0]
    with torch.no_grad():
        before_NTV = opened.model(tokens_NT).logits
        with opened.replacing(lambda layer: 0 * opened.weight(layer) if layer == first else None):
            replaced_NTV = opened.model(tokens_NT).logits
        after_NTV = opened.model(tokens_NT).logits
    assert not torch.equal(before_NTV, replaced_NTV)
    assert torch.equal(before_NTV, after_NTV)
