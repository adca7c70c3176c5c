"""`bitrank plan` and `bitrank compare`: one plan, here or on a service, and strategies beside the optimum."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from api.cli.progress import ProgressLine, progress, remark

if TYPE_CHECKING:
    from allocator.measured_outcome import Verification
    from allocator.plan import Plan, PlanCache
    from allocator.strategies.policy import Policy
    from api.services.comparing import PlanFigures
    from profiler.documents.profile import Profile

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
PolicyFile = Annotated[
    Path | None, typer.Option("--policy", metavar="FILE", help="YAML rules for the strategy policy.")
]

Embeddings = Annotated[
    bool,
    typer.Option(
        "--embeddings", help="Decide on the input embedding and the output head too: 8, 6, 4 or 16 bits."
    ),
]


def register(app: typer.Typer) -> None:
    for command in (plan, compare):
        app.command()(command)


def plan(
    profile: Annotated[
        str,
        typer.Argument(
            metavar="PROFILE", help="A directory `bitrank profile` wrote; with --server, a model's name."
        ),
    ],
    budget: Annotated[str | None, typer.Option(help="700MiB, 1.5GB, 25% or 3.25bpw.")] = None,
    strategy: Annotated[str, typer.Option(help="optimal, uniform:3, uniform:3:r64, ultra, …")] = "optimal",
    policy: PolicyFile = None,
    target: Annotated[
        str | None,
        typer.Option(help="Only what this runtime executes: vllm, llm-compressor, gptqmodel, llama.cpp."),
    ] = None,
    server: Annotated[
        str | None, typer.Option(help="Have a service plan, profiling first if need be; key in BITRANK_KEY.")
    ] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Measure the plan beside uniform at the same bytes; takes minutes."),
    ] = False,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens of context: the key-value cache shares the budget with the weights."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of that context.")] = 1,
    embeddings: Embeddings = False,
    output: Annotated[Path, typer.Option("-o", "--output", help="Plan file to write.")] = Path("plan.json"),
    device: Device = "cpu",
    json_output: Json = False,
) -> None:
    """Decide every layer's bits and rank for one budget, with a certificate."""
    if context is not None:
        if server or verify or target or policy or strategy != "optimal":
            raise typer.BadParameter(
                "--context plans the cache with the optimal weights, here and for transformers;"
                " leave --server, --verify, --target, --policy and --strategy out"
            )
        made, size = _planned_with_cache(Path(profile), budget, context, batch, device, embeddings), ""
    elif batch != 1:
        raise typer.BadParameter("--batch goes with --context; give both or neither")
    elif server is None:
        made, size = _planned_here(
            Path(profile), budget, strategy, target, verify, device, policy, embeddings
        )
    elif policy is not None:
        raise typer.BadParameter("--policy is read here and cannot go to a --server; leave one of them out")
    else:
        made, size = _planned_there(server, profile, budget, strategy, target, verify, embeddings), ""
    made.save(output)
    remark(made.warnings)
    if made.verification is not None and made.verification.verdict == "worse":
        remark([describe_verification(made.verification)])
    if json_output:
        return print(made.model_dump_json(indent=1))
    low, high = made.predicted_kl_interval
    print(f"{output}: {made.total_bytes:,} bytes{size}")
    print(f"predicted KL {made.predicted_kl:.4f} nats/token (90 % interval {low:.4f} to {high:.4f})")
    print(f"no plan from these options loses less than {made.lower_bound:.4f} (gap {made.gap:.2g})")
    print(f"one more MiB saves {made.shadow_price:.4g} nats/token")
    if made.checked:
        print(made.checked)
    if made.verification is not None:
        print(describe_verification(made.verification))
    if made.cache is not None:
        print(describe_cache(made.cache))
    counts: dict[str, int] = {}
    for layer in made.layers.values():
        key = f"{layer.bits} bits" + (f" + rank {layer.rank}" if layer.rank else "")
        key += " rotated" if layer.rotated else ""
        key += f" in each of {layer.heads} heads" if layer.heads > 1 else ""
        counts[key] = counts.get(key, 0) + 1
    print(", ".join(f"{count} layers at {key}" for key, count in sorted(counts.items())))


def compare(
    profile: Annotated[Path, typer.Argument(metavar="PROFILE", help="A directory `bitrank profile` wrote.")],
    strategies: Annotated[
        list[str] | None, typer.Argument(help="uniform:3, uniform:3:r64, ultra, progressive:fall, …")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="For strategies without a size of their own: 700MiB, 25% or 3.25bpw.")
    ] = None,
    policy: PolicyFile = None,
    embeddings: Embeddings = False,
    share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of a strategy's bytes that the optimum beside it gets.")
    ] = 1.0,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="JSON file to write; a page with a chart is written beside it."),
    ] = None,
    device: Device = "cpu",
    json_output: Json = False,
) -> None:
    """Measure strategies, each beside the optimum at the same bytes, or at a share of them."""
    from api.cli.console import print_json, print_table, strict
    from api.services.comparing import compare_strategies, write_comparison

    named = strategies or ["uniform:2", "uniform:3", "uniform:4"]
    loaded = _loaded(profile, embeddings)
    found = compare_strategies(
        loaded, named, budget, progress(), device, _policy(policy, loaded, "policy" in named), share
    )
    remark(loaded.warnings)
    document = {
        "model": loaded.document.model.model_dump(),
        "comparisons": [asdict(pair) | {"saved": pair.saved} for pair in found],
    }
    if output is not None:
        write_comparison(output, strict(document))
    if json_output:
        return print_json(document)
    rows = []
    for pair in found:
        rows.append((pair.strategy, *_figures(pair.plan), ""))
        rows.append(("  the optimum", *_figures(pair.optimum), f"{pair.saved:.1%}"))
    print_table(
        (
            "plan",
            "bytes",
            "mean bits",
            "mean rank",
            "predicted KL",
            "KL",
            "of uniform",
            "perplexity",
            "less KL",
        ),
        rows,
    )
    print(f"perplexity of the original {found[0].plan.reference_perplexity:.3f}")


