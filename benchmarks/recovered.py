"""Plans on the quality ladder before and after recovery, over plain GPTQ of as many bytes, on held-out text.

    python -m benchmarks.recovered PROFILE TEXT… --train calibration.txt [--budgets 3.0bpw …] [--steps 300]

Every plan is carried out into a checkpoint, loaded through the plug-in, measured, recovered and measured again; once
with embedding and head kept, once with them on the menu at the same bytes. Plain GPTQ at group 64, which keeps both,
is log-interpolated to those bytes.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from allocator.plan import Plan
from allocator.strategies.strategies import interpolated_uniform_cost
from api.cli.progress import progress
from api.services.usecases import execute, plan_budget, recover_checkpoint
from benchmarks.ladder import BITS, BUDGETS, measured, plain_gptq
from profiler.documents.profile import Profile, load_profile
from profiler.evaluation.divergence import live_logits, measure
from profiler.model.checkpoint import find_model
from profiler.model.layers import LoadedModel, load_model, open_model
from profiler.recovery.recovery import RecoverySettings
from profiler.statistics.calibration import text_tokens


def kl_nats(checkpoint: Path, original: LoadedModel, tokens_NT: Tensor) -> float:
    compressed = load_model(find_model(str(checkpoint)), "cpu")
    return measure(compressed.model, live_logits(original), tokens_NT, progress()).kl_nats


def carried_out(
    profile: Profile, plan: Plan, original: LoadedModel, tokens_NT: Tensor, train: Path, steps: int
) -> tuple[float, float]:
    """KL before and after recovery."""
    with TemporaryDirectory() as folder:
        compressed, recovered = Path(folder) / "compressed", Path(folder) / "recovered"
        execute(plan, profile, compressed, progress())
        recover_checkpoint(
            compressed,
            profile.document.model.id,
            recovered,
            train,
            163_840,
            RecoverySettings(steps=steps),
            progress(),
        )
        return kl_nats(compressed, original, tokens_NT), kl_nats(recovered, original, tokens_NT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("profile", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--train", type=Path, required=True, help="text that recovery trains on")
    parser.add_argument("--budgets", nargs="+", default=BUDGETS)
    parser.add_argument("--tables", nargs="+", choices=("kept", "menu"), default=("kept", "menu"))
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--steps", type=int, default=RecoverySettings().steps)
    arguments = parser.parse_args()
    profile = load_profile(arguments.profile)
    ref = find_model(profile.document.model.id)
    original = load_model(ref, "cpu")
    share = arguments.tokens // len(arguments.texts)
    tokens_NT = torch.cat([text_tokens(original, text, share) for text in arguments.texts])
    rungs = {str(bits): partial(plain_gptq, bits) for bits in BITS}
    with TemporaryDirectory() as folder:
        found = measured(open_model(ref), profile.calibration_tokens(), tokens_NT, rungs, Path(folder))
    sizes = [plan_budget(profile, None, f"uniform:{bits}").total_bytes for bits in BITS]
    points = [(size, found[str(bits)][0]) for size, bits in zip(sizes, BITS, strict=True)]
    print(f"{profile.document.model.id}: KL in nats per token, and over plain GPTQ, {arguments.steps} steps")
    for budget in arguments.budgets:
        kept = plan_budget(profile, budget)
        offered = plan_budget(profile.with_tables, f"{kept.total_bytes}B")
        peer = interpolated_uniform_cost(points, kept.total_bytes)
        for tables in arguments.tables:
            title, plan = ("tables kept", kept) if tables == "kept" else ("tables on the menu", offered)
            before, after = carried_out(profile, plan, original, tokens_NT, arguments.train, arguments.steps)
            print(
                f"  {budget:8} {plan.total_bytes:,} bytes, {title:18} {before:.4f}, recovered {after:.4f}:"
                f" {before / peer:.3f}, {after / peer:.3f} of plain GPTQ's {peer:.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
