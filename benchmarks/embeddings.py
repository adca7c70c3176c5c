"""Plans with and without the embedding on the menu, at the same bytes: predicted and measured KL on held-out text.

    python -m benchmarks.embeddings [demo|llama-22m|gptneo-4m …] [--tokens 16384] [--work DIR]

Profiles as `benchmarks.road` does, into the same folder; a profile without tables has them measured first.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from api.cli.progress import progress
from api.services import usecases
from benchmarks.road import ROOT, SHARED, measured_kl
from profiler.sweep.run import ProfileSettings

BUDGETS = ("2.3bpw", "2.6bpw", "3.0bpw", "3.3bpw", "3.75bpw", "4.3bpw")


def table(model: str, work: Path, tokens: int) -> str:
    """Rows of Markdown, one for each budget of the plan that keeps its tables."""
    path = "demo" if model == "demo" else str(SHARED / "models" / model)
    settings = ProfileSettings(calibration=(SHARED / "data" / "calibration.txt",))
    profile = usecases.profile_model(path, work / model / "profile", settings, progress())
    kept = {budget: usecases.plan_budget(profile, budget) for budget in BUDGETS}
    offered = {
        f"{budget} with": usecases.plan_budget(profile.with_tables, f"{plan.total_bytes}B")
        for budget, plan in kept.items()
    }
    found = measured_kl(profile, kept | offered, tokens)
    rows = []
    for budget, before in kept.items():
        after = offered[f"{budget} with"]
        (kl, error), (with_kl, with_error) = found[budget], found[f"{budget} with"]
        bits = ", ".join(
            f"{after.layers[name].bits} g{after.layers[name].group_size}" for name in after.tables
        )
        rows.append(
            f"| {model} | {budget} | {before.total_bytes:,} | {before.predicted_kl:.4f} | {kl:.4f} ± {error:.4f} |"
            f" {bits} | {after.predicted_kl:.4f} | {with_kl:.4f} ± {with_error:.4f} | {with_kl / kl:.2f} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["demo", "llama-22m"])
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks" / ".work" / "road")
    arguments = parser.parse_args()
    print("| model | plan | bytes | predicted | measured | table | predicted with | measured with | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    for model in arguments.models:
        print(table(model, arguments.work, arguments.tokens), flush=True)


if __name__ == "__main__":
    main()
