"""A model read block by block: the same numbers as the whole one, one block in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from profiler.checkpoint import find_model
from profiler.layers import LoadedModel, load_model, open_model

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
