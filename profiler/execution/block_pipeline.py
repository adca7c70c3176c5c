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

from compressor.checkpoint_writer import BlockWork, LayerWork
from profiler.model.layers import LoadedModel
from profiler.statistics.moments import BlockCalls, BlockInputs, TokenWeights, block_calls, input_moments


def block_works(
    loaded: LoadedModel, tokens_NT: Tensor, weights: TokenWeights | None, folder: Path
) -> Iterator[BlockWork]:
    """One `BlockWork` per block, in order; `folder` holds the activations meanwhile.

    weights: of these tokens, as the profile keeps them; `None` for a profile that has none.
    """
    calls = block_calls(loaded, tokens_NT)
    current = first_inputs(loaded, tokens_NT, folder / "inputs-0.f32")
    for index in range(len(loaded.block_names)):
        following = BlockInputs(folder / f"inputs-{(index + 1) % 2}.f32", current.shape)
        yield _block_work(loaded, index, calls, current, weights, following)
        current = following


def _block_work(
    loaded: LoadedModel,
    index: int,
    calls: BlockCalls,
    current: BlockInputs,
    weights: TokenWeights | None,
    following: BlockInputs,
) -> BlockWork:
    moments = input_moments(loaded, index, calls, current, weights, following)

    def layers() -> list[LayerWork]:
        return [
            LayerWork(
                name=moment.layer.name,
                weight_OI=loaded.weight(moment.layer),
                hessian_II=moment.hessian_II,
                stored=loaded.stored_weight(moment.layer),
            )
            for moment in moments
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
