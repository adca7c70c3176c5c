"""One step of drawing text from a model: the next token of every window in, the logits after it out.

What lives here: the step as transformers runs it, and the same step recorded as a CUDA graph. At one token a window,
a card computes a step several times as fast as Python can ask for it, so on CUDA the step is asked for once and
replayed.

A recorded step reads and writes the same memory every time. Keys and values therefore lie in a cache as long as a
window, of which the part not reached yet is masked; layers that see a sliding window are masked too. On a CPU a step is
not recorded, but keys and values lie in fixed memory too: copying all of them to append one took a third of the time.

Letters: n windows, V vocabulary, h heads, T tokens, d size of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from profiler.model.checkpoint import ModelError

Step = Callable[[Tensor], Tensor]
"""Given the next token of every window, int64 (n, 1), the logits after it, (n, V)."""
WARM_UPS = 2
"""Calls before a step is recorded, in which libraries take the memory that they keep."""


def eager_step(model: PreTrainedModel, cache: Cache | None = None) -> Step:
    """The step as transformers runs it, from the start of every window; cache: an empty one, or the model's own.

    It raises `ModelError` for a model that keeps no `past_key_values`.
    """

    def step(token_n1: Tensor) -> Tensor:
        nonlocal cache
        output = model(token_n1, past_key_values=cache, use_cache=True)
        if not hasattr(output, "past_key_values"):
            raise ModelError(
                f"{type(model).__name__} keeps no keys and values from which to go on with a text, so none is sampled;"
                " give --calibration FILE"
            )
        cache = output.past_key_values
        logits_nV: Tensor = output.logits[:, -1]
        return logits_nV

    return step


class AppendedLayer(DynamicLayer):
    """Keys and values of up to `length` tokens, appended in memory that is taken once and given as views of it."""

    def __init__(self, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in transformers
        self._length = length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._key_nhTd, self._value_nhTd = (
            states.new_empty(*states.shape[:-2], self._length, states.shape[-1])
            for states in (key_states, value_states)
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, *arguments: Any, **keywords: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        self._key_nhTd[:, :, start:end], self._value_nhTd[:, :, start:end] = key_states, value_states
        self.keys, self.values = self._key_nhTd[:, :, :end], self._value_nhTd[:, :, :end]
        return self.keys, self.values


def appended_step(model: PreTrainedModel, length: int) -> Step | None:
    """The step as transformers runs it, with keys and values appended in place.

    None where a model keeps anything else, or layers see less than a window of `length` tokens.
    """
    layers = plain_layers(model)
    if layers is None or any(getattr(layer, "sliding_window", length) < length for layer in layers):
        return None
    return eager_step(model, Cache([AppendedLayer(length) for _ in layers]))


def plain_layers(model: PreTrainedModel) -> list[DynamicLayer] | None:
    """The layers of the model's own cache; None where they are not of keys and values of every token."""
    start_11 = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    cache = getattr(model(start_11, use_cache=True), "past_key_values", None)
    plain = {DynamicLayer, DynamicSlidingWindowLayer}
    if not isinstance(cache, Cache) or not {type(layer) for layer in cache.layers} <= plain:
        return None
    return [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]


def static_cache(model: PreTrainedModel, length: int) -> Cache | None:
    """A cache of fixed memory for windows of `length` tokens; None as for `plain_layers`."""
    layers = plain_layers(model)
    return None if layers is None else Cache([StaticLayer(length) for _ in layers])


def recorded_step(model: PreTrainedModel, windows: int, length: int) -> Step | None:
    """The step recorded on CUDA, from the start of every window; None where it cannot be recorded.

    The logits are overwritten by the next step. Windows of `length` tokens at most.
    """
    cache = static_cache(model, length)
    if cache is None:
        return None
    token_n1 = torch.zeros(windows, 1, dtype=torch.int64, device=model.device)
    graph = torch.cuda.CUDAGraph()
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                model(token_n1, past_key_values=cache, use_cache=True)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            logits_nV: Tensor = model(token_n1, past_key_values=cache, use_cache=True).logits[:, -1]
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError):
        # A model that asks the card for a number in the middle of a step cannot be recorded.
        torch.cuda.synchronize()
        return None
    cache.reset()

    def step(next_n1: Tensor) -> Tensor:
        token_n1.copy_(next_n1)
        graph.replay()
        return logits_nV

    return step
