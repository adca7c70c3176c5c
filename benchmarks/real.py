"""The road on a model that people know: plans, uniform and peers at the same bytes, on three held-out texts.

`python -m benchmarks.real MODEL --data DIR [--device cuda] [--calibration human sampled] [--out FILE.json]` profiles
MODEL with every default, once under DIR/calibration.txt and once under text sampled from the model. It plans three
budgets, carries these and uniform plans out in one pass over the blocks, and measures KL on held-out books, held-out
documents and WikiText-2. Bytes are those of the decoder's matrices. Peers and October's uniform plans do not change, so
they were measured once: `results/*.json` holds them, with commands and digests of their calibration tokens.

`python -m benchmarks.real --table FILE.json` prints the table of an earlier run.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

BUDGETS = ("2.75bpw", "3.3bpw", "4.3bpw")
UNIFORM_BITS = (2, 3, 4, 5)
TEXTS = ("wikitext-2-valid", "heldout-books", "heldout-docs")
RESULTS = Path(__file__).parent / "results"
PEERS = {
    "October's uniform": "2026-12-01-october-uniform-gemma-3-270m.json",
    "AutoRound": "2026-12-01-autoround-gemma-3-270m.json",
}
TOKENS = 32_768
Point = tuple[float, float]
"""Bits per weight and KL."""


def measured(model: str, data: Path, kind: str, device: str, work: Path) -> dict[str, Any]:
    """Profile, plans and their KL under one calibration; the seconds that each step took."""
    import torch

    from api.cli.progress import progress
    from api.services import usecases
    from profiler.evaluation.plan_evaluation import measure_trials
    from profiler.model.checkpoint import find_model
    from profiler.model.layers import open_model
    from profiler.statistics.calibration import text_tokens
    from profiler.sweep.run import ProfileSettings

    seconds, stages = {}, _Stages()
    calibration = (data / "calibration.txt",) if kind == "human" else ()
    settings = ProfileSettings(calibration=calibration, device=device)
    started = time.perf_counter()
    profile = usecases.profile_model(model, work / kind, settings, stages)
    seconds["profile"] = time.perf_counter() - started
    plans = {budget: usecases.plan_budget(profile, budget) for budget in BUDGETS}
    plans |= {
        f"uniform:{bits}": usecases.plan_budget(profile, None, f"uniform:{bits}") for bits in UNIFORM_BITS
    }
    for name, plan in plans.items():
        plan.save(work / f"{kind}-{name.replace(':', '-')}.json")
    loaded = open_model(find_model(model), device)
    texts = [text_tokens(loaded, data / f"{text}.txt", TOKENS) for text in TEXTS]
    trials = [{name: layer.option for name, layer in plan.layers.items()} for plan in plans.values()]
    folder = work / f"{kind}-trials"
    folder.mkdir(exist_ok=True)
    found_PN5 = measure_trials(loaded, profile.calibration(), torch.cat(texts), trials, folder, progress())
    check = profile.document.check
    return {
        "calibration": kind,
        "source": profile.document.calibration.source,
        "seconds": seconds | {"stages": stages.seconds()},
        "gain": profile.document.gain.mean,
        "check": None if check is None else check.model_dump(),
        "warnings": list(profile.warnings),
        "plans": {
            name: {
                "bits_per_weight": 8
                * (plan.total_bytes - sum(plan.kept.values()))
                / profile.menu.compressible_weights,
                "total_bytes": plan.total_bytes,
                "predicted_kl": plan.predicted_kl,
                "interval": list(plan.predicted_kl_interval),
                "with_rank": sum(layer.rank > 0 for layer in plan.layers.values()),
                "kl": {
                    text: _mean(kl_N)
                    for text, kl_N in zip(TEXTS, found_N5[:, 0].split([len(t) for t in texts]), strict=True)
                },
            }
            for (name, plan), found_N5 in zip(plans.items(), found_PN5, strict=True)
        },
    }


def _mean(kl_N: Any) -> dict[str, float]:
    return {"mean": kl_N.mean().item(), "standard_error": kl_N.std().item() / len(kl_N) ** 0.5}


class _Stages:
    """Progress that notes how long each stage took."""

    def __init__(self) -> None:
        self.marks: list[tuple[str, float]] = []

    def __call__(self, stage: str, done: int, total: int) -> None:
        if not self.marks or self.marks[-1][0] != stage:
            self.marks.append((stage, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        ends = [*(at for _, at in self.marks[1:]), time.perf_counter()]
        return {stage: end - at for (stage, at), end in zip(self.marks, ends, strict=True)}


def interpolated(points: Sequence[Point], bits: float) -> float:
    """KL at a size, log-interpolated between the neighbours, or along the nearest pair."""
    ordered = sorted(points)
    upper = next((k for k in range(1, len(ordered)) if ordered[k][0] >= bits), len(ordered) - 1)
    (b0, kl0), (b1, kl1) = ordered[upper - 1], ordered[upper]
    share = (bits - b0) / (b1 - b0)
    return math.exp(math.log(kl0) * (1 - share) + math.log(kl1) * share)


def peer_points(document: Mapping[str, Any], kind: str, text: str) -> list[Point]:
    rows = [row for row in document["rows"] if row["calibration"] == kind]
    return [(row["bits_per_weight"], row["kl"][text]) for row in rows]


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Every cell, and geometric means with the worst cell of each ratio."""
    peers = {name: json.loads((RESULTS / file).read_text()) for name, file in PEERS.items()}
    names = ["uniform", *peers]
    lines = [
        "| calibration | text | budget | KL | ± | predicted | 90 % interval | predicted ÷ measured | "
        + " | ".join(f"÷ {name}" for name in names)
        + " |",
        "|---" * (8 + len(names)) + "|",
    ]
    ratios: dict[str, list[float]] = {name: [] for name in names}
    for run in runs:
        plans = run["plans"]
        for text in TEXTS:
            uniform = [
                (plans[f"uniform:{b}"]["bits_per_weight"], plans[f"uniform:{b}"]["kl"][text]["mean"])
                for b in UNIFORM_BITS
            ]
            for budget in BUDGETS:
                plan = plans[budget]
                bits, kl = plan["bits_per_weight"], plan["kl"][text]["mean"]
                low, high = plan["interval"]
                cells = []
                for name in names:
                    points = (
                        uniform if name == "uniform" else peer_points(peers[name], run["calibration"], text)
                    )
                    ratio = kl / interpolated(points, bits)
                    ratios[name].append(ratio)
                    cells.append(f"{ratio:.3f}")
                lines.append(
                    f"| {run['calibration']} | {text} | {budget} | {kl:.4f} |"
                    f" {plan['kl'][text]['standard_error']:.4f} | {plan['predicted_kl']:.4f} | {low:.4f}–{high:.4f} |"
                    f" {plan['predicted_kl'] / kl:.2f} | " + " | ".join(cells) + " |"
                )
    for name, found in ratios.items():
        mean = math.exp(sum(map(math.log, found)) / len(found))
        lines.append(
            f"\nPlan ÷ {name}: geometric mean {mean:.3f}, worst {max(found):.3f} of {len(found)} cells."
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--calibration", nargs="+", default=["human", "sampled"])
    parser.add_argument("--work", type=Path, default=Path("benchmarks/.work/real"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path)
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(arguments.table.read_text())["runs"]))
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    runs: list[dict[str, Any]] = []
    for kind in arguments.calibration:
        runs.append(measured(arguments.model, arguments.data, kind, arguments.device, arguments.work))
        if arguments.out:
            header = {"date": date.today().isoformat(), "machine": _machine(arguments.device)}
            arguments.out.write_text(json.dumps(header | {"runs": runs}, indent=1) + "\n")
    print(table(runs))


def _machine(device: str) -> str:
    if not device.startswith("cuda"):
        return platform.processor() or platform.machine()
    import torch

    return torch.cuda.get_device_name(device)


if __name__ == "__main__":
    main()
