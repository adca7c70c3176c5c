"""A model with parts of it replaced for a while: some layers' weights, or the blocks before some depth.

What lives here: substituting weights and entering the model at a depth; both leave it as they found it. What to replace
with is for `fidelity.py` and `cliff.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.nn.linear import weight_of
from profiler.model.layers import Layer, LoadedModel

Weights = Mapping[Layer, Tensor]
"""W (O, I) of some layers."""


@contextmanager
def substituted(loaded: LoadedModel, weights: Weights) -> Iterator[None]:
    """While open, the model has these weights, whether it is whole in memory or read block by block."""
    if loaded.offload is not None:
        with loaded.replacing(weights.get):
            yield
        return
    stored = {layer: weight_of(loaded.model.get_submodule(layer.name)) for layer in weights}
    originals = {layer: weight.clone() for layer, weight in stored.items()}
    try:
        for layer, w_OI in weights.items():
            stored[layer].copy_(w_OI.T if layer.transposed else w_OI)
        yield
    finally:
        for layer, original in originals.items():
            stored[layer].copy_(original)


class _StandIn(nn.Module):
    """Answers for a block: gives hidden states instead of running it, and has its attributes."""

    def __init__(self, block: nn.Module, output: Any) -> None:
        super().__init__()
        self.__dict__["_block"], self.__dict__["_output"] = block, output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return self._output


@dataclass(frozen=True, slots=True)
class Continuation:
    """The model from some depth on. `tuples`: its blocks return a tuple that begins with the hidden states."""

    loaded: LoadedModel
    tuples: bool

    @classmethod
    def of(cls, loaded: LoadedModel) -> Continuation:
        seen: list[bool] = []
        handle = loaded.blocks[0].register_forward_hook(
            lambda *call: seen.append(isinstance(call[-1], tuple))
        )
        try:
            with torch.inference_mode():
                loaded.model(torch.zeros(1, 1, dtype=torch.int64, device=loaded.device), use_cache=False)
        finally:
            handle.remove()
        return cls(loaded, seen[0])

    @torch.inference_mode()
    def logits(self, depth: int, hidden_NTd: Tensor, tokens_NT: Tensor) -> Tensor:
        """float32 (N, T, V), given the hidden states that leave the first `depth` blocks, one at least.

        Those blocks are neither read nor run; the model itself runs the others, with its own masks and positions.
        """
        blocks = self.loaded.blocks[:depth]
        siblings = self.loaded.model.get_submodule(self.loaded.block_names[0].rpartition(".")[0])
        assert isinstance(siblings, nn.ModuleList)
        output = (hidden_NTd, None) if self.tuples else hidden_NTd
        try:
            for index, block in enumerate(blocks):
                siblings[index] = _StandIn(block, output)
            logits_NTV: Tensor = self.loaded.model(tokens_NT.to(self.loaded.device), use_cache=False).logits
            return logits_NTV.float()
        finally:
            for index, block in enumerate(blocks):
                siblings[index] = block
