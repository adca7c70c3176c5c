"""The quality ladder: held-out KL of one model at uniform settings, rung by rung, and of plans over plain GPTQ.

`python -m benchmarks.ladder PROFILE TEXT…` measures nearest rounding, GPTQ, GPTQ with tokens weighted as the profile
weighs them, with descent too, and rank 64 with factors of 4 and 8 bits, all at group 64; then plans from the profile at
six budgets, over the KL of uniform plain GPTQ log-interpolated to the same bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from allocator.plan import Plan
from allocator.storage import Option
from allocator.strategies.strategies import interpolated_uniform_cost
from api.cli.progress import progress
from api.services.usecases import plan_budget
from compressor.lowrank.decompose import decompose
from compressor.lowrank.hessian import Curvature
from compressor.quantize.gptq import gptq, round_to_nearest
from profiler.documents.profile import Profile, load_profile
from profiler.evaluation.divergence import compare, stored_logits
from profiler.execution.block_pipeline import block_works
from profiler.model.checkpoint import find_model
from profiler.model.layers import LoadedModel, open_model
from profiler.statistics.calibration import text_tokens
from profiler.statistics.moments import TokenWeights

BITS, GROUP, RANK = (2, 3, 4, 5), 64, 64
BUDGETS = ("2.3bpw", "2.6bpw", "3.0bpw", "3.3bpw", "3.75bpw", "4.3bpw")
Rung = Callable[[str, Tensor, Curvature], Tensor]
"""A layer's name, W (O, I) and its curvature to what W becomes."""


def nearest(bits: int, name: str, w_OI: Tensor, curvature: Curvature) -> Tensor:
    return round_to_nearest(w_OI, bits, GROUP).dequantize()


def plain_gptq(bits: int, name: str, w_OI: Tensor, curvature: Curvature) -> Tensor:
    return gptq(w_OI[None], curvature.factor_II, [bits], [GROUP])[0].dequantize()


def carried_out(option: Option, rounds: int, name: str, w_OI: Tensor, curvature: Curvature) -> Tensor:
    ((_, found),) = decompose([w_OI], curvature, [option], rounds)
    return found.dense()


def planned(plan: Plan, name: str, w_OI: Tensor, curvature: Curvature) -> Tensor:
    return carried_out(plan.layers[name].option, 4, name, w_OI, curvature)


def plain_rungs() -> dict[str, Rung]:
    """Those that weigh every token evenly."""
    found: dict[str, Rung] = {}
    for bits in BITS:
        found[f"{bits} bits, nearest"] = partial(nearest, bits)
        found[f"{bits} bits, GPTQ"] = partial(plain_gptq, bits)
    return found


def weighted_rungs() -> dict[str, Rung]:
    found: dict[str, Rung] = {}
    for bits in BITS:
        found[f"{bits} bits, GPTQ, tokens weighted"] = partial(plain_gptq, bits)
        found[f"{bits} bits, descent"] = partial(carried_out, Option(bits, 0, GROUP, 0), 1)
    for bits in BITS[:2]:
        for factor_bits, rounds in ((4, 1), (4, 4), (8, 4)):
            name = f"{bits} bits, rank {RANK}, {factor_bits}-bit factors, rounds {rounds}"
            found[name] = partial(carried_out, Option(bits, RANK, GROUP, factor_bits), rounds)
    return found


@torch.no_grad()
def measured(
    loaded: LoadedModel,
    calibration_NT: Tensor,
    tokens_NT: Tensor,
    rungs: dict[str, Rung],
    folder: Path,
    token_weights: TokenWeights | None = None,
) -> dict[str, tuple[float, float]]:
    """KL in nats per token and its standard error of every rung; without token weights, Hessians are of all evenly."""
    weights: dict[str, dict[str, Tensor]] = {name: {} for name in rungs}
    report = progress()
    for block in block_works(loaded, calibration_NT, token_weights, folder):
        curvatures: dict[int, Curvature] = {}
        for work in block.layers():
            key = id(work.hessian_II)
            if key not in curvatures:
                curvatures[key] = Curvature.of(work.hessian_II)
            for name, rung in rungs.items():
                weights[name][work.name] = rung(work.name, work.weight_OI, curvatures[key])
        report("compressing", block.index + 1, len(loaded.block_names))
    reference = stored_logits(loaded, tokens_NT, folder / "reference_logits.f32")
    found = {}
    for place, (name, by_layer) in enumerate(weights.items()):
        with loaded.replacing(lambda layer, by_layer=by_layer: by_layer[layer.name]):
            kl_N = compare(loaded.model, reference, tokens_NT)[:, 0]
        found[name] = (kl_N.mean().item(), kl_N.std().item() / len(kl_N) ** 0.5)
        report("measuring", place + 1, len(weights))
    return found


def asked(description: str | None) -> tuple[Profile, LoadedModel, Tensor]:
    """The profile on the command line, its model, and the windows (N, T) of the texts."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("profile", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=32_768)
    arguments = parser.parse_args()
    profile = load_profile(arguments.profile)
    loaded = open_model(find_model(profile.document.model.id))
    share = arguments.tokens // len(arguments.texts)
    tokens_NT = torch.cat([text_tokens(loaded, text, share) for text in arguments.texts])
    return profile, loaded, tokens_NT


def main() -> None:
    profile, loaded, tokens_NT = asked(__doc__)
    plans = {budget: plan_budget(profile, budget) for budget in BUDGETS}
    plain, weighted = plain_rungs(), weighted_rungs()
    wanted = weighted | {budget: partial(planned, plan) for budget, plan in plans.items()}
    calibration_NT, token_weights = profile.calibration()
    with TemporaryDirectory() as folder:
        found = measured(loaded, calibration_NT, tokens_NT, plain, Path(folder))
        found |= measured(loaded, calibration_NT, tokens_NT, wanted, Path(folder), token_weights)
    print(f"{profile.document.model.id}: KL in nats per token, ± its standard error")
    for name in (*plain, *weighted):
        print(f"  {name:44} {found[name][0]:.4f} ± {found[name][1]:.4f}")
    sizes = {bits: plan_budget(profile, None, f"uniform:{bits}").total_bytes for bits in BITS}
    points = [(sizes[bits], found[f"{bits} bits, GPTQ"][0]) for bits in BITS]
    for budget, plan in plans.items():
        ratio = found[budget][0] / interpolated_uniform_cost(points, plan.total_bytes)
        print(f"  {budget:8} {plan.total_bytes:,} bytes {found[budget][0]:.4f}, over plain GPTQ {ratio:.3f}")


if __name__ == "__main__":
    main()
