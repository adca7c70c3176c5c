"""The worker: executes a plan block by block and writes a checkpoint that transformers loads.

What lives here: decomposing the layers of a block as the plan says, writing each block as one safetensors shard,
resuming, and finishing the directory. Where weights and Hessians come from is the caller's: it hands over one
`BlockWork` at a time, so that only one block is in memory.

Files. Everything is written to `<output>.partial`; a finished block's shard carries the plan's digest, so that a
later run with the same plan skips it, and the directory takes its final name when it is complete.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from allocator.atomic import TEMPORARY, write_atomically
from allocator.errors import BitrankError
from allocator.plan import Plan, PlanLayer
from allocator.storage import KEEP_BITS
from compressor.cuda.cuda_streams import side_by_side
from compressor.lowrank.decompose import ROUNDS, decompose
from compressor.lowrank.hessian import Curvature
from compressor.metadata import with_metadata
from compressor.nn.embedding import embedding_tensors, table_tensors
from compressor.nn.linear import layer_tensors
from compressor.plugin import FORMAT_VERSION, METHOD

INDEX = "model.safetensors.index.json"
AUXILIARY = ("*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt", "kv_cache.bases")


class WorkError(BitrankError):
    """The plan cannot be carried out here; the message says why."""


@dataclass(frozen=True, slots=True)
class LayerWork:
    """One layer to decompose: W (O, I) float32 and the Hessian of its input (I, I)."""

    name: str
    weight_OI: Tensor
    hessian_II: Tensor
    stored: Tensor
    """The weight as the checkpoint stores it, for a layer that the plan keeps."""


@dataclass(frozen=True, slots=True)
class BlockWork:
    """One block's layers; `layers` is called only if the block is not finished yet."""

    index: int
    layers: Callable[[], list[LayerWork]]


