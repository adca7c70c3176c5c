"""`bitrank fidelity`, `spectrum`, `cliff`, `quality` and `downstream`: studies of one model, as tables and JSON, most
with a page."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from profiler.documents.sidecar import Companion, GroupCliff, Spectrum
    from profiler.statistics.estimate import Estimate
    from profiler.statistics.ushape import Shape
    from profiler.studies.task_correlation import TaskAgreement

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="'demo', a model directory or a hub id.")]
Output = Annotated[
    Path | None,
    typer.Option("-o", "--output", help="JSON file to write; a page of charts is written beside it."),
]
Calibration = Annotated[
    list[Path] | None,
    typer.Option(
        help="UTF-8 text, may be given several times and is then mixed evenly; sampled from the model if absent."
    ),
]
Text = Annotated[Path | None, typer.Option(help="UTF-8 text to measure on.")]


def register(app: typer.Typer) -> None:
    for command in (fidelity, spectrum, cliff, quality, downstream):
        app.command()(command)


def fidelity(
    model: Model,
    output: Output = None,
    calibration: Calibration = None,
    text: Text = None,
    tokens: Annotated[int, typer.Option(min=1, help="Calibration tokens; a fifth as many measure.")] = 40_960,
    seed: Annotated[int, typer.Option(help="Seed of every random draw.")] = 0,
    device: Device = "cpu",
    json_output: Json = False,
) -> None:
    """What each block contributes, with intervals, tiers and a test for a U shape."""
    from api.cli.progress import progress
    from api.services.studies import study_fidelity

    found = study_fidelity(model, output, progress(), calibration or (), text, tokens, seed, device)
    _finish(found, output, json_output)
    if json_output:
        return
    option = found.option
    print(
        f"each block alone at {option.bits} bits, group {option.group_size}, on {found.text}"
        f" ({found.windows} windows of {found.window_tokens} tokens; {found.confidence:.0%} intervals)"
    )
    _table(
        ("block", "tier", "probe KL", "influence", "collision margin", "embedding recovery", "outlier in"),
        (
            (
                block.block,
                block.tier,
                _interval(block.probe_kl),
                _interval(block.block_influence),
                _interval(block.collision_margin),
                _interval(block.embedding_recovery),
                ", ".join(block.outlier_in) or "–",
            )
            for block in found.blocks
        ),
    )
    for shape in found.shapes:
        print(_shape_sentence(shape))


def spectrum(model: Model, output: Output = None, device: Device = "cpu", json_output: Json = False) -> None:
    """The rank that 90, 95, 99 and 99.9 % of the energy take, by projection and by head."""
    from api.cli.progress import progress
    from api.services.studies import study_spectrum
    from profiler.model.heads import kind_of

    found = study_spectrum(model, output, progress(), device)
    _finish(found, output, json_output)
    if json_output:
        return
    rows: dict[tuple[str, int], list[Spectrum]] = defaultdict(list)
    for layer in found.layers.values():
        rows[kind_of(layer.projection), layer.spectrum.full_rank].append(layer.spectrum)
    for layer in found.layers.values():
        for head in layer.heads:
            rows[f"{layer.projection}, a head", head.spectrum.full_rank].append(head.spectrum)
    _table(
        ("projection", "matrices", "full rank", *(f"{share:.1%} energy" for share in found.shares)),
        (
            (
                name,
                len(spectra),
                full,
                *(_span(ranks, full) for ranks in zip(*(s.ranks for s in spectra), strict=True)),
            )
            for (name, full), spectra in rows.items()
        ),
    )


def cliff(
    model: Model,
    output: Output = None,
    text: Text = None,
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens to measure on.")] = 8_192,
    ratios: Annotated[
        str, typer.Option(help="Shares of the full rank to cut to.")
    ] = "0.95,0.9,0.85,0.8,0.65,0.5,0.35,0.2",
    device: Device = "cpu",
    json_output: Json = False,
) -> None:
    """What is lost as rank falls, per projection and head group, and where 95 % of the energy is not enough."""
    from api.cli.progress import progress
    from api.services.studies import study_cliff

    found = study_cliff(model, output, progress(), text, tokens, _ratios(ratios), device)
    _finish(found, output, json_output)
    if json_output:
        return
    print(f"rounding every matrix to 4 bits costs {found.threshold_kl:.4f} nats/token on {found.text}:")
    print("the cliff is where cutting one group costs as much")
    _table(
        (
            "group",
            "full rank",
            "95 % energy at",
            "KL there",
            "cliff at",
            "energy there",
            "repetition",
            "95 % enough",
        ),
        map(_cliff_row, found.groups),
    )


def quality(
    model: Model,
    ranks: Annotated[str | None, typer.Option(help="Ranks to cut to, like 8,16,32.")] = None,
    shares: Annotated[
        str | None, typer.Option(help="Shares of the full rank; 0.125,0.25,0.5 by default.")
    ] = None,
    factor_bits: Annotated[
        int | None,
        typer.Option(help="Round the factors to 4 or 8 bits, or store bfloat16 (16); exact if absent."),
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="JSON file to write.")] = None,
    device: Device = "cpu",
    json_output: Json = False,
) -> None:
    """Cosine and relative error of every matrix cut to several ranks, by the weights alone."""
    from api.cli.console import numbers, print_json
    from api.cli.progress import progress
    from api.services.studies import study_quality

    if factor_bits not in (None, 4, 8, 16):
        raise typer.BadParameter(f"--factor-bits is 4, 8 or 16, not {factor_bits}")
    if ranks is None and shares is None:
        shares = "0.125,0.25,0.5"
    kept = numbers(ranks, "--ranks", least=1) if ranks else ()
    cut = _ratios(shares or "", "--shares")
    found = study_quality(model, output, progress(), kept, cut, factor_bits or 0, device)
    if json_output:
        return print_json(found)
    matrices = found["matrices"]
    _table(
        ("matrix", "rank", "of", "cosine", "relative error", "squared", "of the bytes", "verdict"),
        (
            (
                row["layer"],
                row["rank"],
                row["full_rank"],
                f"{row['cosine']:.5f}",
                f"{row['rooted_error']:.5f}",
                f"{row['squared_error']:.5f}",
                f"{row['size_ratio']:.1%}",
                row["verdict"],
            )
            for row in matrices
        ),
    )
    off = max(abs(row["cosine"] ** 2 + row["squared_error"] - 1) for row in matrices)
    print(
        f"cosine² + relative error² is 1 within {off:.2g}"
        + ("" if factor_bits else ", as for any truncated SVD")
    )
    print(
        "verdicts by cosine: " + ", ".join(f"{name} from {least:g}" for name, least in found["bands"].items())
    )


def _cliff_row(group: GroupCliff) -> tuple[Any, ...]:
    at_energy, lowest = group.energy_cut, group.cuts[-1]
    if group.cliff_ratio is None or group.cliff_energy is None:
        where = (f"below {lowest.ratio:.2f}", "–")
    else:
        where = (f"{group.cliff_ratio:.2f}", f"{group.cliff_energy:.2%}")
    repetition = f"{group.cuts[0].repetition:.2f} to {lowest.repetition:.2f}"
    enough = "yes" if group.energy_is_enough else "no"
    return (
        group.group,
        group.full_rank,
        f"{at_energy.ratio:.2f}",
        _interval(at_energy.kl),
        *where,
        repetition,
        enough,
    )


def _ratios(text: str, option: str = "--ratios") -> tuple[float, ...]:
    try:
        ratios = tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise typer.BadParameter(f"{option} takes numbers separated by commas, not {text!r}") from None
    if not all(0 < ratio < 1 for ratio in ratios):
        raise typer.BadParameter(f"{option} must lie between 0 and 1; the full rank loses nothing")
    return ratios


def downstream(
    profile: Annotated[Path, typer.Argument(metavar="PROFILE", help="A directory `bitrank profile` wrote.")],
    plans: Annotated[
        list[str] | None,
        typer.Argument(help="Budgets like 3.3bpw, and strategies like uniform:3; nine if absent."),
    ] = None,
    tasks: Annotated[
        Path | None, typer.Option(help="Folder of lm-evaluation-harness task files, with local data.")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="Run this task of the folder; all if absent.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text to make two tasks of, without --tasks.")
    ] = None,
    documents: Annotated[int, typer.Option(min=2, help="Most documents of a task.")] = 400,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="JSON file to write.")] = None,
    device: Device = "cpu",
    json_output: Json = False,
) -> None:
    """Set KL and perplexity of plans against their accuracy on tasks, and say where they part."""
    import json

    from allocator.atomic import write_atomically
    from api.cli.console import print_json, strict
    from api.cli.progress import progress, remark
    from api.services.downstream import PLANS, document_of, measure_downstream
    from profiler.documents.profile import load_profile

    loaded = load_profile(profile)
    found = measure_downstream(loaded, plans or PLANS, tasks, task or (), text, documents, progress(), device)
    document = document_of(loaded, found)
    remark(loaded.warnings)
    if output is not None:
        write_atomically(output, (json.dumps(strict(document), indent=1) + "\n").encode())
    if json_output:
        return print_json(document)
    names = [agreement.task for agreement in found.tasks]
    _table(
        ("plan", "bpw", "KL", "perplexity", *names),
        (
            (
                row.plan,
                f"{row.bits_per_weight:.2f}",
                f"{row.kl_nats:.4f}",
                f"{row.perplexity:.3f}",
                *(f"{row.scores[name]:.3f} ± {row.errors[name]:.3f}" for name in names),
            )
            for row in sorted(found.plans, key=lambda row: row.kl_nats)
        ),
    )
    for agreement in (found.text, *found.tasks):
        print(_agreement_sentence(agreement))


def _agreement_sentence(found: TaskAgreement) -> str:
    by_kl, by_perplexity = (
        "undefined" if value is None else f"{value:.3f}"
        for value in (found.kl_correlation, found.perplexity_correlation)
    )
    sentence = (
        f"{found.task}: rank correlation with KL {by_kl}, with perplexity {by_perplexity}; over {found.documents}"
        f" documents {found.clear_pairs} of {found.pairs} pairs of plans are told apart"
    )
    if not found.partings:
        return f"{sentence}, all in the order of KL"
    parted = "; ".join(
        f"{p.preferred} over {p.less_kl} by {p.difference:.3f} ± {p.standard_error:.3f}"
        for p in found.partings
    )
    return f"{sentence}, {len(found.partings)} against KL: {parted}"


def _finish(document: Companion, output: Path | None, json_output: bool) -> None:
    """Print the document, if asked, and write its page beside the file."""
    from api.report.study_page import write_study

    if output is not None:
        write_study(output.with_suffix(".html"), document)
    if json_output:
        print(document.model_dump_json(indent=1))


def _shape_sentence(shape: Shape) -> str:
    name = shape.metric.replace("_", " ")
    if shape.p_value is None:
        return f"{name}: too few blocks to tell a U shape"
    return (
        f"{name}: {shape.verdict} (p {shape.p_value:.3f}; {shape.test}; slopes {shape.left_slope:+.3g} up to block"
        f" {shape.break_block}, {shape.right_slope:+.3g} after)"
    )


def _interval(value: Estimate | None) -> str:
    return "–" if value is None else f"{value.mean:.4g} ({value.low:.3g} to {value.high:.3g})"


def _span(ranks: Sequence[int], full: int) -> str:
    """The median rank, its share of the full rank, and the extremes."""
    median = sorted(ranks)[len(ranks) // 2]
    return f"{median} ({median / full:.0%}; {min(ranks)} to {max(ranks)})"


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    from api.cli.console import print_table

    print_table(header, rows)
