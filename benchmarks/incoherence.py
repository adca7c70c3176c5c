"""What rotating inputs is worth and costs: held-out KL with and without, and tokens a second.

`python -m benchmarks.incoherence PROFILE TEXT…` wants a profile made with `--rotations`. It measures uniform settings
plain and rotated, then the optimum at four budgets with rotations banned and offered, then the speed of both uniform
checkpoints of 3 bits, in turns.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import torch

from allocator.constraints.rules import Ban, Constraints, Pattern
from allocator.plan import Plan
from api.cli.progress import progress
from api.services.usecases import execute, plan_budget
from benchmarks.ladder import asked, measured, planned
from profiler.documents.profile import Profile
from profiler.evaluation.divergence import tokens_per_second
from profiler.model.checkpoint import find_model
from profiler.model.layers import LoadedModel, load_model

BUDGETS = ("2.3bpw", "2.6bpw", "3.0bpw", "3.3bpw")
UNROTATED = Constraints(bans=(Ban("*", Pattern(rotated=True)),))
TURNS, PROMPT = 15, 256


def pairs(profile: Profile) -> dict[str, tuple[Plan, Plan]]:
    """Without rotations and with them, at the same bytes."""
    found = {}
    for bits in (2, 3, 4):
        found[f"uniform {bits} bits"] = (
            plan_budget(profile, None, f"uniform:{bits}"),
            plan_budget(profile, None, f"uniform:{bits}:rotated"),
        )
    for budget in BUDGETS:
        found[budget] = plan_budget(profile, budget, constraints=UNROTATED), plan_budget(profile, budget)
    return found


@torch.inference_mode()
def prompt_tokens_per_second(loaded: LoadedModel) -> float:
    ids = torch.zeros(1, PROMPT, dtype=torch.int64)
    started = perf_counter()
    loaded.model(ids, use_cache=True)
    return PROMPT / (perf_counter() - started)


def speeds(profile: Profile, plans: tuple[Plan, Plan], folder: Path) -> None:
    """Decoding and reading a prompt, the fastest of several turns: the machine may be busy with other things."""
    models = []
    for place, plan in enumerate(plans):
        execute(plan, profile, folder / str(place), progress())
        models.append(load_model(find_model(str(folder / str(place)))))
    for name, speed in (("decoding", tokens_per_second), ("reading a prompt", prompt_tokens_per_second)):
        turns = [[speed(model) for model in models] for _ in range(TURNS)]
        plain, rotated = (max(values) for values in zip(*turns, strict=True))
        print(
            f"  {name:18} plain {plain:.1f}, rotated {rotated:.1f} tokens/s: {1 - rotated / plain:.1%} slower"
        )


def main() -> None:
    profile, loaded, tokens_NT = asked(__doc__)
    compared = pairs(profile)
    wanted = {(name, side): plan for name, both in compared.items() for side, plan in enumerate(both)}
    rungs = {f"{name} {side}": partial(planned, plan) for (name, side), plan in wanted.items()}
    print(f"{profile.document.model.id}: KL in nats per token, predicted and measured")
    with TemporaryDirectory() as folder:
        calibration_NT, weights = profile.calibration()
        kl = measured(loaded, calibration_NT, tokens_NT, rungs, Path(folder), weights)
        for name, both in compared.items():
            plain, rotated = (kl[f"{name} {side}"][0] for side in (0, 1))
            layers = both[1].layers.values()
            print(
                f"  {name:16} plain {both[0].predicted_kl:.4f} {plain:.4f},"
                f" rotated {both[1].predicted_kl:.4f} {rotated:.4f}: {rotated / plain - 1:+.1%},"
                f" {sum(layer.rotated for layer in layers)} of {len(layers)} layers"
            )
        speeds(profile, compared["uniform 3 bits"], Path(folder))


if __name__ == "__main__":
    main()
