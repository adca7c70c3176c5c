"""The main job measured: plans against uniform GPTQ at the same bytes, predictions against measurements.

`python -m benchmarks.road [--write]` profiles the reference models on the calibration text, plans five budgets,
carries them out and measures each on held-out books and documents, beside uniform settings at group 64. Uniform KL is
log-interpolated in bytes between the integer widths. Skipped where the reference data is absent.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from allocator.plan import Plan
from allocator.strategies.strategies import interpolated_uniform_cost
from api.cli.progress import progress
from api.services import usecases
from profiler.documents.profile import Profile
from profiler.evaluation.plan_evaluation import measure_trials
from profiler.model.checkpoint import find_model
from profiler.model.layers import open_model
from profiler.statistics.calibration import text_tokens
from profiler.sweep.run import ProfileSettings

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
BUDGETS = ("2.6bpw", "3.0bpw", "3.3bpw", "3.75bpw", "4.3bpw")
UNIFORM_BITS = (2, 3, 4, 5)
TEXTS = ("heldout-books.txt", "heldout-docs.txt")
MODELS = {"llama-22m": 0.87, "demo": 0.93}
"""The ratio each model's plans must reach."""


def measured_kl(profile: Profile, plans: dict[str, Plan], tokens: int) -> dict[str, tuple[float, float]]:
    """KL and its standard error of every plan, all carried out in one pass, on the same held-out windows."""
    original = open_model(find_model(profile.document.model.id))
    tokens_NT = torch.cat(
        [text_tokens(original, SHARED / "data" / text, tokens // len(TEXTS)) for text in TEXTS]
    )
    trials = [{name: layer.option for name, layer in plan.layers.items()} for plan in plans.values()]
    with tempfile.TemporaryDirectory() as folder:
        kl_PN = measure_trials(original, profile.calibration(), tokens_NT, trials, Path(folder), progress())[
            :, :, 0
        ]
    errors = kl_PN.std(dim=1) / kl_PN.shape[1] ** 0.5
    return dict(zip(plans, zip(kl_PN.mean(dim=1).tolist(), errors.tolist(), strict=True), strict=True))


def table(model: str, bound: float, work: Path, tokens: int) -> str:
    path = "demo" if model == "demo" else str(SHARED / "models" / model)
    settings = ProfileSettings(calibration=(SHARED / "data" / "calibration.txt",))
    profile = usecases.profile_model(path, work / model / "profile", settings, progress())
    plans = {budget: usecases.plan_budget(profile, budget) for budget in BUDGETS}
    uniform = {
        f"uniform:{bits}": usecases.plan_budget(profile, None, f"uniform:{bits}") for bits in UNIFORM_BITS
    }
    found = measured_kl(profile, plans | uniform, tokens)
    points = [(plan.total_bytes, found[name][0]) for name, plan in uniform.items()]
    lines = [
        f"### {model}",
        "",
        f"Gain {profile.document.gain.mean:.3f}, target ratio ≤ {bound}.",
        "",
        "| budget | bytes | KL (nats/token) | ± | uniform KL at the same bytes | ratio | predicted | "
        "predicted ÷ measured | ranks bought |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, plan in (plans | uniform).items():
        kl, error = found[name]
        same_bytes = interpolated_uniform_cost(points, plan.total_bytes)
        ranks = sum(layer.rank > 0 for layer in plan.layers.values())
        lines.append(
            f"| {name} | {plan.total_bytes:,} | {kl:.4f} | {error:.4f} | {same_bytes:.4f} | {kl / same_bytes:.3f} |"
            f" {plan.predicted_kl:.4f} | {plan.predicted_kl / kl:.3f} | {ranks} |"
        )
    worst = max(found[b][0] / interpolated_uniform_cost(points, plans[b].total_bytes) for b in BUDGETS)
    lines += [
        "",
        f"Worst ratio of the five plans: {worst:.3f}, {'met' if worst <= bound else 'NOT met'}.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks" / ".work" / "road")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--fresh", action="store_true", help="forget earlier profiles")
    parser.add_argument("--write", action="store_true", help="write benchmarks/road.md")
    arguments = parser.parse_args()
    if not SHARED.exists():
        sys.exit("the reference models and texts are not here; nothing was measured")
    if arguments.fresh:
        shutil.rmtree(arguments.work, ignore_errors=True)
    text = "# Plans against uniform GPTQ\n\nCalibrated on calibration.txt, measured on held-out books and documents.\n"
    for model in arguments.models:
        made = table(model, MODELS[model], arguments.work, arguments.tokens)
        print(made, flush=True)
        text += "\n" + made
    if arguments.write:
        (ROOT / "benchmarks" / "road.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
