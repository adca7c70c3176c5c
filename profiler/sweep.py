"""The sweep: every layer truly compressed under every option of the grid, and what that costs.

What lives here: measuring the layers of one input. The grid's options are in `measurement.py`, statistics come from
`calibration.py`; resuming and files are for `run.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.decompose import MAXIMUM_ELEMENTS, Curvature, Decomposition, decompose, squared_error
from profiler.calibration import InputMoment
from profiler.layers import Layer, LoadedModel
from profiler.measurement import GridSettings, Measurement

WEIGHTS_PER_ELEMENT = 32
"""A weight of the model takes 4 bytes in float32, one being decomposed some 40."""
BYTES_PER_ELEMENT = 40


@dataclass(frozen=True, slots=True)
class LayerSweep:
    """Everything measured of one layer. `signal` is tr(W H Wᵀ) per token; `sensitivity`, the nats of KL per token that
    a unit of error costs before calibration, is ½·mean(diag G)·signal; `tokens` reached the layer."""

    layer: Layer
    measurements: tuple[Measurement, ...]
    signal: float
    sensitivity: float
    tokens: int


def default_ranks(layers: tuple[Layer, ...]) -> tuple[int, ...]:
    """0 and three powers of two up to a sixth of the most common smaller side, at most 256."""
    sides = sorted(min(layer.rows, layer.columns) for layer in layers)
    largest = 2
    while largest * 2 <= min(256, sides[len(sides) // 2] // 6):
        largest *= 2
    return (0, *sorted({max(1, largest // 4), max(1, largest // 2), largest}))


def elements_in_flight(loaded: LoadedModel) -> int:
    """Weights to decompose at once, so that their working memory stays below that of the model, which is on disk.

    On a GPU, whose loops are only filled by many rows, as many as a third of its memory holds.
    """
    if loaded.device.type == "cuda":
        return torch.cuda.get_device_properties(loaded.device).total_memory // (3 * BYTES_PER_ELEMENT)
    return min(MAXIMUM_ELEMENTS, sum(layer.weights for layer in loaded.layers) // WEIGHTS_PER_ELEMENT)


def sweep_moment(
    loaded: LoadedModel,
    moment: InputMoment,
    gradient_moments: dict[str, Tensor],
    grid: GridSettings,
    keep: Callable[[Layer, Decomposition], None],
    rounds: int,
) -> Iterator[LayerSweep]:
    """Measure the layers that share one input; `keep` sees every decomposition before it is dropped."""
    curvature = Curvature.of(moment.hessian_II)
    for shape in sorted({(layer.rows, layer.columns) for layer in moment.layers}):
        members = [layer for layer in moment.layers if (layer.rows, layer.columns) == shape]
        jobs = [(layer, option) for layer in members for option in grid.options(layer)]
        weights = {layer.name: loaded.weight(layer) for layer in members}
        signal = {name: squared_error(w_OI, w_OI * 0, curvature.hessian_II) for name, w_OI in weights.items()}
        found: dict[str, list[Measurement]] = {layer.name: [] for layer in members}
        stream = decompose(
            [weights[layer.name] for layer, _ in jobs],
            curvature,
            [option for _, option in jobs],
            rounds,
            elements_in_flight(loaded),
        )
        for p, decomposition in stream:
            layer, option = jobs[p]
            keep(layer, decomposition)
            error = squared_error(weights[layer.name], decomposition.dense(), curvature.hessian_II)
            found[layer.name].append(Measurement(option, error / max(signal[layer.name], 1e-30)))
        for layer in members:
            yield LayerSweep(
                layer=layer,
                measurements=tuple(sorted(found[layer.name], key=lambda m: m.option)),
                signal=signal[layer.name],
                sensitivity=0.5 * gradient_moments[layer.name].mean().item() * signal[layer.name],
                tokens=moment.count,
            )
