"""The sweep: every layer truly compressed under every option of the grid, and what that costs.

What lives here: measuring the layers of one input. The grid's options are in `measurement.py`, statistics come from
`calibration.py`; resuming and files are for `run.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from allocator.storage import Option
from compressor.decompose import MAXIMUM_ELEMENTS, Curvature, Decomposition, decompose, squared_error
from profiler.calibration import InputMoment
from profiler.closed_form import (
    ClosedForm,
    Corrected,
    corrected,
    first_measured,
    predictable,
    spectrum_option,
)
from profiler.layers import Layer, LoadedModel
from profiler.measurement import GridSettings, Measurement

WEIGHTS_PER_ELEMENT = 32
"""A weight of the model takes 4 bytes in float32, one being decomposed some 40."""
BYTES_PER_ELEMENT = 40
WIDE = 0.15
"""Half width, in log error, of a predicted interval that has its option measured instead."""


@dataclass(frozen=True, slots=True)
class LayerSweep:
    """Everything measured of one layer. `signal` is tr(W H Wᵀ) per token; `sensitivity`, the nats of KL per token that
    a unit of error costs before calibration, is ½·mean(diag G)·signal; `tokens` reached the layer."""

    layer: Layer
    measurements: tuple[Measurement, ...]
    signal: float
    sensitivity: float
    tokens: int
    leave_one_out: float | None


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
    adaptive: bool = False,
) -> Iterator[LayerSweep]:
    """Measure the layers that share one input; `keep` sees every decomposition before it is dropped.

    Adaptive: a few options of every layer are measured, and more until every other has an interval within `WIDE`.
    """
    curvature = Curvature.of(moment.hessian_II)
    for shape in sorted({(layer.rows, layer.columns) for layer in moment.layers}):
        members = [layer for layer in moment.layers if (layer.rows, layer.columns) == shape]
        bench = _Bench(loaded, curvature, members, grid, keep, rounds)
        missing = {layer.name: bench.first(layer, adaptive) for layer in members}
        while any(missing.values()):
            bench.measure([(layer, option) for layer in members for option in missing[layer.name]])
            missing = {layer.name: bench.still_wide(layer) for layer in members}
        for layer in members:
            signal = bench.signal[layer.name]
            yield LayerSweep(
                layer=layer,
                measurements=tuple(sorted(bench.table(layer), key=lambda m: m.option)),
                signal=signal,
                sensitivity=0.5 * gradient_moments[layer.name].mean().item() * signal,
                tokens=moment.count,
                leave_one_out=bench.leave_one_out(layer),
            )


class _Bench:
    """Layers of one shape under one Hessian: what was measured of each so far, and what that predicts."""

    def __init__(
        self,
        loaded: LoadedModel,
        curvature: Curvature,
        members: Sequence[Layer],
        grid: GridSettings,
        keep: Callable[[Layer, Decomposition], None],
        rounds: int,
    ) -> None:
        self.curvature, self.keep, self.rounds = curvature, keep, rounds
        self.elements = elements_in_flight(loaded)
        self.options = {layer.name: grid.options(layer) for layer in members}
        self.weights = {layer.name: loaded.weight(layer) for layer in members}
        self.signal = {
            name: squared_error(w_OI, w_OI * 0, curvature.hessian_II) for name, w_OI in self.weights.items()
        }
        self.found: dict[str, list[Measurement]] = {layer.name: [] for layer in members}
        self.forms: dict[str, ClosedForm | None] = {}

    def first(self, layer: Layer, adaptive: bool) -> list[Option]:
        options = self.options[layer.name]
        return first_measured(options) if adaptive else options

    def measure(self, jobs: Sequence[tuple[Layer, Option]]) -> None:
        stream = decompose(
            [self.weights[layer.name] for layer, _ in jobs],
            self.curvature,
            [option for _, option in jobs],
            self.rounds,
            self.elements,
        )
        for p, decomposition in stream:
            layer, option = jobs[p]
            self.keep(layer, decomposition)
            w_OI, dense_OI = self.weights[layer.name], decomposition.dense()
            error = squared_error(w_OI, dense_OI, self.curvature.hessian_II)
            self.found[layer.name].append(Measurement(option, error / max(self.signal[layer.name], 1e-30)))
            if option == spectrum_option(self.options[layer.name]):
                self.forms[layer.name] = self._form(layer, w_OI - dense_OI)

    def _form(self, layer: Layer, residual_OI: Tensor) -> ClosedForm | None:
        ranks = sorted({option.rank for option in self.options[layer.name]} - {0})
        name = layer.name
        return ClosedForm.of(self.weights[name], residual_OI, self.curvature, self.signal[name], ranks)

    def still_wide(self, layer: Layer) -> list[Option]:
        """Options that are neither measured nor predicted well enough; without a closed form, all that are left."""
        found = {m.option for m in self.found[layer.name]}
        left = [option for option in self.options[layer.name] if option not in found]
        predicted = self._corrected(layer)
        return [o for o in left if predicted is None or predicted.estimate(o).half_width > WIDE]

    def table(self, layer: Layer) -> list[Measurement]:
        """What was measured, and predictions of the rest."""
        found, predicted = self.found[layer.name], self._corrected(layer)
        known = {m.option for m in found}
        left = [option for option in self.options[layer.name] if option not in known]
        return [*found, *(predicted.estimate(option) for option in left if predicted)]

    def leave_one_out(self, layer: Layer) -> float | None:
        predicted = self._corrected(layer)
        return predicted.leave_one_out if predicted else None

    def _corrected(self, layer: Layer) -> Corrected | None:
        form, formed = self.forms.get(layer.name), predictable(self.options[layer.name])
        usable = [m for m in self.found[layer.name] if m.option in formed]
        return corrected(form, usable) if form and len(usable) > 1 else None
