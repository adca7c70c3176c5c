"""The command line: `bitrank …`. Every command reads its arguments, calls one use-case and prints the result.

stdout carries the result (one JSON document with --json), stderr the progress and the errors. Exit codes: 0 done,
1 failed, 2 wrong usage, 3 infeasible, 130 interrupted.
"""

from __future__ import annotations

import signal
import sys
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from api.cli import export, jobs, kvcache, plan, studies
from api.cli.console import (
    MODEL_HELP,
    Device,
    Json,
    ProfileDirectory,
    dicts,
    numbers,
    peak_memory_bytes,
    print_json,
    print_table,
    shares,
)
from api.cli.plan import Embeddings
from api.cli.progress import progress, remark
from api.cli.studies import Calibration

app = typer.Typer(
    name="bitrank",
    help="Decide how many bits and how much rank every weight matrix of a language model deserves.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Interrupted(BaseException):
    """Ctrl-C, under a name that typer does not take for its own."""

    happened = False


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(version("bitrank"))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Decide how many bits and how much rank every weight matrix of a language model deserves."""


def run() -> None:
    """Run the command line; every error a user can mend becomes one line on stderr and an exit code."""
    from allocator.errors import (
        BitrankError,
        BudgetSyntaxError,
        FormatError,
        InfeasibleError,
        StrategyError,
        TargetError,
    )

    signal.signal(signal.SIGINT, _interrupt)
    try:
        app()
    except InfeasibleError as error:
        sys.exit(_complain(error, 3))
    except (BudgetSyntaxError, FormatError, StrategyError, TargetError) as error:
        sys.exit(_complain(error, 2))
    except (BitrankError, OSError) as error:
        sys.exit(_complain(error, 1))
    except Interrupted:
        sys.exit(_say_interrupted())
    except Exception:  # compiled code that calls back into Python can put an error of its own in its place
        if not Interrupted.happened:
            raise
        sys.exit(_say_interrupted())


def _interrupt(number: int, frame: FrameType | None) -> None:
    Interrupted.happened = True
    raise Interrupted


def _say_interrupted() -> int:
    print("bitrank: interrupted; run the same command again to resume", file=sys.stderr)
    return 130


def _complain(error: Exception, code: int) -> int:
    text = " ".join(str(error).split())
    if isinstance(error, OSError):
        text = f"cannot write or read a file ({text}); free some space or check the path, then run the command again"
    print(f"bitrank: {text}", file=sys.stderr)
    return code


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Directory for profile, plans and report.")
    ] = Path("bitrank-demo"),
    json_output: Json = False,
) -> None:
    """Profile, plan, compress and evaluate the embedded model, and write an HTML report."""
    from api.services.demo import run_demo

    result = run_demo(output, progress())
    if json_output:
        return print_json(result)
    print_table(
        ("text", "checkpoint", "bytes", "bpw", "predicted KL", "KL", "perplexity", "top-1", "tokens/s"),
        (
            (
                row["text"],
                row["name"],
                f"{row['tensor_bytes']:,}",
                f"{row['bits_per_weight']:.2f}",
                f"{row['predicted_kl']:.4f}",
                f"{row['kl_nats']:.4f}",
                f"{row['perplexity']:.2f} (fp {row['reference_perplexity']:.2f})",
                f"{row['top1_agreement']:.1%}",
                f"{row['tokens_per_second']:.0f}",
            )
            for row in result["evaluations"]
        ),
    )
    print(f"report: {result['report']}")


@app.command()
def profile(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    output: Annotated[Path, typer.Option("-o", "--output", help="Profile directory to write.")],
    calibration: Calibration = None,
    tokens: Annotated[int, typer.Option(min=1, help="Calibration tokens.")] = 40_960,
    seed: Annotated[int, typer.Option(help="Seed of every random draw.")] = 0,
    bits: Annotated[str, typer.Option(help="Bit widths to measure; 0 is low rank alone.")] = "2,3,4,5,6,8",
    ranks: Annotated[
        str | None, typer.Option(help="Ranks to measure; by the model's width if absent.")
    ] = None,
    group_sizes: Annotated[str, typer.Option(help="Group sizes to measure.")] = "32,64,128",
    rank_group_sizes: Annotated[
        str | None, typer.Option(help="Group sizes to measure ranks at, 64 if absent; more are slow.")
    ] = None,
    factor_bits: Annotated[
        str, typer.Option(help="Bits of low-rank factors to measure; vLLM serves 16.")
    ] = "4",
    adaptive: Annotated[
        bool,
        typer.Option(help="Measure five options of a layer, predict the others; measure them where unsure."),
    ] = False,
    rotations: Annotated[
        bool, typer.Option("--rotations", help="Measure options at rank 0 of rotated inputs too.")
    ] = False,
    head_ratios: Annotated[
        str | None,
        typer.Option(help="Shares of a head's rank, like 0.5,0.9: low rank alone for every q, k and v head."),
    ] = None,
    device: Device = "cpu",
    json_output: Json = False,
) -> None:
    """Measure a model once, so that every budget can be planned from it."""
    from api.services.usecases import profile_model
    from profiler.sweep.run import ProfileSettings

    widths = numbers(bits, "--bits", {0, 2, 3, 4, 5, 6, 8})
    if not any(widths):
        raise typer.BadParameter("--bits 0, which is low rank alone, needs another width beside it")
    settings = ProfileSettings(
        calibration=tuple(calibration or ()),
        tokens=tokens,
        seed=seed,
        device=device,
        bits=widths,
        ranks=None if ranks is None else (0, *(r for r in numbers(ranks, "--ranks") if r)),
        group_sizes=numbers(group_sizes, "--group-sizes", {32, 64, 128}),
        rank_group_sizes=None
        if rank_group_sizes is None
        else numbers(rank_group_sizes, "--rank-group-sizes", {32, 64, 128}),
        factor_bits=numbers(factor_bits, "--factor-bits", {4, 8, 16}),
        adaptive=adaptive,
        rotations=rotations,
        head_ratios=() if head_ratios is None else shares(head_ratios, "--head-ratios"),
    )
    report = progress()
    made = profile_model(model, output, settings, report)
    document = made.document
    known = [m for measurements in made.measurements.values() for m in measurements]
    predicted = sum(m.half_width > 0 for m in known)
    if settings.head_ratios and all(m.option.heads == 1 for m in known):
        print(
            f"bitrank: {model} has no query, key or value projection of several heads; --head-ratios measured nothing",
            file=sys.stderr,
        )
    summary = {
        "profile": str(made.path),
        "sha256": made.sha256,
        "model": document.model.model_dump(),
        "layers": len(document.layers),
        "measurements": len(known) - predicted,
        "predictions": predicted,
        "worst_r_squared": min(record.fit.r_squared for record in document.layers.values()),
        "gain": document.gain.mean,
        "seconds": report.seconds,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    remark(made.warnings)
    if json_output:
        return print_json(summary)
    counts = f"{len(known) - predicted} measured options" + (f", {predicted} predicted" if predicted else "")
    print(f"{summary['layers']} layers, {counts} in {made.path}")
    print(f"next: bitrank plan {made.path} --budget 3.25bpw")


@app.command()
def calibrate(
    profile: ProfileDirectory,
    output: Annotated[Path, typer.Option("-o", "--output", help="Profile directory to write.")],
    text: Annotated[
        Path | None,
        typer.Option(
            help="UTF-8 text to measure on, like what the model will read; held-back windows if absent."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of that text.")] = 32_768,
    plans: Annotated[int, typer.Option(help="Random plans to measure.")] = 40,
    seed: Annotated[int, typer.Option(help="Seed of the plans.")] = 0,
    device: Device = "cpu",
    json_output: Json = False,
) -> None:
    """Measure random plans of a profile and fit its predictions to them."""
    from api.services.usecases import calibrate_profile

    made = calibrate_profile(profile, output, text, tokens, plans, seed, progress(), device)
    found, gain = made.document.agreement, made.document.gain
    assert found is not None
    remark(made.warnings)
    if json_output:
        summary = {"profile": str(made.path), "sha256": made.sha256, "plans": len(made.document.plans)}
        return print_json(summary | {"gain": asdict(gain), "agreement": found.model_dump()})
    print(f"{len(made.document.plans)} plans measured; each predicted from the others, in {made.path}:")
    print_table(
        ("rank correlation", "pairs misordered", "median error", "before", "interval", "inside it"),
        [
            (
                f"{found.spearman:.3f}",
                f"{found.misordered:.1%}",
                f"{found.median_log_ratio:.1%}",
                f"{found.median_log_ratio_before:.1%}",
                f"×{gain.low / gain.mean:.2f} … ×{gain.high / gain.mean:.2f}",
                f"{found.coverage:.0%}",
            )
        ],
    )


plan.register(app)


@app.command()
def frontier(
    profile_path: ProfileDirectory, embeddings: Embeddings = False, json_output: Json = False
) -> None:
    """The least predicted loss at every size, beside uniform settings."""
    from api.services.usecases import frontier_points, uniform_points
    from profiler.documents.profile import load_profile

    loaded = load_profile(profile_path).offered(embeddings)
    points, uniform = frontier_points(loaded), uniform_points(loaded)
    remark(loaded.warnings)
    if json_output:
        return print_json({"frontier": dicts(points), "uniform": dicts(uniform)})
    shown = points[:: max(1, len(points) // 24)]
    print_table(
        ("bytes", "bpw", "predicted KL", ""),
        [(f"{p.total_bytes:,}", f"{p.bits_per_weight:.3f}", f"{p.kl_nats:.5f}", "") for p in shown]
        + [
            (f"{u.total_bytes:,}", f"{u.bits_per_weight:.3f}", f"{u.kl_nats:.5f}", u.strategy)
            for u in uniform
        ],
    )


@app.command()
def curves(
    profile_path: ProfileDirectory,
    layer: Annotated[str, typer.Option(help="Layers by glob, like '*.mlp.*'.")] = "*",
    json_output: Json = False,
) -> None:
    """Measured and fitted errors of every option, by layer."""
    from api.services.usecases import curve_points
    from profiler.documents.profile import load_profile

    loaded = load_profile(profile_path)
    points = curve_points(loaded, layer)
    if json_output:
        fits = {name: loaded.document.layers[name].fit for name in dict.fromkeys(p.layer for p in points)}
        return print_json(
            {"fits": {name: dicts([fit])[0] for name, fit in fits.items()}, "points": dicts(points)}
        )
    print_table(
        ("layer", "bits", "rank", "group", "error (squared)", "fitted", "KL"),
        (
            (
                p.layer,
                f"{p.bits} rotated" if p.rotated else p.bits,
                p.rank if p.heads == 1 else f"{p.rank} × {p.heads} heads",
                p.group_size,
                f"{p.error:.3e}",
                "–" if p.fitted_error is None else f"{p.fitted_error:.3e}",
                f"{p.kl_nats:.3e}",
            )
            for p in points
        ),
    )


@app.command()
def compress(
    plan_path: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan.json.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Checkpoint directory to write.")],
    profile_path: Annotated[
        Path | None, typer.Option("--profile", help="The plan's profile, if not found.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Where the original is, if it has moved.")] = None,
    device: Device = "cpu",
    json_output: Json = False,
) -> None:
    """Carry a plan out into a checkpoint that transformers loads."""
    from api.services.usecases import compress_plan

    made = compress_plan(plan_path, output, progress(), profile_path, device, model)
    remark(made.warnings)
    if json_output:
        return print_json({"checkpoint": str(output), "tensor_bytes": made.total_bytes})
    print(f"{output}: {made.total_bytes:,} tensor bytes")
    print(f"next: bitrank evaluate {output} --reference {made.model.id}")


@app.command()
def recover(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="What `bitrank compress` wrote.")],
    reference: Annotated[str, typer.Option(help=f"The original: {MODEL_HELP}")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Checkpoint directory to write.")],
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text to train on; sampled from the reference if absent.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of that text.")] = 163_840,
    steps: Annotated[int, typer.Option(min=1, help="Steps of Adam.")] = 300,
    seed: Annotated[int, typer.Option(help="Seed of every random draw.")] = 0,
    device: Device = "cpu",
    json_output: Json = False,
) -> None:
    """Train the scales of a compressed checkpoint towards its original; the bytes stay."""
    from api.services.usecases import recover_checkpoint
    from profiler.recovery.recovery import RecoverySettings

    settings = RecoverySettings(steps=steps, seed=seed)
    found = recover_checkpoint(checkpoint, reference, output, text, tokens, settings, progress(), device)
    if json_output:
        made = {"checkpoint": str(output), "settings": asdict(settings), "helped": found.helped}
        return print_json(made | asdict(found))
    change = f"KL {found.before_kl:.4g} -> {found.after_kl:.4g} nats/token on windows held back"
    kept = "" if found.helped else "; that is no gain, so the scales stay as they were"
    print(f"{output}: {steps} steps, {change}{kept}")
    print(f"next: bitrank evaluate {output} --reference {reference}")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The compressed checkpoint.")],
    reference: Annotated[str, typer.Option(help=f"The original: {MODEL_HELP}")],
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text; sampled from the reference if absent.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens to measure on.")] = 32_768,
    prompt: Annotated[list[str] | None, typer.Option(help="Continue this text with both models.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="UTF-8 file with a prompt on every line.")] = None,
    device: Device = "cpu",
    json_output: Json = False,
) -> None:
    """Measure how far a compressed model is from its original."""
    from api.services.usecases import evaluate_model, read_prompts

    asked = [*(prompt or ()), *(read_prompts(prompts) if prompts else ())]
    found = evaluate_model(model, reference, text, tokens, progress(), asked, device)
    if json_output:
        return print_json(dicts([found])[0])
    print(f"KL {found.kl_nats:.5f} ± {found.kl_standard_error:.5f} nats/token over {found.tokens:,} tokens")
    print(f"perplexity {found.perplexity:.3f}, original {found.reference_perplexity:.3f}")
    print(f"logits cosine {found.logits_cosine:.5f}, same next token {found.top1_agreement:.2%}")
    print(f"{found.tokens_per_second:.1f} tokens/s, original {found.reference_tokens_per_second:.1f}")
    if found.low_rank_cache:
        print("read through the low-rank key-value cache that the checkpoint was planned with")
    print(f"{found.tensor_bytes:,} tensor bytes, original {found.reference_tensor_bytes:,}")
    for sample in found.samples:
        print(f"\n{sample.prompt}\n  original:   {sample.reference!r}\n  compressed: {sample.compressed!r}")
        print(f"  logits: cosine {sample.logits_cosine:.5f}, mean squared difference {sample.logits_mse:.4g}")
        print(f"  repetition {sample.compressed_repetition:.2f}, original {sample.reference_repetition:.2f}")


export.register(app)
jobs.register(app)
studies.register(app)
kvcache.register(app)