def compress(
    plan: Plan,
    blocks: Iterable[BlockWork],
    kept: dict[str, Tensor],
    source: Path,
    output: Path,
    progress: Callable[[str, int, int], None],
    block_count: int,
    beside: Mapping[str, bytes] = {},
) -> None:
    """Write the checkpoint that `plan` describes to `output`, which must not exist or be empty.

    kept: the tensors outside the blocks' layers, tables among them; source: the original directory, whose
    configuration and tokenizer are copied; beside: further files, by name. Raises `WorkError` when the output is
    occupied or the tensors are not the plan's.
    """
    check_output(output)
    sizes = {name: t.numel() * t.element_size() for name, t in kept.items()}
    tables = {name: kept[f"{name}.weight"] for name in plan.tables if f"{name}.weight" in kept}
    rest = {name: size for name, size in sizes.items() if name.removesuffix(".weight") not in tables}
    if rest != plan.kept or tables.keys() != plan.tables.keys():
        raise WorkError("the model's uncompressed tensors differ from the plan's; make the plan again")
    partial = output.with_name(f"{output.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    digest = plan_digest(plan)
    for stray in [file for file in partial.iterdir() if not is_finished(file, digest)]:
        stray.unlink()
    shards = [shard_name(index, block_count) for index in range(block_count + 1)]
    if not is_finished(partial / shards[0], digest):
        outside = {name: kept[name] for name in rest} | compress_tables(plan, tables)
        write_shard(partial / shards[0], outside, digest)
    with ThreadPoolExecutor(1, thread_name_prefix="shards") as writer:
        writing: Future[None] | None = None  # one shard at most: it stays in memory until it is written
        for block in blocks:
            shard = partial / shards[block.index + 1]
            if not is_finished(shard, digest):
                tensors = compress_block(plan, block.layers())
                if writing is not None:
                    writing.result()
                writing = writer.submit(write_shard, shard, tensors, digest)
            progress("compressing", block.index + 1, block_count)
        if writing is not None:
            writing.result()
    for name, data in beside.items():
        write_atomically(partial / name, data)
    finish(partial, shards, source, quantization_config(plan), plan.total_bytes)
    put_in_place(partial, output)


def plan_digest(plan: Plan) -> str:
    """What every shard of a plan's checkpoint carries as `plan_sha256`."""
    return hashlib.sha256(plan.model_dump_json().encode()).hexdigest()


def put_in_place(partial: Path, output: Path) -> None:
    """Give a finished directory its final name; `output` is absent or empty.

    What a killed process had written, but not yet renamed, stays behind: a whole file under a temporary name.
    """
    for stray in partial.glob(f".*{TEMPORARY}"):
        stray.unlink()
    if output.exists():
        output.rmdir()
    partial.rename(output)


def check_output(output: Path) -> None:
    """Raise `WorkError` unless `output` is free."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise WorkError(f"{output} already exists and is not empty; choose another directory or remove it")


def shard_name(index: int, block_count: int) -> str:
    return f"model-{index + 1:05d}-of-{block_count + 1:05d}.safetensors"


def compress_tables(plan: Plan, tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every stored tensor of the plan's tables, by full name; tables: their weights (V, d) by their names."""
    tensors: dict[str, Tensor] = {}
    for name, weight_Vd in tables.items():
        planned, option = plan.layers[name], plan.layers[name].option
        if planned.bits == KEEP_BITS:
            stored = {"weight": weight_Vd}
        elif plan.tables[name] == "head":
            stored = table_tensors(weight_Vd, option)
        else:
            stored = embedding_tensors(weight_Vd, option)
        _check_bytes(name, planned, stored)
        tensors |= {f"{name}.{part}": tensor for part, tensor in stored.items()}
    return tensors


def compress_block(plan: Plan, layers: list[LayerWork]) -> dict[str, Tensor]:
    """Every stored tensor of one block's layers, by full name."""
    tensors: dict[str, Tensor] = {}
    tasks = [partial(_compress_layer, plan.layers[work.name], work) for work in layers]
    largest = max(work.weight_OI.numel() for work in layers)
    for name, stored in side_by_side(layers[0].weight_OI.device, tasks, largest):
        _check_bytes(name, plan.layers[name], stored)
        tensors |= {f"{name}.{part}": tensor for part, tensor in stored.items()}
    return dict(sorted(tensors.items()))


def _compress_layer(planned: PlanLayer, work: LayerWork) -> tuple[str, dict[str, Tensor]]:
    if planned.bits == KEEP_BITS:
        return work.name, {"weight": work.stored.cpu().contiguous()}
    curvature = Curvature.of(work.hessian_II)
    ((_, decomposition),) = decompose([work.weight_OI], curvature, [planned.option], ROUNDS)
    return work.name, {part: tensor.cpu() for part, tensor in layer_tensors(decomposition).items()}


def _check_bytes(name: str, planned: PlanLayer, stored: dict[str, Tensor]) -> None:
    written = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    if written != planned.bytes:
        raise WorkError(
            f"{name} takes {written:,} bytes but the plan says {planned.bytes:,}; make the plan again"
        )


def write_shard(path: Path, tensors: dict[str, Tensor], digest: str) -> None:
    write_atomically(path, with_metadata(save(tensors), {"format": "pt", "plan_sha256": digest}))


def is_finished(path: Path, digest: str) -> bool:
    """Whether `path` is a whole shard of this plan."""
    if not path.exists():
        return False
    try:
        with safe_open(path, framework="pt") as shard:
            return (shard.metadata() or {}).get("plan_sha256") == digest
    except SafetensorError:
        return False


def finish(
    partial: Path, shards: list[str], source: Path, quantization: dict[str, Any], total_bytes: int
) -> None:
    """Write the shard index and the configuration, and copy the tokenizer from `source`."""
    weight_map: dict[str, str] = {}
    for shard in shards:
        with safe_open(partial / shard, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  safe_open is not a mapping
                weight_map[name] = shard
    for pattern in AUXILIARY:
        for file in source.glob(pattern):
            if file.name not in ("config.json", INDEX):
                write_atomically(partial / file.name, file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = quantization
    write_json(partial / "config.json", config)
    write_json(
        partial / INDEX,
        {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))},
    )


def quantization_config(plan: Plan) -> dict[str, Any]:
    """What config.json says of the compressed layers; see `plugin.py`."""
    compressed = {name: layer for name, layer in plan.layers.items() if layer.bits != KEEP_BITS}
    is_new = any(layer.heads > 1 or layer.rotated for layer in compressed.values())
    return {
        "quant_method": METHOD,
        "format_version": FORMAT_VERSION if is_new or compressed.keys() & plan.tables else 1,
        "layers": {
            name: layer.model_dump(include={"bits", "rank", "group_size", "factor_bits", "heads", "rotated"})
            for name, layer in compressed.items()
        },
    }


def write_json(path: Path, document: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(document, indent=2) + "\n").encode())
