"""Blocks in memory only while they run.

What lives here: reading a block's weights just before it is called and dropping them right after, so that a model of
any depth takes the memory of one block (and of what lies outside the blocks: embeddings, norms, the head). A backward
pass keeps what it needs alive by itself. Where the weights are stored is the caller's: it gives a function.

On a GPU, a small model stays there whole: reading 18 blocks of 11 MB for every batch took longer than running them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Read = Callable[[str], Tensor]
Replaced = Callable[[str], Tensor | None]
"""A parameter that stands in for the model's own for a while, by its full name; `None` where none does."""
RESIDENT_SHARE = 1 / 32
"""A model stays on a GPU whole, in float32, where it takes no larger a share of its memory."""


class Offload:
    """Keeps the parameters of `block_names` off memory between calls; all else is read to `device` at once.

    model: its parameters may be on the meta device. read: a parameter by its full name. Computes in float32.
    """

    def __init__(
        self, model: PreTrainedModel, block_names: Sequence[str], read: Read, device: torch.device
    ) -> None:
        self._read, self._device, self._model = read, device, model
        self._resident: nn.Module | None = None
        self.held: dict[str, Tensor] = {}
        """Parameters that are on the device already, as they are stored."""
        self.is_resident = _fits(model, device)
        self._own: dict[str, Tensor] = {}
        """The model's own parameters of blocks, in float32, where the model stays on the GPU."""
        self._replaced: Replaced = _none
        self._others: dict[str, Tensor] = {}
        """Likewise those that stand in for them now."""
        inside = tuple(f"{name}." for name in block_names)
        stored = model.state_dict().keys() - model.all_tied_weights_keys.keys()
        parameters = {name for name, _ in model.named_parameters()}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.startswith(inside) and name in parameters:
                continue
            if name in stored:
                _put(model, name, self._value(name))
            elif not tensor.is_meta:
                _put(model, name, tensor.to(device))
        model.tie_weights()
        for name in block_names:
            block = model.get_submodule(name)
            _drop(block)
            block.register_forward_pre_hook(self._fetching(name))
            block.register_forward_hook(self._dropping)

    @contextmanager
    def replacing(self, replaced: Replaced) -> Iterator[None]:
        """While open, these parameters of blocks stand in for the model's own."""
        before = self._replaced, self._others
        self._replaced, self._others = replaced, {}
        try:
            yield
        finally:
            self._replaced, self._others = before

    def brought(self, block_name: str) -> dict[str, Tensor]:
        """The parameters of a block, on the device as they are stored."""
        names = [f"{block_name}.{key}" for key, _ in self._model.get_submodule(block_name).named_parameters()]
        return {name: self._read(name).to(self._device) for name in names}

    @torch.inference_mode(False)
    def _value(self, name: str) -> Tensor:
        """Kept for gradients too, which no tensor made in inference mode may enter."""
        if name in self._others:
            return self._others[name]
        other = self._replaced(name)
        if other is not None:
            return self._kept(self._others, name, other)
        if name in self._own:
            return self._own[name]
        return self._kept(self._own, name, self.held[name] if name in self.held else self._read(name))

    def _kept(self, where: dict[str, Tensor], name: str, stored: Tensor) -> Tensor:
        """On the device, in float32, and kept there where the model is."""
        value = stored.to(self._device)
        value = value.float() if value.is_floating_point() else value
        if self.is_resident:
            where[name] = value
        return value

    def _fetching(self, block_name: str) -> Callable[..., None]:
        def fetch(block: nn.Module, arguments: Any) -> None:
            if self._resident is not None:
                _drop(self._resident)
            self._resident = block
            for key, _ in list(block.named_parameters()):
                _put(block, key, self._value(f"{block_name}.{key}"))

        return fetch

    def _dropping(self, block: nn.Module, arguments: Any, output: Any) -> None:
        _drop(block)
        self._resident = None


def _none(name: str) -> None:
    """Nothing is replaced."""


def _fits(model: nn.Module, device: torch.device) -> bool:
    """Whether the whole model is small beside the memory of a GPU."""
    if device.type != "cuda":
        return False
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    return size <= RESIDENT_SHARE * torch.cuda.get_device_properties(device).total_memory


def _drop(block: nn.Module) -> None:
    for key, parameter in list(block.named_parameters()):
        _put(block, key, torch.empty_like(parameter, device="meta"))


def _put(root: nn.Module, name: str, value: Tensor) -> None:
    owner, _, key = name.rpartition(".")
    module = root.get_submodule(owner)
    if key in module._parameters:
        module._parameters[key] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[key] = value
