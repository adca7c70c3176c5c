"""Published recipes for rank at fixed bits: so much for the most sensitive blocks, so much for the others.

What lives here: what each recipe gives a block. Taking the options is `strategies.by_recipe`; where a block's
sensitivity comes from is the caller's. Ranks are for a hidden size of 1536 and scale with the model's.

Only the ranks of `ultra` were published; those of the others are our reading of their names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from allocator.errors import StrategyError

PUBLISHED_WIDTH = 1536
UNIFORM_RANK = 64
LADDERS = {
    "uniform-rank": ((), UNIFORM_RANK),
    "fidelity": ((256, 256, 256, 256), 64),
    "aggressive": ((256, 256), 48),
    "ultra": ((256, 256, 128, 128), 40),
    "extreme": ((384, 128, 128, 128), 32),
}
"""Ranks of the most sensitive blocks, in order, and of all others."""
TIERED = {"critical": 192, "high": 96, "low": 48}
"""Ranks by tier of fidelity."""
RECIPES = (*LADDERS, "tiered", "proportional")


@dataclass(frozen=True, slots=True)
class Sensitivities:
    """By block: how much a probe compression of it costs (any unit), and its tier (critical, high or low)."""

    value_B: tuple[float, ...]
    tier_B: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe by name, and the bits that it fixes."""

    name: str
    bits: int = 3

    @property
    def needs_sensitivities(self) -> bool:
        return self.name != "uniform-rank"

    def ranks(self, width: int, blocks: int, found: Sensitivities | None) -> tuple[int, ...]:
        """The rank of every block of a model with hidden size `width`. Raises `StrategyError`."""
        published = self._published(blocks, found)
        return tuple(max(1, round(rank * width / PUBLISHED_WIDTH)) for rank in published)

    def _published(self, blocks: int, found: Sensitivities | None) -> Sequence[float]:
        if not self.needs_sensitivities:
            return [UNIFORM_RANK] * blocks
        if found is None:
            raise StrategyError(
                f"strategy {self.name} goes by the fidelity of blocks, and the profile has no fidelity.json;"
                " profile the model again"
            )
        if len(found.value_B) != blocks:
            raise StrategyError(
                f"the fidelity is of {len(found.value_B)} blocks and the model has {blocks}; profile the model again"
            )
        if self.name == "tiered":
            return [TIERED[tier] for tier in found.tier_B]
        value_B = np.array(found.value_B)
        if self.name == "proportional":
            return list(UNIFORM_RANK * value_B / value_B.mean()) if value_B.any() else [UNIFORM_RANK] * blocks
        first, rest = LADDERS[self.name]
        rank_B = np.full(blocks, rest)
        most = np.argsort(-value_B, kind="stable")[: len(first)]
        rank_B[most] = first[: len(most)]
        return rank_B.tolist()
