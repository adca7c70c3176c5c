"""Weights and key-value cache under one budget, against the best of ten splits by hand.

`python -m benchmarks.joint PROFILE TEXT --budget 9MiB --context 512 --batch 8` plans both together, then gives the
cache ten shares of the same bytes, evenly spaced between the least and the most that either can take, and plans each
part by itself, optimally. All are carried out and measured: KL of the weights alone, of the cache alone, and of both.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from allocator.kv_cache import CacheMenu, joint_bytes, joint_problem, parse_joint_budget, planned_cache
from allocator.problem import Floats, Integers, Menu
from allocator.solver.knapsack import solve
from api.cli.progress import progress
from api.services.kvcache import cache_profile
from compressor.kvcache.layout import FILE, CacheLayout, layout_file, load_layout
from profiler.documents.profile import load_profile
from profiler.evaluation.divergence import compare, stored_logits
from profiler.evaluation.plan_evaluation import Calibration, Trial, measure_trials, trial_of, trial_weight
from profiler.kvcache.profile import CacheProfile
from profiler.model.checkpoint import find_model
from profiler.model.layers import LoadedModel, load_model, open_model
from profiler.statistics.calibration import text_tokens

SPLITS = 10


@dataclass(frozen=True, slots=True)
class Split:
    """One way to spend the budget. Choices count options, `choice` of the layers, `cached` of the cache's groups."""

    name: str
    choice: Integers
    cached: Integers
    weight_bytes: int
    cache_bytes: int
    predicted_kl: float


def splits(menu: Menu, cache: CacheMenu, total: int) -> list[Split]:
    """The joint optimum, then the hand-made splits."""
    problem = joint_problem(menu, cache, total)
    both = solve(problem)
    layers = len(menu.layers)
    taken = problem.size[problem.start[:-1] + both.choice]
    found = [
        Split(
            "joint",
            both.choice[:layers],
            both.choice[layers:],
            menu.kept_bytes + int(taken[:layers].sum()),
            int(taken[layers:].sum()),
            both.cost,
        )
    ]
    least = max(cache.smallest_bytes, total - menu.original_bytes)
    most = min(cache.plain_bytes, total - menu.smallest_bytes)
    for share in np.linspace(0, 1, SPLITS):
        size = round(least + share * (most - least))
        cached, weights = solve(cache.problem(size)), solve(menu.problem(total - size))
        found.append(
            Split(
                f"{size / total:.0%} to the cache",
                weights.choice,
                cached.choice,
                menu.kept_bytes + weights.total_bytes,
                cached.total_bytes,
                weights.cost + cached.cost,
            )
        )
    return found


def layout_of(profile: CacheProfile, menu: CacheMenu, cached: Integers, loaded: LoadedModel) -> CacheLayout:
    """The cache as a checkpoint carries it."""
    with TemporaryDirectory() as folder:
        (Path(folder) / FILE).write_bytes(layout_file(planned_cache(menu, cached), profile.bases))
        return load_layout(Path(folder), loaded.model)


@torch.no_grad()
def measured(
    loaded: LoadedModel,
    whole: LoadedModel,
    empty: Sequence[Callable[[], Cache]],
    trials: Sequence[Trial],
    calibration: Calibration,
    tokens_NT: Tensor,
    folder: Path,
) -> Floats:
    """(splits, 3, N): KL of weights, cache, both."""
    weights_PN = measure_trials(loaded, calibration, tokens_NT, trials, folder, progress())[:, :, 0]
    reference = stored_logits(whole, tokens_NT, folder / "reference.f32")
    rows = []
    for p, (trial, cache) in enumerate(zip(trials, empty, strict=True)):
        by_cache = compare(whole.model, reference, tokens_NT, cache=cache)[:, 0]
        with loaded.replacing(
            lambda layer, trial=trial: trial_weight(loaded, layer, trial[layer.name], folder)
        ):
            by_both = compare(loaded.model, reference, tokens_NT, cache=cache)[:, 0]
        rows.append(torch.stack([weights_PN[p], by_cache, by_both]))
    return torch.stack(rows).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("profile", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--budget", required=True)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8_192, help="held-out tokens")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    profile = load_profile(arguments.profile)
    ref = find_model(profile.document.model.id)
    cache = cache_profile(profile, arguments.context, progress(), arguments.device)
    menu = cache.menu(arguments.context, arguments.batch)
    total = joint_bytes(profile.menu, menu, parse_joint_budget(arguments.budget))
    found = splits(profile.menu, menu, total)
    loaded, whole = open_model(ref, arguments.device), load_model(ref, arguments.device)
    tokens_NT = text_tokens(loaded, arguments.text, arguments.tokens)
    trials = [trial_of(profile.menu, split.choice) for split in found]
    empty = [layout_of(cache, menu, split.cached, whole).empty for split in found]
    with TemporaryDirectory() as folder:
        kl_P3N = measured(loaded, whole, empty, trials, profile.calibration(), tokens_NT, Path(folder))
    print(
        f"{ref.id}, {arguments.budget}: {total:,} bytes for weights and {menu.batch} × {menu.context} tokens"
    )
    print(
        "split                  weights bytes   cache bytes   predicted   weights    cache     both   over joint"
    )
    joint_N = kl_P3N[0, 2]
    for split, kl_3N in zip(found, kl_P3N, strict=True):
        weights, cached, both = kl_3N.mean(axis=1)
        over_N = kl_3N[2] - joint_N
        error = over_N.std(ddof=1) / len(over_N) ** 0.5
        print(
            f"{split.name:20} {split.weight_bytes:15,} {split.cache_bytes:13,} {split.predicted_kl:11.4f}"
            f" {weights:9.4f} {cached:8.4f} {both:8.4f}   {over_N.mean():+.4f} ± {error:.4f}"
        )


if __name__ == "__main__":
    main()
