"""What a format cannot hold, as errors that say what to do instead."""

from __future__ import annotations

from collections.abc import Collection

from allocator.errors import ExportError
from allocator.plan import Plan
from allocator.storage import KEEP_BITS


def refuse_ranks(plan: Plan, tool: str, advice: str) -> None:
    """Raise `ExportError` when the plan buys rank, which `tool` cannot carry."""
    ranked = [name for name, layer in plan.layers.items() if layer.rank]
    if ranked:
        raise ExportError(
            f"{tool} cannot carry low-rank corrections, and the plan buys them for {len(ranked)} layers, the first"
            f" {ranked[0]} (rank {plan.layers[ranked[0]].rank}); {advice}"
        )


def refuse_rotations(plan: Plan) -> None:
    """Raise `ExportError` when the plan rotates inputs: packed codes cannot be turned back, and no other runtime turns
    its activations."""
    rotated = [name for name, layer in plan.layers.items() if layer.rotated]
    if rotated:
        raise ExportError(
            f"the plan rotates the inputs of {len(rotated)} layers, the first {rotated[0]}, and other runtimes cannot;"
            " plan again with --target, or serve the checkpoint with `import compressor.plugin`"
        )


def refuse_heads(plan: Plan, tool: str, advice: str) -> None:
    """Raise `ExportError` when heads have factors of their own, which `tool` cannot say."""
    headed = [name for name, layer in plan.layers.items() if layer.heads > 1]
    if headed:
        raise ExportError(
            f"{tool} has one rank a matrix, and the plan gives every head one of its own in {len(headed)} layers, the"
            f" first {headed[0]}; {advice}"
        )


def refuse_tables(plan: Plan, tool: str) -> None:
    """Raise `ExportError` when the plan decides on the embedding or the output head, which `tool` keeps at 16 bits."""
    if plan.tables:
        raise ExportError(
            f"{tool} keeps embeddings and output heads at 16 bits, and the plan gives {next(iter(plan.tables))}"
            f" {plan.layers[next(iter(plan.tables))].bits}; plan without --embeddings"
        )


def refuse_widths(plan: Plan, tool: str, widths: Collection[int], advice: str) -> None:
    """Raise `ExportError` when a layer has bits that `tool` does not run; kept layers always pass."""
    for name, layer in plan.layers.items():
        if layer.bits not in widths and layer.bits != KEEP_BITS:
            told = ", ".join(map(str, sorted(widths)))
            raise ExportError(f"{tool} runs {told} bits, and the plan gives {name} {layer.bits}; {advice}")
