"""Probes: whole models at uniform settings, measured, to calibrate the prediction by one constant.

What lives here: keeping the probes' layers during the sweep, measuring KL on windows held back from calibration, and
the gain and interval that follow. The prediction ½ Σ tr(G ΔW H ΔWᵀ) is a second-order one and falls short of the
measured KL by a nearly constant factor; `gain` is that factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from scipy.stats import t as student
from torch import Tensor

from allocator.atomic import write_atomically
from allocator.storage import Option
from compressor.decompose import Decomposition
from compressor.linear import CompressedLinear, layer_tensors
from profiler.calibration import Progress
from profiler.evaluation import measure, stored_logits
from profiler.layers import Layer, LoadedModel

PROBES = tuple(Option(bits, 0, 64, 0) for bits in (2, 3, 4))
CONFIDENCE = 0.9


@dataclass(frozen=True, slots=True)
class Probe:
    """One uniform setting: predicted (uncalibrated) and measured KL in nats/token, and the measurement's error."""

    option: Option
    predicted_kl: float
    measured_kl: float
    standard_error: float


@dataclass(frozen=True, slots=True)
class Gain:
    """Measured over predicted KL: the geometric mean over probes, and its prediction interval's end points."""

    mean: float
    low: float
    high: float


def keeper(folder: Path) -> Callable[[Layer, Decomposition], None]:
    """A callback that stores the probes' decompositions, packed, under `folder`."""

    def keep(layer: Layer, decomposition: Decomposition) -> None:
        if decomposition.option in PROBES:
            write_atomically(
                probe_file(folder, layer, decomposition.option), save(layer_tensors(decomposition))
            )

    return keep


def probe_file(folder: Path, layer: Layer, option: Option) -> Path:
    return folder / f"{layer.name}.{option.bits}.safetensors"


@torch.no_grad()
def measure_probes(
    loaded: LoadedModel, tokens_NT: Tensor, predicted: dict[Option, float], folder: Path, progress: Progress
) -> list[Probe]:
    """Measure every probe on held-back windows. Overwrites the model's weights: load it again afterwards."""
    reference = stored_logits(loaded.model, tokens_NT, folder / "reference_logits.f32")
    probes = []
    for index, (option, predicted_kl) in enumerate(sorted(predicted.items())):
        for layer in loaded.layers:
            weight = loaded.model.get_submodule(layer.name).weight
            dense_OI = read_probe(folder, layer, option).to(weight)
            weight.copy_(dense_OI.T if layer.transposed else dense_OI)
        found = measure(loaded.model, reference, tokens_NT)
        probes.append(Probe(option, predicted_kl, found.kl_nats, found.kl_standard_error))
        progress("measuring probes", index + 1, len(predicted))
    return probes


def read_probe(folder: Path, layer: Layer, option: Option) -> Tensor:
    compressed = CompressedLinear(layer.rows, layer.columns, option, bias=False)
    compressed.load_state_dict(load_file(probe_file(folder, layer, option)))
    return compressed.dense_weight()


def calibrate(probes: Sequence[Probe]) -> Gain:
    """Gain and its 90 % prediction interval: Student's t on the log ratios, with their measurement error added."""
    ratios = [
        math.log(p.measured_kl / p.predicted_kl) for p in probes if p.measured_kl > 0 and p.predicted_kl > 0
    ]
    if not ratios:
        return Gain(1.0, 0.5, 2.0)
    mean = sum(ratios) / len(ratios)
    spread = sum((ratio - mean) ** 2 for ratio in ratios) / max(1, len(ratios) - 1)
    noise = [
        (p.standard_error / p.measured_kl) ** 2 for p in probes if p.measured_kl > 0 and p.standard_error > 0
    ]
    error = math.sqrt(spread * (1 + 1 / len(ratios)) + (sum(noise) / len(noise) if noise else 0.0))
    width = float(student.ppf((1 + CONFIDENCE) / 2, max(1, len(ratios) - 1))) * error
    return Gain(math.exp(mean), math.exp(mean - width), math.exp(mean + width))
