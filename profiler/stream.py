"""The stream of blocks that the worker consumes: weights and Hessians, one block in memory at a time.

What lives here: the forward pass over the calibration windows, block by block through two files, so that memory does
not grow with the model's depth. Hessians come out as the profile measured with.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.worker import BlockWork, LayerWork
from profiler.calibration import BlockCalls, BlockInputs, block_calls, input_moments
from profiler.layers import LoadedModel


def block_works(loaded: LoadedModel, tokens_NT: Tensor, folder: Path) -> Iterator[BlockWork]:
    """One `BlockWork` per block, in order; `folder` holds the activations meanwhile."""
    calls = block_calls(loaded, tokens_NT)
    current = first_inputs(loaded, tokens_NT, folder / "inputs-0.f32")
    for index in range(len(loaded.block_names)):
        following = BlockInputs(folder / f"inputs-{(index + 1) % 2}.f32", current.shape)
        yield _block_work(loaded, index, calls, current, following)
        current = following


def _block_work(
    loaded: LoadedModel,
    index: int,
    calls: BlockCalls,
    current: BlockInputs,
    following: BlockInputs,
) -> BlockWork:
    moments = input_moments(loaded, index, calls, current, following)

    def layers() -> list[LayerWork]:
        return [
            LayerWork(
                name=layer.name,
                weight_OI=loaded.weight(layer),
                hessian_II=moment.hessian_II,
                stored=loaded.stored_weight(layer),
            )
            for moment in moments
            for layer in moment.layers
        ]

    return BlockWork(index, layers)


class _Captured(Exception):
    """Ends a forward pass at the first block."""


@torch.no_grad()
def first_inputs(loaded: LoadedModel, tokens_NT: Tensor, path: Path) -> BlockInputs:
    """The first block's input for every window, without running the blocks."""
    seen: list[Tensor] = []

    def capture(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        seen.append(arguments[0] if arguments else keywords["hidden_states"])
        raise _Captured

    handle = loaded.blocks[0].register_forward_pre_hook(capture, with_kwargs=True)
    inputs = None
    try:
        batch = loaded.windows_per_batch
        for first in range(0, len(tokens_NT), batch):
            try:
                loaded.model(tokens_NT[first : first + batch].to(loaded.device), use_cache=False)
            except _Captured:
                hidden_NTd = seen.pop()
            if inputs is None:
                inputs = BlockInputs(path, (*tokens_NT.shape, hidden_NTd.shape[-1]))
            inputs.write(first, hidden_NTd)
    finally:
        handle.remove()
    assert inputs is not None
    return inputs
