"""Trials: whole models under given options, measured without writing a checkpoint.

What lives here: carrying out every option that some trial asks of a layer, once, in one pass over the blocks, and
measuring each trial against the original. Memory is that of one block; the packed layers wait on disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from allocator.atomic import write_atomically
from allocator.problem import Integers, Menu
from allocator.storage import KEEP_BITS, Option
from compressor.checkpoint_writer import BlockWork, LayerWork
from compressor.cuda.cuda_streams import side_by_side
from compressor.lowrank.decompose import decompose
from compressor.lowrank.hessian import Curvature
from compressor.nn.linear import CompressedLinear, layer_tensors
from profiler.evaluation.divergence import BATCH, compare, stored_logits
from profiler.evaluation.embeddings import tables_rounded
from profiler.execution.block_pipeline import block_works
from profiler.model.layers import Layer, LoadedModel
from profiler.statistics.calibration import Progress
from profiler.statistics.moments import TokenWeights

Calibration = tuple[Tensor, TokenWeights | None]
"""Token windows (N, T), and what their tokens weigh; `None` weighs them evenly."""
Trial = Mapping[str, Option]
"""The option of every layer, and of the tables that are not kept, by name."""
BATCH_ON_CUDA = 16
"""Windows that a trial runs at once on a GPU: every layer is unpacked once for each batch."""


def trial_of(menu: Menu, choice: Integers) -> Trial:
    """The options that `choice` (G,) takes."""
    return {
        layer.name: layer.options[index] for layer, index in zip(menu.layers, choice.tolist(), strict=True)
    }


@torch.no_grad()
def measure_trials(
    loaded: LoadedModel,
    calibration: Calibration,
    tokens_NT: Tensor,
    trials: Sequence[Trial],
    folder: Path,
    progress: Progress,
) -> Tensor:
    """(trials, N, 5), float64: what `evaluation.compare` finds of every trial on every window of `tokens_NT` (N, T), KL
    (nats/token) first.

    calibration: the windows and token weights whose Hessians the layers are compressed under. folder: an empty one for
    packed layers, activations and logits. What an interrupted run of the same trials left there is not done again.
    """
    wanted = {layer.name: sorted({trial[layer.name] for trial in trials}) for layer in loaded.layers}
    for block in block_works(loaded, *calibration, folder):
        _carry_out(loaded.device, block, wanted, folder)
        progress("compressing trials", block.index + 1, len(loaded.block_names))
    reference = stored_logits(loaded, tokens_NT, folder / "reference.f32")
    batch = BATCH_ON_CUDA if loaded.device.type == "cuda" else BATCH
    rows = []
    for index, trial in enumerate(trials):
        row = folder / f"{index}.windows.safetensors"
        if not row.exists():
            with loaded.replacing(partial(_weight_in, loaded, trial, folder)), tables_rounded(loaded, trial):
                found_N5 = compare(loaded.model, reference, tokens_NT, batch=batch)
            write_atomically(row, save({"found_N5": found_N5}))
        rows.append(load_file(row)["found_N5"])
        progress("measuring trials", index + 1, len(trials))
    return torch.stack(rows)


def _carry_out(
    device: torch.device, block: BlockWork, wanted: Mapping[str, list[Option]], folder: Path
) -> None:
    works = block.layers()
    tasks = [partial(_carry_out_layer, work, wanted[work.name], folder) for work in works]
    for _ in side_by_side(device, tasks, max(work.weight_OI.numel() for work in works)):
        pass


def _carry_out_layer(work: LayerWork, wanted: Sequence[Option], folder: Path) -> None:
    options = [
        option
        for option in wanted
        if option.bits != KEEP_BITS and not _file(folder, work.name, option).exists()
    ]
    if not options:
        return
    curvature = Curvature.of(work.hessian_II)
    for p, found in decompose([work.weight_OI] * len(options), curvature, options):
        tensors = {name: tensor.cpu() for name, tensor in layer_tensors(found).items()}
        write_atomically(_file(folder, work.name, options[p]), save(tensors), durable=False)


def _weight_in(loaded: LoadedModel, trial: Mapping[str, Option], folder: Path, layer: Layer) -> Tensor:
    return trial_weight(loaded, layer, trial[layer.name], folder)


def trial_weight(loaded: LoadedModel, layer: Layer, option: Option, folder: Path) -> Tensor:
    if option.bits == KEEP_BITS:
        return loaded.weight(layer)
    compressed = CompressedLinear(layer.rows, layer.columns, option, bias=False)
    compressed.load_state_dict(load_file(_file(folder, layer.name, option)))
    return compressed.to(loaded.device).dense_weight()


def _file(folder: Path, name: str, option: Option) -> Path:
    return folder / f"{name}.{'-'.join(map(str, astuple(option)))}.safetensors"
