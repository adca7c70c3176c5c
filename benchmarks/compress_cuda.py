"""Compressing a model of random weights on a GPU to a mixed plan with rank: time, bytes, peak memory.

`python -m benchmarks.compress_cuda llama-3-8b|qwen2-1.5b [--blocks N] [--tokens N]` writes a checkpoint of that shape
into a temporary folder and carries a plan out as `bitrank compress` does: calibration through every block, options
from 2 to 5 bits, two layers in three with rank. The plan is not made from a profile; what a layer costs is the same.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from itertools import cycle
from pathlib import Path

import numpy as np
import torch

from allocator.plan import Plan, PlanBudget, PlanModel
from allocator.planner import Planner
from allocator.problem import LayerMenu, Menu
from allocator.storage import Option, layer_bytes
from api.cli.console import peak_memory_bytes
from api.cli.progress import progress
from benchmarks.sweep_cuda import GIB, config_of, write_random_model
from compressor.checkpoint_writer import compress
from profiler.execution.block_pipeline import block_works
from profiler.model.checkpoint import find_model
from profiler.model.layers import LoadedModel, open_model
from profiler.sweep.run import DEFAULT_TOKENS

OPTIONS = (
    Option(2, 128, 64, 8),
    Option(3, 64, 128, 4),
    Option(4, 0, 64, 0),
    Option(3, 128, 64, 8),
    Option(2, 256, 64, 8),
    Option(5, 0, 128, 0),
)


def mixed_plan(loaded: LoadedModel, kept: dict[str, int]) -> Plan:
    """Every layer with the one option that it is offered, at no cost."""
    none = np.zeros(1)
    layers = [
        LayerMenu(
            layer.name,
            layer.rows,
            layer.columns,
            2 * layer.weights,
            (option,),
            np.array([layer_bytes(layer.rows, layer.columns, option, 2 * layer.weights)]),
            none,
            none,
        )
        for layer, option in zip(loaded.layers, cycle(OPTIONS), strict=False)
    ]
    menu = Menu(tuple(layers), kept)
    model = PlanModel(id=loaded.ref.id, revision=None, weights_sha256="0" * 64)
    planner, total = Planner(menu, model, "0" * 64, (1.0, 1.0)), menu.smallest_bytes
    found = planner.optimum(total)
    return planner.plan(
        found.choice, budget=PlanBudget(text=f"{total}B", bytes=total), bound=found, strategy="mixed"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("shape", choices=("llama-3-8b", "qwen2-1.5b"))
    parser.add_argument("--blocks", type=int, help="fewer blocks than the model has")
    parser.add_argument("--tokens", type=int, default=DEFAULT_TOKENS)
    arguments = parser.parse_args()
    config = config_of(arguments.shape, arguments.blocks)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_random_model(config, folder / "model")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        print(
            f"{torch.cuda.get_device_name()}: {arguments.shape}, {config.num_hidden_layers} blocks",
            flush=True,
        )
        started = time.perf_counter()
        carry_out(folder, arguments.tokens)
        seconds = time.perf_counter() - started
    print(f"  compressing           {seconds:8.1f} s")
    print(f"  peak on the card      {torch.cuda.max_memory_allocated() / GIB:8.1f} GiB")
    print(f"  peak of the process   {peak_memory_bytes() / GIB:8.1f} GiB")


def carry_out(folder: Path, tokens: int) -> None:
    loaded = open_model(find_model(str(folder / "model")), "cuda")
    kept = {name: tensor.cpu() for name, tensor in loaded.kept_tensors()}
    plan = mixed_plan(loaded, {name: t.numel() * t.element_size() for name, t in kept.items()})
    vocabulary = loaded.model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    tokens_NT = torch.randint(vocabulary, (tokens // loaded.window, loaded.window), generator=generator)
    activations = folder / "activations"
    activations.mkdir()
    blocks = block_works(loaded, tokens_NT, None, activations)
    compress(plan, blocks, kept, loaded.ref.path, folder / "compressed", progress(), len(loaded.block_names))
    weights = sum(layer.weights for layer in loaded.layers)
    bits = 8 * plan.compressible_bytes / weights
    print(f"  {plan.total_bytes:,} tensor bytes, {bits:.2f} bits per weight", flush=True)


if __name__ == "__main__":
    main()
