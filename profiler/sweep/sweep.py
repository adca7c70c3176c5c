"""The sweep: every layer truly compressed under every option of the grid, and what that costs.

What lives here: measuring one layer. The grid's options are in `measurement.py`, statistics come from
`calibration.py`; resuming and files are for `run.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, islice

import torch
from torch import Tensor

from allocator.storage import Option
from compressor.cuda.cuda_streams import at_once
from compressor.cuda.scaled_half import Operand, largest_of
from compressor.lowrank.decompose import MAXIMUM_ELEMENTS, decompose
from compressor.lowrank.decomposition import Decomposition, by_column
from compressor.lowrank.hessian import Curvature
from profiler.model.heads import separable_heads
from profiler.model.layers import Layer, LoadedModel
from profiler.prediction.measurement import GridSettings, Measurement
from profiler.statistics.moments import InputMoment
from profiler.sweep.closed_form import (
    ClosedForm,
    Corrected,
    corrected,
    first_measured,
    predictable,
    spectrum_option,
)

WEIGHTS_PER_ELEMENT = 32
"""A weight of the model takes 4 bytes in float32, one being decomposed some 40 on a CPU."""
CUDA_BYTES_PER_ELEMENT = 20
WIDE = 0.15
"""Half width, in log error, of a predicted interval that has its option measured instead."""


@dataclass(frozen=True, slots=True)
class RowPrice:
    """E[w] of a layer's tokens, and what an error of each of its rows counts, float32 (O,), 1 on average."""

    gradient_mean: float
    share_O: Tensor


@dataclass(frozen=True, slots=True)
class LayerSweep:
    """Everything measured of one layer. `signal` is Σ_O s_O (W H Wᵀ)_OO; `sensitivity`, the nats of KL per token that a
    unit of error costs before calibration, is ½·E[w]·signal (`moments.py`); `tokens` reached the layer."""

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


def sweep_layer(
    loaded: LoadedModel,
    moment: InputMoment,
    price: RowPrice,
    grid: GridSettings,
    keep: Callable[[Layer, Decomposition], None],
    rounds: int,
    adaptive: bool = False,
) -> LayerSweep:
    """Measure one layer under its H; `keep` sees every decomposition before it is dropped.

    price: what an error of each row costs. Adaptive: a few options are measured, and more until every other has an
    interval within `WIDE`.
    """
    layer = moment.layer
    options = grid.options(layer, separable_heads(loaded, layer))
    curvature = Curvature.of(moment.hessian_II)
    bench = _Bench(loaded, curvature, layer, price.share_O, options, keep, rounds)
    wanted = first_measured(options) if adaptive else list(options)
    while wanted:
        bench.measure(wanted)
        wanted = bench.still_wide()
    predicted = bench.corrected()
    estimates = [predicted.estimate(option) for option in bench.left()] if predicted else []
    return LayerSweep(
        layer=layer,
        measurements=tuple(sorted(bench.found + estimates, key=lambda m: m.option)),
        signal=bench.signal,
        sensitivity=0.5 * price.gradient_mean * bench.signal,
        tokens=moment.count,
        leave_one_out=predicted.leave_one_out if predicted else None,
    )


class _Bench:
    """One layer under its Hessian: what was measured of it, and what that predicts."""

    def __init__(
        self,
        loaded: LoadedModel,
        curvature: Curvature,
        layer: Layer,
        share_O: Tensor,
        options: Sequence[Option],
        keep: Callable[[Layer, Decomposition], None],
        rounds: int,
    ) -> None:
        self.curvature, self.layer, self.share_O = curvature, layer, share_O
        self.keep, self.rounds = keep, rounds
        self.elements = elements_in_flight(loaded)
        self.options = options
        self.formed, self.spectrum = predictable(options), spectrum_option(options)
        self.weight_OI = by_column(loaded.weight(layer))
        self.largest = largest_of(self.weight_OI)
        self.signal = curvature.squared_norms(Operand.of(self.weight_OI, self.largest), 1, share_O).item()
        self.found: list[Measurement] = []
        self.form: ClosedForm | None = None

    def measure(self, options: Sequence[Option]) -> None:
        stream = decompose(
            [self.weight_OI] * len(options), self.curvature, options, self.rounds, self.elements
        )
        size = max(1, self.elements // self.weight_OI.numel())
        errors: list[Tensor] = []
        order: list[Option] = []
        for _, alike in groupby(stream, lambda found: found[1].is_subtracted):
            while batch := list(islice(alike, size)):
                for p, decomposition in batch:
                    order.append(options[p])
                    self._see(options[p], decomposition)
                found = [decomposition for _, decomposition in batch]
                weights = [self.weight_OI] * len(found)
                errors.append(self.curvature.squared_errors(weights, found, self.largest, self.share_O))
        for option, error in zip(order, torch.cat(errors).tolist(), strict=True):
            self.found.append(Measurement(option, error / max(self.signal, 1e-30)))

    def _see(self, option: Option, decomposition: Decomposition) -> None:
        self.keep(self.layer, decomposition)
        if option == self.spectrum:
            ranks = sorted({option.rank for option in self.formed} - {0})
            delta = Operand.of(self.weight_OI - decomposition.dense())
            self.form = ClosedForm.of(self.weight_OI, self.share_O, delta, self.curvature, self.signal, ranks)

    def left(self) -> list[Option]:
        """What was not measured."""
        found = {m.option for m in self.found}
        return [option for option in self.options if option not in found]

    def still_wide(self) -> list[Option]:
        """What is neither measured nor predicted well enough; without a closed form, all that is left."""
        predicted = self.corrected()
        return [o for o in self.left() if predicted is None or predicted.estimate(o).half_width > WIDE]

    def corrected(self) -> Corrected | None:
        usable = [m for m in self.found if m.option in self.formed]
        return corrected(self.form, usable) if self.form and len(usable) > 1 else None
