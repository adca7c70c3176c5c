"""What calibration on text sampled from the model itself costs against human text, by number of tokens.

`python -m benchmarks.calibration_text MODEL HUMAN_TEXT TEXT…` profiles a model on each text at several sizes, plans two
budgets from every profile, and measures the plans, compressed under the same tokens, on the held-out TEXTs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from api.cli.progress import progress
from api.services.usecases import plan_budget
from profiler.evaluation.plan_evaluation import measure_trials
from profiler.model.checkpoint import find_model
from profiler.model.layers import open_model
from profiler.statistics.calibration import text_tokens
from profiler.sweep.run import ProfileSettings, build_profile

BUDGETS = ("2.6bpw", "3.3bpw")
TOKENS = (4096, 10_240, 20_480, 40_960, 81_920)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("human", type=Path)
    parser.add_argument("texts", type=Path, nargs="+", help="held out")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--measured", type=int, default=32_768, help="held-out tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    loaded = open_model(find_model(arguments.model), arguments.device)
    share = arguments.measured // len(arguments.texts)
    held_out_NT = torch.cat([text_tokens(loaded, text, share) for text in arguments.texts])
    print(
        f"{arguments.model}, seed {arguments.seed}: KL (nats/token) at {' and '.join(BUDGETS)}, held-out text"
    )
    for tokens in arguments.tokens:
        kl = {
            name: losses(arguments, text, tokens, held_out_NT)
            for name, text in (("human", (arguments.human,)), ("sampled", ()))
        }
        more = [sampled / human - 1 for human, sampled in zip(kl["human"], kl["sampled"], strict=True)]
        print(
            f"  {tokens:6} tokens: human {kl['human'][0]:.4f} {kl['human'][1]:.4f}, sampled"
            f" {kl['sampled'][0]:.4f} {kl['sampled'][1]:.4f}: {more[0]:+.1%} {more[1]:+.1%}",
            flush=True,
        )


def losses(
    arguments: argparse.Namespace, calibration: tuple[Path, ...], tokens: int, held_out_NT: Tensor
) -> list[float]:
    """Measured KL of each budget's plan from a profile on `tokens` tokens of texts, or sampled ones."""
    ref = find_model(arguments.model)
    settings = ProfileSettings(
        calibration=calibration, tokens=tokens, seed=arguments.seed, device=arguments.device, adaptive=True
    )
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "trials").mkdir()
        profile = build_profile(ref, folder / "profile", settings, progress())
        plans = [plan_budget(profile, budget) for budget in BUDGETS]
        trials = [{layer: planned.option for layer, planned in plan.layers.items()} for plan in plans]
        loaded = open_model(ref, arguments.device)
        kl_PN = measure_trials(
            loaded, profile.calibration(), held_out_NT, trials, folder / "trials", progress()
        )[:, :, 0]
    return kl_PN.mean(dim=1).tolist()


if __name__ == "__main__":
    main()
