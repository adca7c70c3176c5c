"""What profiling costs: wall time by stage, GPTQ and low rank apart, and peak memory.

`python -m benchmarks.profile_cost MODEL` profiles a model directory with the default grid into a temporary folder and
prints the shares. Memory is the resident peak of this process; what the interpreter and its libraries take of it is
the peak of a second process that profiles a Llama of two blocks of 16 × 16 in the same way.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from api.cli.console import peak_memory_bytes
from api.cli.progress import progress
from compressor.lowrank import alternating as alternation
from profiler.model.checkpoint import find_model
from profiler.sweep.run import DEFAULT_TOKENS, ProfileSettings, build_profile

MIB = 2**20
LOW_RANK = ("factorize", "leading_directions", "sharpened", "through")
"""Functions that `compressor.lowrank.alternating` calls."""


def timed(name: str, seconds: dict[str, float]) -> None:
    """Time a function of `compressor.lowrank.alternating` in place."""
    inner: Callable[..., Any] = getattr(alternation, name)

    def outer(*arguments: Any, **keywords: Any) -> Any:
        started = time.perf_counter()
        try:
            return inner(*arguments, **keywords)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started

    setattr(alternation, name, outer)


def libraries_bytes(folder: Path) -> int:
    """Peak memory of profiling a model of no size."""
    model = folder / "nothing"
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=64,
        max_position_embeddings=64,
        bos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(model)
    command = [sys.executable, "-m", "api.main", "profile", str(model), "-o", str(folder / "of-nothing")]
    done = subprocess.run([*command, "--tokens", "512", "--json"], capture_output=True, check=True, text=True)
    return int(json.loads(done.stdout)["peak_memory_bytes"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, action="append", default=[], help="several are mixed")
    parser.add_argument("--output", type=Path, help="keep the profile here")
    parser.add_argument("--tokens", type=int, default=DEFAULT_TOKENS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        libraries = libraries_bytes(Path(folder))  # first: a child's peak starts at its parent's
    inside: dict[str, float] = {}
    for name in ("rounded", "descended", *LOW_RANK):
        timed(name, inside)
    report = progress()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        settings = ProfileSettings(tuple(arguments.calibration), tokens=arguments.tokens)
        profile = build_profile(
            find_model(arguments.model), arguments.output or Path(folder) / "profile", settings, report
        )
    wall, peak = time.perf_counter() - started, peak_memory_bytes()
    layers = profile.document.layers.values()
    block: dict[int, dict[int, int]] = {}
    for record in layers:
        block.setdefault(record.block, {})[record.columns] = record.columns
    model_bytes = sum(profile.document.kept.values()) * 2 + sum(4 * r.rows * r.columns for r in layers)
    statistics = max(sum(4 * n * n for n in sizes) for sizes in block.values())
    stages = dict(report.seconds)
    sweep = stages.pop("sweep")
    rounding, low_rank = inside["rounded"], sum(inside[name] for name in LOW_RANK)
    parts = {"GPTQ": rounding, "descent": inside["descended"], "low rank": low_rank}
    rows = [*stages.items(), *((f"sweep: {name}", seconds) for name, seconds in parts.items())]
    rows.append(("sweep: Hessians, errors, files", sweep - sum(parts.values())))
    rows.append(("loading, fitting, output", wall - sum(seconds for _, seconds in rows)))
    print(f"{arguments.model}: {wall:.1f} s wall on {torch.get_num_threads()} threads, {len(layers)} layers")
    for name, seconds in rows:
        print(f"  {name:32} {seconds:7.1f} s {seconds / wall:6.1%}")
    print(f"peak {peak / MIB:.0f} MiB resident, of which {libraries / MIB:.0f} MiB interpreter and libraries")
    print(
        f"the rest: {(peak - libraries) / MIB:.0f} MiB, against {(model_bytes + 2 * statistics) / MIB:.0f} MiB:"
        f" the model in float32, {model_bytes / MIB:.0f}, and twice the largest block's Hessians,"
        f" {statistics / MIB:.1f}"
    )


if __name__ == "__main__":
    main()
