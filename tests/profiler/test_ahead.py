"""What is read ahead is what would have been read, and is dropped when its block is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from profiler.execution.prefetch import Ahead
from profiler.model.checkpoint import find_model
from profiler.model.layers import LoadedModel, open_model
from profiler.statistics.moments import BlockInputs

on_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def written_inputs(folder: Path, blocks: int) -> list[BlockInputs]:
    inputs = [BlockInputs(folder / f"inputs-{index}", (5, 4, 8)) for index in range(blocks)]
    for index, block in enumerate(inputs):
        block.write(0, torch.full((5, 4, 8), float(index)) + torch.arange(5.0)[:, None, None])
    return inputs


def test_inputs_that_are_held_come_in_the_batches_in_which_they_are_read(tmp_path: Path) -> None:
    (block,) = written_inputs(tmp_path, 1)
    cpu = torch.device("cpu")
    read = [(first, batch.clone()) for first, batch in block.batches(2, cpu)]
    block.held = block.brought(cpu)
    for (first, batch), (expected_first, expected) in zip(block.batches(2, cpu), read, strict=True):
        assert first == expected_first and torch.equal(batch, expected)


def test_on_a_cpu_nothing_is_read_ahead(tiny_llama: LoadedModel, tmp_path: Path) -> None:
    inputs = written_inputs(tmp_path, 2)
    with Ahead(tiny_llama, inputs) as ahead:
        ahead.bring(1)
        with ahead.held(1):
            assert inputs[1].held is None


def test_offloaded_parameters_that_are_held_are_not_read_again(
    model_directory: Callable[[str], Path],
) -> None:
    loaded = open_model(find_model(str(model_directory("llama"))))
    offload, name = loaded.offload, loaded.block_names[0]
    assert offload is not None
    layer = loaded.layers_of(0)[0]
    stored = offload.brought(name)
    assert torch.equal(stored[f"{layer.name}.weight"].float(), loaded.weight(layer))
    offload.held = {key: value * 2 for key, value in stored.items()}
    assert torch.equal(loaded.weight(layer), stored[f"{layer.name}.weight"].float() * 2)
    offload.held = {}
    assert torch.equal(loaded.weight(layer), stored[f"{layer.name}.weight"].float())


@on_card
def test_on_cuda_the_next_block_is_held_while_it_is_measured_and_dropped_then(
    model_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    loaded = open_model(find_model(str(model_directory("llama"))), "cuda")
    inputs = written_inputs(tmp_path, 2)
    assert loaded.offload is not None
    with Ahead(loaded, inputs) as ahead:
        ahead.bring(1)
        with ahead.held(1):
            assert inputs[1].held is not None and inputs[1].held.is_cuda
            assert inputs[1].held.cpu()[0, 0, 0] == 1
            assert set(loaded.offload.held) >= {f"{layer.name}.weight" for layer in loaded.layers_of(1)}
        assert inputs[1].held is None and not loaded.offload.held


@on_card
def test_on_cuda_what_reading_raises_is_raised_where_it_is_needed(
    model_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    loaded = open_model(find_model(str(model_directory("llama"))), "cuda")
    missing = [BlockInputs(tmp_path / "nowhere", (5, 4, 8))] * 2
    with Ahead(loaded, missing) as ahead:
        ahead.bring(1)
        with pytest.raises(FileNotFoundError), ahead.held(1):
            pass
