"""Probes: whole models at uniform settings, measured, to calibrate the prediction.

What lives here: keeping the probes' layers during the sweep and measuring KL on windows held back from calibration.
What follows from them is in `calibration_factor.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from allocator.atomic import write_atomically
from allocator.storage import Option
from compressor.lowrank.decomposition import Decomposition
from compressor.nn.linear import CompressedLinear, layer_tensors
from profiler.evaluation.divergence import compare, stored_logits
from profiler.execution.memory import return_fragments
from profiler.execution.writer import Writer
from profiler.model.layers import Layer, LoadedModel
from profiler.prediction.calibration_factor import Probe
from profiler.statistics.calibration import Progress

PROBES = tuple(Option(bits, 0, 64, 0) for bits in (2, 3, 4))


def keeper(folder: Path, writer: Writer) -> Callable[[Layer, Decomposition], None]:
    """A callback that has the probes' decompositions stored, packed, under `folder`."""

    def store(layer: Layer, decomposition: Decomposition) -> None:
        file = probe_file(folder, layer, decomposition.option)
        write_atomically(file, save(layer_tensors(decomposition)), durable=False)

    def keep(layer: Layer, decomposition: Decomposition) -> None:
        if decomposition.option in PROBES:
            writer.submit(partial(store, layer, decomposition))

    return keep


def probe_file(folder: Path, layer: Layer, option: Option) -> Path:
    return folder / f"{layer.name}.{option.bits}.safetensors"


@torch.no_grad()
def measure_probes(
    loaded: LoadedModel, tokens_NT: Tensor, predicted: dict[Option, float], folder: Path, progress: Progress
) -> tuple[list[Probe], dict[Option, Tensor]]:
    """Measure every probe on held-back windows; its KL of every window (N,) too."""
    reference = stored_logits(loaded, tokens_NT, folder / "reference.f32")
    probes, kl_of = [], {}
    for index, (option, predicted_kl) in enumerate(sorted(predicted.items())):
        with loaded.replacing(partial(read_probe, folder, option=option, device=loaded.device)):
            batch = loaded.windows_per_batch
            kl_of[option] = kl_N = compare(loaded.model, reference, tokens_NT, batch=batch)[:, 0]
        spread = kl_N.std().item() / len(kl_N) ** 0.5 if len(kl_N) > 1 else float("nan")
        probes.append(Probe(option, predicted_kl, kl_N.mean().item(), spread))
        return_fragments()
        progress("measuring probes", index + 1, len(predicted))
    return probes, kl_of


def read_probe(folder: Path, layer: Layer, option: Option, device: torch.device) -> Tensor:
    """W (O, I) of a layer as a probe stores it, unpacked on the device."""
    compressed = CompressedLinear(layer.rows, layer.columns, option, bias=False)
    compressed.load_state_dict(load_file(probe_file(folder, layer, option)))
    return compressed.to(device).dense_weight()
