"""What plans lose when most errors are predicted: an adaptive profile against one of the full grid.

`python -m benchmarks.adaptive FULL ADAPTIVE [TEXT…]` plans 2.3 to 5 bits per weight from two profiles of one
model. It prints how the predicted options agree with the measured ones, what the plans from the adaptive profile lose
under the errors of the full grid, and, given texts, what they lose as measured on them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from allocator.problem import Integers
from api.cli.progress import progress
from api.services.usecases import plan_budget
from profiler.documents.profile import Profile, load_profile
from profiler.evaluation.plan_evaluation import measure_trials, trial_of
from profiler.model.checkpoint import find_model
from profiler.model.layers import open_model
from profiler.statistics.calibration import text_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("full", type=Path)
    parser.add_argument("adaptive", type=Path)
    parser.add_argument("texts", type=Path, nargs="*")
    parser.add_argument("--budgets", type=int, default=28, help="predicted")
    parser.add_argument("--measured", type=int, default=7, help="of which carried out")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    full, adaptive = load_profile(arguments.full), load_profile(arguments.adaptive)
    report_options(full, adaptive)
    choices = {bits: (chosen(full, full, bits), chosen(full, adaptive, bits)) for bits in budgets(arguments)}
    loss = [cost(full, theirs) / cost(full, ours) - 1 for ours, theirs in choices.values()]
    print(f"predicted KL of {len(loss)} plans: {np.median(loss):+.2%} median, {max(loss):+.2%} at most")
    if arguments.texts:
        some = dict(list(choices.items())[:: len(choices) // arguments.measured])
        report_measured(full, some, arguments)


def budgets(arguments: argparse.Namespace) -> list[float]:
    return np.linspace(2.3, 5.0, arguments.budgets).tolist()


def report_options(full: Profile, adaptive: Profile) -> None:
    truth = {(name, m.option): m.error for name, found in full.measurements.items() for m in found}
    rows = [(name, m) for name, found in adaptive.measurements.items() for m in found]
    predicted = [(m, np.log(m.error / truth[name, m.option])) for name, m in rows if m.half_width]
    ratio = np.array([r for _, r in predicted])
    inside = np.mean([abs(r) <= m.half_width for m, r in predicted])
    alone = [record.leave_one_out for record in adaptive.document.layers.values() if record.leave_one_out]
    print(
        f"{full.document.model.id}: {len(rows) - len(predicted)} of {len(rows)} options measured,"
        f" {(len(rows) - len(predicted)) / len(adaptive.measurements):.1f} a layer; |log(predicted / measured)| of"
        f" the others: median {np.median(np.abs(ratio)):.4f}, rms {np.sqrt(np.mean(ratio**2)):.4f}, at most"
        f" {np.abs(ratio).max():.3f}; {inside:.1%} inside their 90 % intervals; leave-one-out by layer: median"
        f" {np.median(alone):.4f}, at most {max(alone):.3f}"
    )


def chosen(full: Profile, profile: Profile, bits: float) -> Integers:
    """The plan's options as indices into the full profile's menu."""
    plan = plan_budget(profile, f"{bits:.3f}bpw")
    picked = [layer.options.index(plan.layers[layer.name].option) for layer in full.menu.layers]
    return np.array(picked, dtype=np.int64)


def cost(full: Profile, choice: Integers) -> float:
    return sum(float(layer.cost[k]) for layer, k in zip(full.menu.layers, choice, strict=True))


def report_measured(
    full: Profile, choices: dict[float, Sequence[Integers]], arguments: argparse.Namespace
) -> None:
    loaded = open_model(find_model(full.document.model.id), arguments.device)
    share = arguments.tokens // len(arguments.texts)
    tokens_NT = torch.cat([text_tokens(loaded, text, share) for text in arguments.texts])
    trials = [trial_of(full.menu, choice) for pair in choices.values() for choice in pair]
    with TemporaryDirectory() as folder:
        kl_PN = measure_trials(loaded, full.calibration(), tokens_NT, trials, Path(folder), progress())[
            :, :, 0
        ]
    for bits, (ours, theirs) in zip(choices, kl_PN.view(-1, 2, kl_PN.shape[1]), strict=True):
        difference_N = theirs - ours
        error = (difference_N.std() / len(difference_N) ** 0.5).item()
        mean = ours.mean().item()
        print(
            f"  {bits:.2f} bpw: full {mean:.4f}, adaptive {theirs.mean().item():.4f}:"
            f" {difference_N.mean().item() / mean:+.2%} ± {error / mean:.2%}"
        )


if __name__ == "__main__":
    main()
