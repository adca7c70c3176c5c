"""Layer names as regular expressions, each matching exactly the layers it is made for.

What lives here: merging names that differ in the block number, so that a plan of hundreds of layers reads as a few
lines: `model\\.layers\\.(0|2|3)\\.mlp\\.(gate_proj|up_proj)`. Globs, which can override each other, are in
`pattern_overrides.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from allocator.plan import Plan
from allocator.storage import KEEP_BITS

NUMBERED = re.compile(r"(?P<head>(?:.*?\.)?)(?P<block>\d+)\.(?P<tail>.+)")
"""A name around its first whole number between dots, which is the block's."""
NOT_LINEAR = ("norm", "embed")
"""Parts of the names of kept tensors that belong to no linear layer."""


def merged(names: Iterable[str]) -> list[str]:
    """Regular expressions, without `^` and `$`, that together match `names` and no other layer, in order."""
    blocks_of: dict[tuple[str, str], list[str]] = {}
    alone = []
    for name in names:
        match = NUMBERED.fullmatch(name)
        if match is None:
            alone.append(re.escape(name))
            continue
        blocks_of.setdefault((match["head"], match["tail"]), []).append(match["block"])
    tails_of: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (head, tail), blocks in blocks_of.items():
        tails_of.setdefault((head, tuple(blocks)), []).append(tail)
    return alone + [
        rf"{re.escape(head)}{any_of(blocks)}\.{any_of(map(re.escape, tails))}"
        for (head, blocks), tails in tails_of.items()
    ]


def any_of(parts: Iterable[str]) -> str:
    """One of several regular expressions."""
    found = list(parts)
    return found[0] if len(found) == 1 else f"({'|'.join(found)})"


def by_scheme(plan: Plan) -> dict[tuple[int, int], list[str]]:
    """Names of the quantized layers by (bits, group size), fewest bits first."""
    found: dict[tuple[int, int], list[str]] = {}
    for name, layer in plan.layers.items():
        if 0 < layer.bits < KEEP_BITS:
            found.setdefault((layer.bits, layer.group_size), []).append(name)
    return dict(sorted(found.items()))


def unquantized(layers: Iterable[str], kept: Mapping[str, int]) -> list[str]:
    """Regular expressions of the linear layers that stay as they are: `layers`, the head, and what is kept beside."""
    beside = [name.removesuffix(".weight") for name in kept if name.endswith(".weight")]
    linear = [name for name in beside if not any(part in name for part in NOT_LINEAR)]
    return merged(dict.fromkeys([*layers, *linear, "lm_head"]))
