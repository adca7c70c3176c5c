"""The sweep: every layer truly compressed under every option of the grid, and what that costs.

What lives here: the grid's options and measuring one block. Statistics come from `calibration.py`; resuming and
files are for `profile.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from allocator.storage import Option
from compressor.decompose import Curvature, Decomposition, decompose, squared_error
from profiler.calibration import InputMoment
from profiler.layers import Layer, LoadedModel

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
FACTOR_BITS = (4,)


@dataclass(frozen=True, slots=True)
class GridSettings:
    """What the sweep measures: every bits × group size at rank 0, and every bits × rank at `rank_group_sizes`."""

    bits: tuple[int, ...]
    ranks: tuple[int, ...]
    group_sizes: tuple[int, ...]
    rank_group_sizes: tuple[int, ...]
    factor_bits: tuple[int, ...]

    def options(self, layer: Layer) -> list[Option]:
        """The options of one layer; ranks above half its smaller side are left out, they would cost more than W."""
        plain = [Option(bits, 0, size, 0) for bits in self.bits for size in self.group_sizes]
        mixed = [
            Option(bits, rank, size, factor_bits)
            for bits in self.bits
            for rank in self.ranks
            for size in self.rank_group_sizes
            for factor_bits in self.factor_bits
            if 0 < rank <= min(layer.rows, layer.columns) // 2
        ]
        return plain + mixed


@dataclass(frozen=True, slots=True)
class Measurement:
    """error: relative squared output error tr(ΔW H ΔWᵀ)/tr(W H Wᵀ)."""

    option: Option
    error: float


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
            [weights[layer.name] for layer, _ in jobs], curvature, [o for _, o in jobs], rounds
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