def _figures(found: PlanFigures) -> tuple[str, ...]:
    share = "–" if found.uniform_kl is None else f"{found.measured_kl / found.uniform_kl:.3f}"
    return (
        f"{found.total_bytes:,}",
        f"{found.mean_bits:.2f}",
        f"{found.mean_rank:.1f}",
        f"{found.predicted_kl:.4f}",
        f"{found.measured_kl:.4f} ± {found.standard_error:.4f}",
        share,
        f"{found.perplexity:.3f}",
    )


def describe_cache(found: PlanCache) -> str:
    """What the cache takes and costs, in one sentence."""
    full = max(1, sum(found.chunk_size * len(row) for group in found.groups.values() for row in group.ranks))
    kept = sum(sum(row) for group in found.groups.values() for row in group.ranks)
    bits = sorted({group.bits for group in found.groups.values()}, reverse=True)
    counts = [(sum(group.bits == b for group in found.groups.values()), b) for b in bits]
    return (
        f"cache of {found.batch} × {found.context:,} tokens: {found.total_bytes:,} bytes, plain"
        f" {found.plain_bytes:,}; {kept / full:.0%} of the directions, "
        + ", ".join(f"{count} of {len(found.groups)} groups at {b} bits" for count, b in counts)
        + f"; {found.predicted_kl:.4f} of the KL"
    )


def describe_verification(found: Verification) -> str:
    """What was measured, in one sentence."""
    measured = f"measured KL {found.measured_kl:.4f} ± {found.standard_error:.4f} nats/token"
    if found.uniform_kl is None:
        return f"{measured}; there is no uniform plan on both sides of these bytes to compare with"
    beside = f"uniform at the same bytes {found.uniform_kl:.4f}"
    if found.verdict == "worse":
        return f"{measured}, {beside}: this plan loses; take a uniform one, or profile with more text"
    return f"{measured}, {beside}: {found.verdict}" + (", after a swap" if found.swapped else "")


def _planned_with_cache(
    profile: Path, budget: str | None, context: int, batch: int, device: str, embeddings: bool
) -> Plan:
    from api.services.kvcache import plan_jointly
    from api.services.usecases import check_planning

    check_planning(budget, "optimal", False, None)
    assert budget is not None
    return plan_jointly(_loaded(profile, embeddings), budget, context, batch, progress(), device)


def _planned_here(
    profile: Path,
    budget: str | None,
    strategy: str,
    target: str | None,
    verify: bool,
    device: str,
    policy: Path | None,
    embeddings: bool,
) -> tuple[Plan, str]:
    """The plan, and how its size is told in bits per weight."""
    from api.services.usecases import bits_per_weight, check_planning, plan_budget, verify_plan

    if policy is None:
        check_planning(budget, strategy, False, target)
    loaded = _loaded(profile, embeddings)
    rules = _policy(policy, loaded, strategy == "policy")
    made = plan_budget(loaded, budget, strategy, target=target, policy=rules)
    if verify:
        made = verify_plan(made, loaded, progress(), device)
    return made, f", {bits_per_weight(loaded.menu, made.total_bytes):.3f} bpw"


def _planned_there(
    server: str,
    model: str,
    budget: str | None,
    strategy: str,
    target: str | None,
    verify: bool,
    embeddings: bool,
) -> Plan:

    from api.client import plan_on_server
    from api.services.usecases import check_planning

    check_planning(budget, strategy, False, target)
    key = os.environ.get("BITRANK_KEY")
    return plan_on_server(server, key, model, budget, strategy, ProgressLine(), target, verify, embeddings)


def _loaded(path: Path, embeddings: bool) -> Profile:
    """The profile, with its tables on the menu if asked for."""
    from profiler.documents.profile import load_profile

    return load_profile(path).offered(embeddings)


def _policy(path: Path | None, profile: Profile, asked_for: bool) -> Policy | None:
    """The rules of --policy; what they do not reach is said on stderr."""
    from allocator.strategies.policy import load_policy

    if path is None:
        return None
    if not asked_for:
        raise typer.BadParameter("--policy goes with the strategy policy; name it")
    policy = load_policy(path)
    remark(policy.unmatched(profile.menu))
    return policy
