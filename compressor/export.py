"""A compressed checkpoint for other runtimes: compressed-tensors for Q, a PEFT adapter for L·R.

What lives here: translating the stored tensors, shard by shard, without loading the model. The configurations that go
with them are `allocator/export/compressed_tensors.py` and `peft.py`. Nothing is quantized anew: codes, scales and zero
points keep their values.

Letters: O rows, I columns, G groups of a row, r rank of the adapter, k rank of a layer.

    <output>/            config.json, tokenizer, shards: transformers and vLLM load it
    <output>/adapter/    adapter_config.json, adapter_model.safetensors: peft and vLLM load it on top

What compressed-tensors cannot say is said in a way it can: a group that does not divide a row becomes smaller groups
with equal scales, and a layer of pure low rank becomes its dense product.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from allocator.atomic import write_atomically
from allocator.export.compressed_tensors import Layout, layout_of, quantization_config
from allocator.export.limits import refuse_rotations, refuse_tables
from allocator.export.peft import adapter_config
from allocator.plan import Plan, PlanLayer
from allocator.storage import FACTOR_GROUP_SIZE, KEEP_BITS
from compressor.checkpoint_writer import (
    INDEX,
    WorkError,
    check_output,
    finish,
    is_finished,
    plan_digest,
    put_in_place,
    write_json,
)
from compressor.grid import Quantized
from compressor.lowrank.factorize import product
from compressor.metadata import with_metadata
from compressor.nn.linear import left_name, matrix_names
from compressor.packing import unpack

ADAPTER = "adapter"
ADAPTER_KEY = "base_model.model.{layer}.lora_{side}.weight"


@dataclass
class Exported:
    """What has been translated so far: layers by (bits, group size), dense layers, factors by layer."""

    schemes: dict[tuple[int, int], list[str]] = field(default_factory=dict)
    dense: list[str] = field(default_factory=list)
    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    total_bytes: int = 0


def export(
    plan: Plan, checkpoint: Path, output: Path, progress: Callable[[str, int, int], None]
) -> Path | None:
    """Translate the checkpoint that `compress` made from `plan`; returns the adapter's directory if it has one.

    Raises `ExportError` for rotated layers and compressed tables, `WorkError` when the output is occupied, the
    checkpoint is not the plan's, or its layers are not plain linear ones in stock transformers.
    """
    refuse_rotations(plan)
    refuse_tables(plan, "compressed-tensors")
    check_output(output)
    shards = plan_shards(plan, checkpoint)
    linears = linear_layers(plan, checkpoint)
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    exported = Exported()
    for done, shard in enumerate(shards, 1):
        tensors = dict(translated(load_file(checkpoint / shard), plan, linears, exported))
        exported.total_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        write_tensors(partial / shard, tensors)
        progress("exporting", done, len(shards))
    kept = [name for name, layer in plan.layers.items() if layer.bits == KEEP_BITS]
    schemes = dict(sorted(exported.schemes.items()))
    config = quantization_config(schemes, kept + exported.dense, plan.kept, layout_of(plan))
    finish(partial, shards, checkpoint, config, exported.total_bytes)
    if exported.factors:
        write_adapter(partial / ADAPTER, exported.factors, plan)
    put_in_place(partial, output)
    return output / ADAPTER if exported.factors else None


def plan_shards(plan: Plan, checkpoint: Path) -> list[str]:
    """File names of the checkpoint's shards. Raises `WorkError` unless every one is whole and made from `plan`."""
    try:
        shards = sorted(set(json.loads((checkpoint / INDEX).read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WorkError(
            f"{checkpoint} has no readable {INDEX}; give a directory that `bitrank compress` wrote"
        ) from error
    for shard in shards:
        if not is_finished(checkpoint / shard, plan_digest(plan)):
            raise WorkError(
                f"{checkpoint / shard} is missing, damaged or was not made from this plan; give the checkpoint that"
                " `bitrank compress` made from it"
            )
    return shards


def linear_layers(plan: Plan, checkpoint: Path) -> dict[str, nn.Linear]:
    """The plan's layers as stock transformers builds them, without weights."""
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    modules = dict(model.named_modules())
    for name in plan.layers:
        if not isinstance(modules.get(name), nn.Linear):
            raise WorkError(
                f"{name} is no plain linear layer in transformers, and compressed-tensors holds only those; serve"
                " the checkpoint with `import compressor.plugin` instead"
            )
    return {name: modules[name] for name in plan.layers}


def translated(
    tensors: dict[str, Tensor], plan: Plan, linears: dict[str, nn.Linear], exported: Exported
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one shard under their names in compressed-tensors; factors are put aside in `exported`."""
    planned = {
        name: layer
        for name, layer in plan.layers.items()
        if layer.bits != KEEP_BITS and f"{name}.weight" in tensors
    }
    for name, layer in planned.items():
        own = {key.removeprefix(f"{name}."): tensors.pop(key) for key in list(tensors) if _owner(key) == name}
        factors = stored_factors(own, layer, linears[name]) if layer.rank else None
        if layer.bits == 0:
            assert factors is not None
            exported.dense.append(name)
            yield f"{name}.weight", product(*factors, layer.heads).bfloat16()
            continue
        if factors is not None:
            exported.factors[name] = factors
        columns = linears[name].in_features
        quantized = stored_matrix(own, "weight", columns, layer.bits, layer.group_size)
        quantized = with_whole_groups(quantized)
        exported.schemes.setdefault((quantized.bits, quantized.group_size), []).append(name)
        for part, tensor in packed(quantized, layout_of(plan)).items():
            yield f"{name}.{part}", tensor
    yield from tensors.items()


def _owner(key: str) -> str:
    return key.rpartition(".")[0]


def stored_matrix(
    tensors: dict[str, Tensor], name: str, columns: int, bits: int, group_size: int
) -> Quantized:
    """A quantized matrix from the tensors that `linear.matrix_tensors` stores."""
    word_OW, scale_OG, zero_1W = (tensors[part] for part in matrix_names(name))
    zero_OG = unpack(zero_1W, bits, scale_OG.numel()).view(scale_OG.shape)
    return Quantized(unpack(word_OW, bits, columns), scale_OG, zero_OG, bits, group_size)


def stored_factors(tensors: dict[str, Tensor], layer: PlanLayer, linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """L and R as `lowrank.Factors` has them: bfloat16 if they are stored so, else float32, which holds their values
    exactly."""

    def factor(name: str, width: int) -> Tensor:
        if layer.factor_bits == KEEP_BITS:
            return tensors[name]
        return stored_matrix(tensors, name, width, layer.factor_bits, FACTOR_GROUP_SIZE).dequantize()

    left_kO = factor(left_name(layer.option), linear.out_features // layer.heads)
    return left_kO, factor("right", linear.in_features)


def with_whole_groups(quantized: Quantized) -> Quantized:
    """The same matrix in groups that divide a row: the largest that lie within the old ones."""
    columns, size = quantized.code_OI.shape[1], quantized.group_size
    whole = columns if columns < size else math.gcd(columns, size)
    if whole == size:
        return quantized
    repeats = -(-size // whole)
    scale_OG, zero_OG = (
        part_OG.repeat_interleave(repeats, dim=1)[:, : columns // whole]
        for part_OG in (quantized.scale_OG, quantized.zero_OG)
    )
    return Quantized(quantized.code_OI, scale_OG, zero_OG, quantized.bits, whole)


def packed(quantized: Quantized, layout: Layout) -> dict[str, Tensor]:
    """What compressed-tensors stores of a matrix: int32 codes packed along rows, zero points packed along columns or
    int8; both centred on 0."""
    try:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    except ImportError as error:
        raise WorkError(
            "exporting weights needs compressed-tensors 0.18 or newer; pip install 'bitrank[export]'"
        ) from error
    middle = 1 << (quantized.bits - 1)
    code_OI = (quantized.code_OI.to(torch.int16) - middle).to(torch.int8)
    zero_OG = (quantized.zero_OG.to(torch.int16) - middle).to(torch.int8)
    if layout.packs_zero_points:
        zero_OG = pack_to_int32(zero_OG, quantized.bits, packed_dim=0)
    return {
        "weight_packed": pack_to_int32(code_OI, quantized.bits),
        "weight_scale": quantized.scale_OG.contiguous(),
        "weight_zero_point": zero_OG.contiguous(),
        "weight_shape": torch.tensor(code_OI.shape),
    }


def write_adapter(directory: Path, factors: dict[str, tuple[Tensor, Tensor]], plan: Plan) -> None:
    """L as lora_B and R as lora_A, padded with zeros to one rank, so that every reader scales them by 1."""
    directory.mkdir()
    config = adapter_config({name: len(left_kO) for name, (left_kO, _) in factors.items()}, plan.model.id)
    rank, tensors = config["r"], {}
    for name, (left_kO, right_kI) in factors.items():
        missing = rank - len(left_kO)
        tensors[ADAPTER_KEY.format(layer=name, side="A")] = F.pad(right_kI, (0, 0, 0, missing)).contiguous()
        tensors[ADAPTER_KEY.format(layer=name, side="B")] = F.pad(left_kO.T, (0, missing)).contiguous()
    write_tensors(directory / "adapter_model.safetensors", tensors)
    write_json(directory / "adapter_config.json", config)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    write_atomically(path, with_metadata(save(tensors), {"format": "pt"}))
