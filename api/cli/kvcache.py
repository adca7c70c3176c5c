"""`bitrank kvcache`: low-rank key-value caches of one model, side by side."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    app.command()(kvcache)


def kvcache(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="'demo', a model directory or a hub id.")],
    strategies: Annotated[
        list[str] | None,
        typer.Argument(help="uniform, progressive, adaptive, manual; the first three if absent."),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="conservative, balanced or aggressive; by the model's size if absent.")
    ] = None,
    ratio: Annotated[
        float | None, typer.Option(help="Share of the plain cache's numbers, bases counted.")
    ] = None,
    bits: Annotated[int | None, typer.Option(help="Bits of the coefficients: 4, 8 or 16.")] = None,
    chunk_size: Annotated[
        int | None, typer.Option(help="Numbers of a head that share a basis; half a head.")
    ] = None,
    context: Annotated[int | None, typer.Option(help="Tokens in the cache.")] = None,
    start_ratio: Annotated[float | None, typer.Option(help="Of progressive: a head's first chunk.")] = None,
    end_ratio: Annotated[float | None, typer.Option(help="Of progressive: a head's last chunk.")] = None,
    ranks: Annotated[
        Path | None, typer.Option(help="Of manual: YAML, LAYER.k|v.HEAD.CHUNK globs to ranks.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to measure on.")] = None,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            help="UTF-8 text for the bases, may be given several times and is then mixed evenly; sampled from the"
            " model if absent."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens to measure on.")] = 4_096,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="JSON file to write.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Bytes, KL and speed of caches that keep keys and values at low rank."""
    import json

    from allocator.atomic import write_atomically
    from api.cli.console import print_json, print_table, strict
    from api.cli.progress import progress
    from api.services.kvcache import STRATEGIES, CacheSettings, measure_caches, summary

    if bits not in (None, 4, 8, 16):
        raise typer.BadParameter(f"--bits is 4, 8 or 16, not {bits}")
    chosen: Any = bits
    settings = CacheSettings(
        strategies=tuple(strategies or STRATEGIES[:3]),
        preset=preset,
        ratio=ratio,
        bits=chosen,
        chunk_size=chunk_size,
        context=context,
        start_ratio=start_ratio,
        end_ratio=end_ratio,
        ranks=ranks,
        text=text,
        calibration=tuple(calibration or ()),
        tokens=tokens,
        device=device,
    )
    rows = measure_caches(model, settings, progress())
    document = {"model": model, "caches": [asdict(row) for row in rows]}
    if output is not None:
        write_atomically(output, (json.dumps(strict(document), indent=1) + "\n").encode())
    if json_output:
        return print_json(document)
    print_table(
        ("ranks", "mean", "bytes held", "predicted", "of the plain cache", "KL", "tokens/s", "plain"),
        [
            (
                row.strategy,
                f"{row.mean_rank:.1f}",
                f"{row.held_bytes:,}",
                f"{row.predicted_bytes:,}",
                f"{row.ratio:.1%}",
                f"{row.kl_nats:.4f} ± {row.standard_error:.4f}",
                f"{row.tokens_per_second:.1f}",
                f"{row.plain_tokens_per_second:.1f}",
            )
            for row in rows
        ],
    )
    if sentence := summary(rows):
        print(sentence)
