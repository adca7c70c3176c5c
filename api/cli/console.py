"""What the commands share: options that mean the same everywhere, numbers read from options, and results printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
ProfileDirectory = Annotated[
    Path, typer.Argument(metavar="PROFILE", help="A directory `bitrank profile` wrote.")
]
MODEL_HELP = "'demo', a model directory or a hub id."


def peak_memory_bytes() -> int:
    """Peak resident memory of this process."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def numbers(text: str, option: str, allowed: set[int] | None = None, least: int = 0) -> tuple[int, ...]:
    try:
        found = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise typer.BadParameter(f"{option} takes whole numbers separated by commas, not {text!r}") from None
    wrong = [n for n in found if (n not in allowed if allowed is not None else n < least)]
    if wrong or not found:
        choices = f"; choose from {sorted(allowed)}" if allowed is not None else f"; {least} is the least"
        raise typer.BadParameter(f"{option} cannot be {wrong}{choices}")
    return found


def shares(text: str, option: str) -> tuple[float, ...]:
    try:
        found = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        raise typer.BadParameter(f"{option} takes numbers separated by commas, not {text!r}") from None
    wrong = [share for share in found if not 0 < share <= 1]
    if wrong:
        raise typer.BadParameter(f"{option} cannot be {wrong}; a share is above 0 and at most 1")
    return found


def dicts(records: Iterable[Any]) -> list[dict[str, Any]]:
    return [asdict(record) for record in records]


def print_json(document: dict[str, Any]) -> None:
    print(json.dumps(strict(document), indent=1))


def strict(document: dict[str, Any]) -> dict[str, Any]:
    """Numbers that JSON cannot write, like the standard error of one window, become null."""
    strict: dict[str, Any] = json.loads(json.dumps(document), parse_constant=lambda _: None)
    return strict


def print_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*header, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
