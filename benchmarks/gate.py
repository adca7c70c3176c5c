"""The do-no-harm gate over many budgets: how often a plan loses to uniform at the same bytes.

`python -m benchmarks.gate MODEL [--calibration FILE …]` profiles a model under several seeds, or takes one `--profile`.
It plans budgets from 2.3 to 5 bits per weight under each, verifies every plan as `bitrank plan --verify` does, and
counts the verdicts. A plan is worse if it loses to log-interpolated uniform by more than the measurement's own error,
90 % one-sided.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from api.cli.progress import progress
from api.services.usecases import plan_budget
from profiler.documents.profile import load_profile
from profiler.evaluation.verification import verified
from profiler.model.checkpoint import find_model
from profiler.model.layers import open_model
from profiler.sweep.run import ProfileSettings, build_profile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--profile", type=Path, help="one that is made already, instead of one for each seed")
    parser.add_argument("--calibration", type=Path, action="append", default=[], help="several are mixed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--budgets", type=int, default=30)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write every verification here")
    arguments = parser.parse_args()
    everything = []
    for seed in [0] if arguments.profile else arguments.seeds:
        found = verifications(arguments, seed)
        everything += found
        ratios = [v["measured_kl"] / v["uniform_kl"] for v in found if v["uniform_kl"]]
        print(
            f"{arguments.model}, seed {seed}: {dict(Counter(v['verdict'] for v in found))}, KL over uniform"
            f" {min(ratios):.3f} to {max(ratios):.3f}, median {np.median(ratios):.3f},"
            f" {sum(v['swapped'] for v in found)} swapped",
            flush=True,
        )
    print(f"{arguments.model}: {dict(Counter(v['verdict'] for v in everything))} of {len(everything)} plans")
    if arguments.json:
        arguments.json.write_text(json.dumps(everything))


def verifications(arguments: argparse.Namespace, seed: int) -> list[dict[str, object]]:
    ref, report = find_model(arguments.model), progress()
    settings = ProfileSettings(tuple(arguments.calibration), seed=seed, device=arguments.device)
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "trials").mkdir()
        made = arguments.profile
        profile = load_profile(made) if made else build_profile(ref, folder / "profile", settings, report)
        plans = [plan_budget(profile, f"{bits:.3f}bpw") for bits in np.linspace(2.3, 5.0, arguments.budgets)]
        loaded = open_model(ref, arguments.device)
        done = verified(loaded, profile, plans, folder / "trials", report)
    return [plan.verification.model_dump() for plan in done if plan.verification]


if __name__ == "__main__":
    main()
