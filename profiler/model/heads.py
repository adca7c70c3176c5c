"""Attention heads: which rows or columns of which layers belong to which head.

What lives here: finding the query, key, value and output projections by name and cutting them by the configuration's
head counts, grouped-query attention included. Fused projections are cut where they are stacked as GPT-2 stacks them
(all queries, all keys, all values); other fusions are left whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from profiler.model.layers import Layer, LoadedModel

ROLES = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "out_proj": "o",
    "query": "q",
    "key": "k",
    "value": "v",
    "c_attn": "qkv",
}


@dataclass(frozen=True, slots=True)
class Head:
    """One head's part of a layer: `width` rows from `first` on, or columns for the output projection `o`."""

    role: str
    index: int
    first: int
    width: int

    def cut(self, w_OI: Tensor) -> Tensor:
        """The head's part of W, a view: (width, I), or (O, width) for the output projection."""
        where = slice(self.first, self.first + self.width)
        return w_OI[:, where] if self.role == "o" else w_OI[where]


def kind_of(projection: str) -> str:
    """A projection without the number of its expert, so that experts are of one kind."""
    return re.sub(r"\.\d+\.", ".*.", projection)


def role_of(layer: Layer) -> str | None:
    """q, k, v, o or qkv for a projection of the attention, else None."""
    name = layer.name.rpartition(".")[2]
    if name == "c_proj" and "attn" in layer.name:
        return "o"
    return ROLES.get(name)


def heads_of(loaded: LoadedModel, layer: Layer) -> tuple[Head, ...]:
    """The heads in a layer; none where it is no attention projection or does not divide into heads."""
    role = role_of(layer)
    if role is None:
        return ()
    return tuple(_heads(loaded, layer, role))


def separable_heads(loaded: LoadedModel, layer: Layer) -> int:
    """How many heads a query, key or value projection of its own has, one below the other; 1 for any other layer."""
    return max(1, len(heads_of(loaded, layer))) if role_of(layer) in ("q", "k", "v") else 1


def _heads(loaded: LoadedModel, layer: Layer, role: str) -> Iterator[Head]:
    config = loaded.model.config.get_text_config()
    queries = int(config.num_attention_heads)
    groups = int(getattr(config, "num_key_value_heads", None) or queries)
    side = layer.columns if role == "o" else layer.rows
    counts = {"q": [queries], "k": [groups], "v": [groups], "o": [queries], "qkv": [queries, groups, groups]}[
        role
    ]
    width = getattr(config, "head_dim", None) or side // sum(counts)
    if width * sum(counts) != side:
        return
    first = 0
    for part, count in zip(role, counts, strict=True):
        for index in range(count):
            yield Head(part, index, first, width)
            first += width
