"""The command `bitrank export`: a plan or its checkpoint in the form another tool reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from api.cli.progress import progress

FORMATS = "compressed-tensors, gptqmodel, llama-quantize, llm-compressor, pattern-overrides or peft"


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(export)


def export(
    plan_path: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan.json.")],
    format_name: Annotated[str, typer.Option("--format", help=f"{FORMATS}.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File to write; stdout if absent.")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Export the weights too: the directory `bitrank compress` made from PLAN."),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Write a plan as another tool's configuration, or its checkpoint for another runtime."""
    if checkpoint is None:
        return export_text(plan_path, format_name, output, json_output)
    if output is None:
        raise typer.BadParameter("--checkpoint writes a directory; name it with -o")
    export_weights(plan_path, format_name, checkpoint, output, json_output)


def export_text(plan_path: Path, format_name: str, output: Path | None, json_output: bool) -> None:
    from allocator.atomic import write_atomically
    from allocator.export.formats import format_named
    from allocator.plan import load_plan

    text = format_named(format_name).write(load_plan(plan_path))
    if output is not None:
        write_atomically(output, text.encode())
    if json_output:
        print(json.dumps({"format": format_name, "output": output and str(output), "text": text}, indent=1))
    elif output is None:
        print(text, end="")
    else:
        print(f"{output}: {format_name} of {plan_path}")


def export_weights(
    plan_path: Path, format_name: str, checkpoint: Path, output: Path, json_output: bool
) -> None:
    from allocator.plan import load_plan
    from api.services.exporting import export_checkpoint

    made = export_checkpoint(load_plan(plan_path), format_name, checkpoint, output, progress())
    if json_output:
        document = {
            "format": format_name,
            "reader": made.reader,
            "checkpoint": str(made.base),
            "tensor_bytes": made.base_bytes,
            "adapter": made.adapter and str(made.adapter),
            "adapter_bytes": made.adapter_bytes,
        }
        return print(json.dumps(document, indent=1))
    print(f"{made.base}: {made.base_bytes:,} tensor bytes, for {made.reader}")
    if made.adapter is not None:
        print(f"{made.adapter}: {made.adapter_bytes:,} bytes of low-rank corrections, a PEFT adapter")
