"""The sweep: every layer truly compressed under every option of the grid, and what that costs.

What lives here: measuring the layers of one input. The grid's options are in `measurement.py`, statistics come from
`calibration.py`; resuming and files are for `run.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice

import torch
from torch import Tensor

from allocator.storage import Option
from compressor.curvature import Curvature
from compressor.decompose import MAXIMUM_ELEMENTS, decompose
from compressor.decomposition import Decomposition, by_column
from compressor.precision import Operand, largest_of
from profiler.calibration import InputMoment
from profiler.closed_form import (
    ClosedForm,
    Corrected,
    corrected,
    first_measured,
    predictable,
    spectrum_option,
)
from profiler.heads import separable_heads
from profiler.layers import Layer, LoadedModel
from profiler.measurement import GridSettings, Measurement
from profiler.streams import at_once

WEIGHTS_PER_ELEMENT = 32
"""A weight of the model takes 4 bytes in float32, one being decomposed some 40 on a CPU."""
CUDA_BYTES_PER_ELEMENT = 20
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

    On a GPU, whose loops are only filled by many rows, as many as half its memory holds, shared by all who sweep.
    """
    if loaded.device.type == "cuda":
        memory = torch.cuda.get_device_properties(loaded.device).total_memory // at_once(loaded.device)
        return memory // (2 * CUDA_BYTES_PER_ELEMENT)
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
    kinds = {layer: (layer.rows, layer.columns, separable_heads(loaded, layer)) for layer in moment.layers}
    for kind in sorted(set(kinds.values())):
        members = [layer for layer in moment.layers if kinds[layer] == kind]
        bench = _Bench(loaded, curvature, members, grid.options(members[0], kind[2]), keep, rounds)
        jobs = bench.first(adaptive)
        while jobs:
            bench.measure(jobs)
            jobs = bench.still_wide()
        for layer in members:
            signal, predicted = bench.signal[layer.name], bench.corrected(layer)
            estimates = [predicted.estimate(option) for option in bench.left(layer)] if predicted else []
            yield LayerSweep(
                layer=layer,
                measurements=tuple(sorted(bench.found[layer.name] + estimates, key=lambda m: m.option)),
                signal=signal,
                sensitivity=0.5 * gradient_moments[layer.name].mean().item() * signal,
                tokens=moment.count,
                leave_one_out=predicted.leave_one_out if predicted else None,
            )


Job = tuple[Layer, Option]


class _Bench:
    """Layers of one shape and as many heads under one Hessian: what was measured of each, and what that predicts."""

    def __init__(
        self,
        loaded: LoadedModel,
        curvature: Curvature,
        members: Sequence[Layer],
        options: Sequence[Option],
        keep: Callable[[Layer, Decomposition], None],
        rounds: int,
    ) -> None:
        self.curvature, self.members, self.keep, self.rounds = curvature, members, keep, rounds
        self.elements = elements_in_flight(loaded)
        self.options = options
        self.formed, self.spectrum = predictable(self.options), spectrum_option(self.options)
        self.weights = {layer.name: by_column(loaded.weight(layer)) for layer in members}
        self.largest = largest_of(*self.weights.values())
        self.signal = {
            name: curvature.squared_norms(Operand.of(w_OI, self.largest)).item()
            for name, w_OI in self.weights.items()
        }
        self.found: dict[str, list[Measurement]] = {layer.name: [] for layer in members}
        self.forms: dict[str, ClosedForm | None] = {}

    def first(self, adaptive: bool) -> list[Job]:
        options = first_measured(self.options) if adaptive else self.options
        return [(layer, option) for layer in self.members for option in options]

    def measure(self, jobs: Sequence[Job]) -> None:
        stream = decompose(
            [self.weights[layer.name] for layer, _ in jobs],
            self.curvature,
            [option for _, option in jobs],
            self.rounds,
            self.elements,
        )
        size = max(1, self.elements // self.weights[jobs[0][0].name].numel())
        errors: list[Tensor] = []
        order: list[Job] = []
        for _, alike in groupby(stream, lambda found: found[1].is_subtracted):
            while batch := list(islice(alike, size)):
                for p, decomposition in batch:
                    order.append(jobs[p])
                    self._see(*jobs[p], decomposition)
                weights = [self.weights[jobs[p][0].name] for p, _ in batch]
                found = [decomposition for _, decomposition in batch]
                errors.append(self.curvature.squared_errors(weights, found, self.largest))
        for (layer, option), error in zip(order, torch.cat(errors).tolist(), strict=True):
            relative = error / max(self.signal[layer.name], 1e-30)
            self.found[layer.name].append(Measurement(option, relative))

    def _see(self, layer: Layer, option: Option, decomposition: Decomposition) -> None:
        self.keep(layer, decomposition)
        if option == self.spectrum:
            w_OI, signal = self.weights[layer.name], self.signal[layer.name]
            ranks = sorted({option.rank for option in self.formed} - {0})
            delta = Operand.of(w_OI - decomposition.dense())
            self.forms[layer.name] = ClosedForm.of(w_OI, delta, self.curvature, signal, ranks)

    def left(self, layer: Layer) -> list[Option]:
        """What was not measured."""
        found = {m.option for m in self.found[layer.name]}
        return [option for option in self.options if option not in found]

    def still_wide(self) -> list[Job]:
        """What is neither measured nor predicted well enough; without a closed form, all that is left of a layer."""
        jobs: list[Job] = []
        for layer in self.members:
            if left := self.left(layer):
                predicted = self.corrected(layer)
                wide = [o for o in left if predicted is None or predicted.estimate(o).half_width > WIDE]
                jobs += [(layer, option) for option in wide]
        return jobs

    def corrected(self, layer: Layer) -> Corrected | None:
        form, found = self.forms.get(layer.name), self.found[layer.name]
        usable = [m for m in found if m.option in self.formed]
        return corrected(form, usable) if form and len(usable) > 1 else None
