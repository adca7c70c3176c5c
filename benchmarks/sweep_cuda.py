"""Profiling a model of random weights on a GPU: time of every stage, peak memory, and the floor beside them.

`python -m benchmarks.sweep_cuda llama-3-8b|qwen2-1.5b [--blocks N]` writes a checkpoint of that shape into a temporary
folder and profiles its blocks with the default grid. The floor of the sweep is its operations at the rate of a large
product: GPTQ's I²·O for every option and round, and as much again, twice, for every error measured; and its bytes,
every weight read once for each option. The finishing stage (probes and studies) is not run.

`--cards N` has N processes, each with a card of its own, sweep the blocks of one run from the folder that they share;
the time is that from when all have opened the model to when the last block is done.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

from api.cli.console import peak_memory_bytes
from api.cli.progress import progress
from profiler.documents.workspace import prepare
from profiler.model.checkpoint import find_model
from profiler.statistics.calibration import Progress, silent
from profiler.sweep.run import (
    DEFAULT_TOKENS,
    ProfileRun,
    ProfileSettings,
    begin_profile,
    open_run,
    read_sweep,
    sweep_blocks,
)

GIB = 2**30


def config_of(shape: str, blocks: int | None) -> PretrainedConfig:
    if shape == "llama-3-8b":
        return LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=blocks or 32,
            num_attention_heads=32,
            num_key_value_heads=8,
            rope_theta=500000.0,
        )
    return Qwen2Config(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=blocks or 28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )


def write_random_model(config: PretrainedConfig, folder: Path) -> None:
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def product_rate(tf32: bool) -> float:
    torch.backends.cuda.matmul.allow_tf32 = tf32
    a, b = (torch.randn(8192, 8192, device="cuda") for _ in range(2))
    a @ b
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(5):
        a @ b
    torch.cuda.synchronize()
    torch.backends.cuda.matmul.allow_tf32 = False
    return 5 * 2 * 8192**3 / (time.perf_counter() - started)


def sweep(run: ProfileRun, blocks: range, report: Progress) -> tuple[float, int]:
    """Seconds and the most bytes held on the card."""
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    sweep_blocks(run, blocks, report)
    torch.cuda.synchronize()
    return time.perf_counter() - started, torch.cuda.max_memory_allocated()


def sweep_by_many(folder: Path, settings: ProfileSettings, cards: int) -> tuple[float, int]:
    """As `sweep`, of the slowest card and of the fullest."""
    context = multiprocessing.get_context("spawn")
    ready, found = context.Barrier(cards), context.SimpleQueue()
    processes = [
        context.Process(target=sweep_share, args=(card, cards, folder, settings, ready, found))
        for card in range(cards)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("a card's process failed")
    seconds, held = zip(*(found.get() for _ in processes), strict=True)
    return max(seconds), max(held)


def sweep_share(
    card: int, cards: int, folder: Path, settings: ProfileSettings, ready: Any, found: Any
) -> None:
    """Every `cards`-th block, on a card of its own."""
    device = f"cuda:{card}"
    torch.cuda.set_device(device)
    run = open_run(find_model(str(folder / "model")), folder / "profile", replace(settings, device=device))
    ready.wait()
    found.put(sweep(run, range(card, run.block_count, cards), silent))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("shape", choices=("llama-3-8b", "qwen2-1.5b"))
    parser.add_argument("--blocks", type=int, help="fewer blocks than the model has")
    parser.add_argument("--tokens", type=int, default=DEFAULT_TOKENS)
    parser.add_argument("--cards", type=int, default=1, help="cards that share the sweep")
    parser.add_argument("--adaptive", action="store_true", help="as `bitrank profile --adaptive`")
    arguments = parser.parse_args()
    config = config_of(arguments.shape, arguments.blocks)
    with tempfile.TemporaryDirectory() as name:
        profile(config, Path(name), arguments)


def profile(config: PretrainedConfig, folder: Path, arguments: argparse.Namespace) -> None:
    started = time.perf_counter()
    write_random_model(config, folder / "model")
    torch.cuda.empty_cache()
    print(f"{torch.cuda.get_device_name()}: {arguments.shape}, {config.num_hidden_layers} blocks", flush=True)
    print(f"  writing random weights {time.perf_counter() - started:8.1f} s", flush=True)
    report, settings = (
        progress(),
        ProfileSettings(tokens=arguments.tokens, device="cuda", adaptive=arguments.adaptive),
    )
    started = time.perf_counter()
    run = open_run(find_model(str(folder / "model")), folder / "profile", settings)
    print(f"  opening, digest        {time.perf_counter() - started:8.1f} s", flush=True)
    windows = arguments.tokens // run.loaded.window
    tokens_NT = torch.randint(config.vocab_size, (windows, run.loaded.window))
    save_file({"tokens": tokens_NT}, prepare(run.output, run.request) / "sampled.safetensors")
    torch.cuda.reset_peak_memory_stats()
    begin_profile(run, report)
    print(f"  gradients              {report.seconds['gradients']:8.1f} s", flush=True)
    print(f"  peak on the card       {torch.cuda.max_memory_allocated() / GIB:8.1f} GiB", flush=True)
    if arguments.cards == 1:
        spent, held = sweep(run, range(run.block_count), report)
    else:
        spent, held = sweep_by_many(folder, settings, arguments.cards)
    weights = sum(layer.weights for layer in run.loaded.layers)
    sweeps = [read_sweep(run.layer_file(layer), layer) for layer in run.loaded.layers]
    options = sum(not m.half_width for found in sweeps for m in found.measurements)
    read = sum(len(run.grid.options(layer)) * layer.weights * 4 for layer in run.loaded.layers)
    print(
        f"  sweep                  {spent:8.1f} s: {options} options of {weights / 1e9:.2f} G weights",
        flush=True,
    )
    print(f"  peak on the card       {held / GIB:8.1f} GiB")
    print(f"  peak of the process    {peak_memory_bytes() / GIB:8.1f} GiB")
    rates = {kind: product_rate(kind == "TF32") for kind in ("float32", "TF32")}
    once = sum(
        len(run.grid.options(layer)) * 3 * layer.rows * layer.columns**2 for layer in run.loaded.layers
    )
    for kind, rate in rates.items():
        print(f"  floor at {kind:14} {once / rate:8.1f} s: every option rounded and measured once")
    print(f"  floor of bytes         {read / 3e12:8.1f} s: every option's weights read once at 3 TB/s")


if __name__ == "__main__":
    main()
