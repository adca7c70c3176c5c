"""The use-case of exporting weights: a compressed checkpoint in another runtime's format.

A plan alone is written by `allocator/export/formats.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from allocator.errors import FormatError

if TYPE_CHECKING:
    from allocator.plan import Plan
    from profiler.statistics.calibration import Progress

TENSORS = "compressed-tensors"
"""The format that a whole checkpoint can be exported in."""


@dataclass(frozen=True, slots=True)
class ExportedCheckpoint:
    """Where a checkpoint was written, its bytes and who reads it. `adapter` is None for a plan without ranks."""

    reader: str
    base: Path
    base_bytes: int
    adapter: Path | None
    adapter_bytes: int


def export_checkpoint(
    plan: Plan, format_name: str, checkpoint: Path, output: Path, progress: Progress
) -> ExportedCheckpoint:
    """A checkpoint that `bitrank compress` made from `plan`, for another runtime.

    Raises `FormatError` for a format without tensors, `WorkError` when the checkpoint is not the plan's.
    """
    from allocator.export.formats import format_named

    format_named(format_name)
    if format_name != TENSORS:
        raise FormatError(
            f"format {format_name!r} holds no weights; leave --checkpoint out, or choose {TENSORS}"
        )
    from allocator.export.compressed_tensors import layout_of
    from compressor.export import export
    from profiler.model.checkpoint import tensor_bytes

    adapter = export(plan, checkpoint, output, progress)
    return ExportedCheckpoint(
        reader=layout_of(plan).reader,
        base=output,
        base_bytes=tensor_bytes(output),
        adapter=adapter,
        adapter_bytes=0 if adapter is None else tensor_bytes(adapter),
    )
