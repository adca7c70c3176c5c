"""The allocation problem: a menu of priced options per layer, and the knapsack made from it.

What lives here: `Menu` (named layers, options with bytes, error and cost), `Problem` (the same as flat numbers,
all a solver sees) and `Solution` (what a solver returns). Solvers live in `knapsack.py` and `convex.py`.

Shapes: G groups (layers), N options over all groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from allocator.errors import InvalidProblemError
from allocator.storage import KEEP, Option

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
TableRole = Literal["embedding", "head", "tied"]
"""What a table, vocabulary × hidden, does: looks tokens up, scores them, or both with the same weights."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A multiple-choice knapsack: choose one option per group, minimise Σ cost, Σ size ≤ budget.

    cost (N,) float64, in any unit; size (N,) int64 bytes; start (G+1,) int64: the options of group g are
    `start[g]:start[g+1]`; budget_bytes counts the groups alone, without kept tensors.
    """

    cost: Floats
    size: Integers
    start: Integers
    budget_bytes: int

    def __post_init__(self) -> None:
        if not np.issubdtype(self.size.dtype, np.integer):
            raise InvalidProblemError(f"sizes must be whole bytes, got {self.size.dtype}; round them first")
        if (
            self.start.ndim != 1
            or len(self.start) < 2
            or self.start[0] != 0
            or self.start[-1] != len(self.cost)
        ):
            raise InvalidProblemError(
                "start must run from 0 to the number of options over at least one group"
            )
        empty = np.flatnonzero(np.diff(self.start) < 1)
        if len(empty):
            raise InvalidProblemError(f"group {empty[0]} has no option; every layer needs at least one")
        if len(self.size) != len(self.cost):
            raise InvalidProblemError(f"{len(self.cost)} costs but {len(self.size)} sizes; they go in pairs")
        if not np.isfinite(self.cost).all():
            bad = int(np.flatnonzero(~np.isfinite(self.cost))[0])
            raise InvalidProblemError(f"option {bad} has cost {self.cost[bad]}; costs must be finite")
        if (self.size < 0).any():
            bad = int(np.flatnonzero(self.size < 0)[0])
            raise InvalidProblemError(f"option {bad} has {self.size[bad]} bytes; sizes cannot be negative")

    @property
    def group_count(self) -> int:
        return len(self.start) - 1


@dataclass(frozen=True, slots=True)
class Solution:
    """What a solver returns, with its certificate.

    choice (G,) int64: the option taken, counted within its group. lower_bound: no feasible choice costs less.
    gap = cost − lower_bound, same unit as cost. proven: the choice is optimal (gap is zero within the documented
    tolerance). shadow_price: cost saved per further byte, at the break of the linear relaxation.
    """

    choice: Integers
    cost: float
    total_bytes: int
    lower_bound: float
    gap: float
    proven: bool
    shadow_price: float


@dataclass(frozen=True, slots=True)
class LayerMenu:
    """The options of one layer. `total_bytes` int64, `error` (relative squared output error) and `cost`
    (predicted KL, nats/token) float64, all of the length of `options`. table: its role where it is one."""

    name: str
    rows: int
    columns: int
    original_bytes: int
    options: tuple[Option, ...]
    total_bytes: Integers
    error: Floats
    cost: Floats
    table: TableRole | None = None

    @property
    def weights(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class Menu:
    """Every layer's options, tables last, and the tensors that no option touches (`kept`, bytes by name)."""

    layers: tuple[LayerMenu, ...]
    kept: dict[str, int]

    @cached_property
    def kept_bytes(self) -> int:
        return sum(self.kept.values())

    @cached_property
    def original_bytes(self) -> int:
        return self.kept_bytes + sum(layer.original_bytes for layer in self.layers)

    @cached_property
    def smallest_bytes(self) -> int:
        """Bytes of the whole checkpoint with every layer at its smallest option."""
        return self.kept_bytes + sum(int(layer.total_bytes.min()) for layer in self.layers)

    @cached_property
    def compressible_weights(self) -> int:
        return sum(layer.weights for layer in self.layers)

    @cached_property
    def tables(self) -> dict[str, TableRole]:
        """The roles of the layers that are tables, by name."""
        return {layer.name: layer.table for layer in self.layers if layer.table}

    def without_tables(self) -> Menu:
        """The same model with its tables among what no option touches."""
        kept = {f"{layer.name}.weight": layer.original_bytes for layer in self.layers if layer.table}
        return Menu(tuple(layer for layer in self.layers if not layer.table), self.kept | kept)

    def with_tables_kept(self, choice: Integers) -> Integers:
        """The choice (G,) that is `choice` for the layers of `without_tables` and keeps every table."""
        kept = [layer.options.index(KEEP) for layer in self.layers if layer.table]
        return np.append(choice, np.array(kept, dtype=np.int64))

    def problem(self, total_bytes: int) -> Problem:
        """The knapsack in which the whole checkpoint may take `total_bytes`."""
        counts = [len(layer.options) for layer in self.layers]
        return Problem(
            cost=np.concatenate([layer.cost for layer in self.layers]),
            size=np.concatenate([layer.total_bytes for layer in self.layers]),
            start=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            budget_bytes=total_bytes - self.kept_bytes,
        )
