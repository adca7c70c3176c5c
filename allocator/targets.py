"""Targets: what the runtime that will serve a plan can execute, so that no plan is made that it cannot.

What lives here: the table of runtimes, and a menu restricted to one of them. The restricted menu goes through the
same strategies and solvers as any other; what layers must share is a constraint (`rules.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from allocator.constraints.rules import Constraints, tie_groups, tied_values
from allocator.errors import PlanError, StrategyError, TargetError
from allocator.export.ggml import NEAREST_GROUP_SIZE, TYPES
from allocator.problem import Integers, LayerMenu, Menu
from allocator.storage import KEEP_BITS, Option

TargetName = Literal["transformers", "vllm", "llm-compressor", "gptqmodel", "llama.cpp"]


@dataclass(frozen=True, slots=True)
class Target:
    """What a runtime executes. Keeping a layer at 16 bits is always possible.

    bits, group_sizes: of quantized layers; None is any. factor_bits, largest_rank: of the low-rank correction; rank 0
    is none at all. row_multiple, column_multiple: what its kernels need of a quantized matrix. whole_groups: a group
    must divide a row. fuses: q/k/v and gate/up become one matrix, so they share bits and group size. ggml: sizes are
    those of llama.cpp's types, and llama-quantize carries the plan out. rotates: it can rotate the inputs of a layer.
    tables: embeddings and heads can be compressed.
    """

    bits: tuple[int, ...] | None = None
    group_sizes: tuple[int, ...] | None = None
    factor_bits: tuple[int, ...] | None = None
    largest_rank: int | None = None
    row_multiple: int = 1
    column_multiple: int = 1
    whole_groups: bool = False
    fuses: bool = False
    ggml: bool = False
    rotates: bool = False
    tables: bool = False

    def executes(self, layer: LayerMenu, option: Option) -> bool:
        if option.bits == KEEP_BITS:
            return True
        if option.rotated and not self.rotates:
            return False
        if self.bits is not None and option.bits not in self.bits:
            return False
        if self.largest_rank is not None and option.rank > self.largest_rank:
            return False
        if option.rank and self.factor_bits is not None and option.factor_bits not in self.factor_bits:
            return False
        if self.group_sizes is not None and option.group_size not in self.group_sizes:
            return False
        if layer.rows % self.row_multiple or layer.columns % self.column_multiple:
            return False
        if self.ggml and not TYPES[option.bits].fits(layer.columns):
            return False
        return not self.whole_groups or layer.columns % option.group_size == 0

    def restricted(self, menu: Menu) -> Menu:
        """The options that this runtime executes, at the sizes it stores them in."""
        return replace(menu, layers=tuple(self._restricted_layer(layer) for layer in menu.layers))

    def _restricted_layer(self, layer: LayerMenu) -> LayerMenu:
        left = [index for index, option in enumerate(layer.options) if self.executes(layer, option)]
        options = tuple(layer.options[index] for index in left)
        sizes = layer.total_bytes[left]
        if self.ggml:
            sizes = np.array([_ggml_bytes(layer, option) for option in options], dtype=np.int64)
        return replace(
            layer, options=options, total_bytes=sizes, error=layer.error[left], cost=layer.cost[left]
        )

    def constrained(self, constraints: Constraints) -> Constraints:
        """The same constraints, and what layers must share in this runtime."""
        if not self.fuses:
            return constraints
        return replace(constraints, auto_ties=True, tie_group_sizes=True)


def _ggml_bytes(layer: LayerMenu, option: Option) -> int:
    if option.bits == KEEP_BITS:
        return layer.original_bytes
    return TYPES[option.bits].tensor_bytes(layer.rows, layer.columns)


VLLM = Target(
    bits=(4, 8),
    group_sizes=(32, 64, 128),
    factor_bits=(16,),
    largest_rank=512,
    row_multiple=64,
    column_multiple=128,
    whole_groups=True,
    fuses=True,
)
TARGETS: dict[TargetName, Target] = {
    "transformers": Target(rotates=True, tables=True),
    "vllm": VLLM,
    "llm-compressor": replace(VLLM, largest_rank=0),
    "gptqmodel": Target(
        bits=(2, 3, 4, 8),
        group_sizes=(32, 64, 128),
        largest_rank=0,
        row_multiple=32,
        column_multiple=32,
        whole_groups=True,
    ),
    "llama.cpp": Target(
        bits=(2, 3, 4, 5, 6, 8),
        group_sizes=(NEAREST_GROUP_SIZE,),
        largest_rank=0,
        ggml=True,
        tables=True,
    ),
}
"""By name. vllm: compressed-tensors with zero points and LoRA factors of 16 bits; llm-compressor: the same runtime,
without adapters; transformers: this product's own checkpoint, which runs every plan."""


def target_named(name: str) -> Target:
    """Raises `TargetError` listing the targets there are."""
    for known in get_args(TargetName):
        if name == known:
            return TARGETS[known]
    raise TargetError(f"target {name!r} is unknown; choose from {', '.join(TARGETS)}")


def check_fused(menu: Menu, choice: Integers, target: str, strategy: str) -> None:
    """Raise `StrategyError` where `choice` (G,) differs among layers that the target fuses into one matrix."""
    required = target_named(target).constrained(Constraints())
    if not required.auto_ties:
        return
    taken = tuple(layer.options[index] for layer, index in zip(menu.layers, choice.tolist(), strict=True))
    shared = tied_values(taken, required)
    for group in tie_groups(menu, required):
        if len(set(shared[group].tolist())) > 1:
            names = " and ".join(repr(menu.layers[index].name) for index in group)
            raise StrategyError(
                f"strategy {strategy} gives {names} different bits or group sizes, and {target} fuses them;"
                " plan with the strategy optimal"
            )


def check_tables(menu: Menu, target: str) -> None:
    """Raise `TargetError` where `menu` offers tables and the target holds none compressed."""
    if menu.tables and not target_named(target).tables:
        raise TargetError(
            f"target {target} holds embeddings and output heads at 16 bits only; plan without --embeddings"
        )


def check_compressible(target: str | None) -> None:
    """Raise `PlanError` when a plan for this target is carried out by another tool than `bitrank compress`."""
    if target is not None and target_named(target).ggml:
        raise PlanError(
            f"the plan is for {target}, whose own types are not written here; run the command that"
            " `bitrank export PLAN --format llama-quantize` prints, or plan again without --target"
        )
