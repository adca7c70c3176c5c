"""The sweep: which options are measured, and that the numbers are those of the definition."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from allocator.storage import Option
from compressor.lowrank.decompose import decompose
from compressor.lowrank.decomposition import Decomposition
from compressor.lowrank.hessian import Curvature
from profiler.documents.profile import Profile
from profiler.model.layers import Layer, LoadedModel
from profiler.prediction.measurement import GridSettings
from profiler.statistics.moments import InputMoment
from profiler.sweep.sweep import RowPrice, default_ranks, sweep_layer

GRID = GridSettings((2, 4), (0, 4), (32, 64), (64,), (4, 8))


def layer(rows: int, columns: int) -> Layer:
    return Layer("a.b", 0, "b", rows, columns, False)


def test_every_width_is_measured_at_every_group_size_and_every_rank_at_one() -> None:
    options = GRID.options(layer(64, 96))
    assert options == [
        *(Option(bits, 0, size, 0) for bits in (2, 4) for size in (32, 64)),
        *(Option(bits, 4, 64, factor_bits) for bits in (2, 4) for factor_bits in (4, 8)),
    ]


def test_ranks_above_half_the_smaller_side_are_left_out() -> None:
    assert [o.rank for o in GRID.options(layer(7, 96)) if o.rank] == []
    assert {o.rank for o in GRID.options(layer(8, 96))} == {0, 4}


@pytest.mark.parametrize(("side", "largest"), [(64, 8), (192, 32), (384, 64), (1536, 256), (8192, 256)])
def test_default_ranks_grow_with_the_model(side: int, largest: int) -> None:
    ranks = default_ranks((layer(side, side), layer(side, 4 * side), layer(side, side)))
    assert ranks == (0, largest // 4, largest // 2, largest)


@pytest.mark.parametrize("projection", ["q_proj", "down_proj"])
def test_error_sensitivity_and_signal_are_those_of_the_definition(
    tiny_llama: LoadedModel, projection: str
) -> None:
    """With H = Σ w x xᵀ / Σ w and rows that count s_o times as much: signal Σ_o s_o E_w[(Wx)_o²], error
    Σ_o s_o E_w[(ΔWx)_o²] / signal, sensitivity ½·E[w]·signal."""
    (member,) = (m for m in tiny_llama.layers_of(0) if m.projection == projection)
    generator = torch.Generator().manual_seed(1)
    x_nI = torch.randn(80, member.columns, generator=generator)
    weight_n = torch.rand(80, generator=generator)
    share_O = torch.rand(member.rows, generator=generator)
    share_O /= share_O.mean()
    hessian_II = (x_nI * weight_n[:, None]).T @ x_nI / weight_n.sum()
    kept: dict[Option, Decomposition] = {}
    sweep = sweep_layer(
        tiny_llama,
        InputMoment(member, hessian_II, 80),
        RowPrice(0.3, share_O),
        GRID,
        lambda _, found: kept.update({found.option: found}),
        rounds=1,
    )
    weight_OI = tiny_llama.weight(member)

    def energy(matrix_OI: Tensor) -> float:
        return (weight_n @ (x_nI @ matrix_OI.T).square() @ share_O / weight_n.sum()).item()

    assert sweep.layer == member
    assert sweep.tokens == 80
    assert sweep.signal == pytest.approx(energy(weight_OI), rel=1e-4)
    assert sweep.sensitivity == pytest.approx(0.3 * energy(weight_OI) / 2, rel=1e-4)
    assert [m.option for m in sweep.measurements] == sorted(GRID.options(member)) == sorted(kept)
    for measurement in sweep.measurements:
        error = energy(weight_OI - kept[measurement.option].dense()) / energy(weight_OI)
        assert measurement.error == pytest.approx(error, rel=1e-3)


def test_what_is_measured_together_is_what_the_worker_makes_alone(tiny_llama: LoadedModel) -> None:
    """The sweep batches options; the worker does one at a time. Their errors agree."""
    (member,) = (m for m in tiny_llama.layers_of(0) if m.projection == "o_proj")
    x_nI = torch.randn(80, 64, generator=torch.Generator().manual_seed(1))
    moment = InputMoment(member, x_nI.T @ x_nI / 80, 80)
    sweep = sweep_layer(tiny_llama, moment, RowPrice(1.0, torch.ones(64)), GRID, lambda *_: None, rounds=4)
    weight_OI = tiny_llama.weight(member)
    for measurement in sweep.measurements:
        ((_, alone),) = decompose([weight_OI], Curvature.of(moment.hessian_II), [measurement.option])
        error = (x_nI @ (weight_OI - alone.dense()).T).square().sum(1).mean().item() / sweep.signal
        assert measurement.error == pytest.approx(error, rel=0.03)


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_measured_errors_fall_with_bits(tiny_profile: Callable[[str], Profile], architecture: str) -> None:
    for measurements in tiny_profile(architecture).measurements.values():
        errors = {m.option: m.error for m in measurements}
        for option, error in errors.items():
            finer = Option(option.bits + 1, option.rank, option.group_size, option.factor_bits)
            assert errors.get(finer, 0.0) < error


def test_ranks_can_be_measured_at_every_group_size() -> None:
    layer = Layer("up", 0, "up", 64, 96, False)
    grid = GridSettings((2, 3), (0, 8), (32, 64, 128), (32, 64, 128), (4,))
    measured = {(o.bits, o.rank, o.group_size) for o in grid.options(layer)}
    assert measured == {(b, r, g) for b in (2, 3) for r in (0, 8) for g in (32, 64, 128)}
