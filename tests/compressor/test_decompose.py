"""W ≈ Q + L·R: more bits or more rank never hurt, batches change nothing, bad ranks are refused."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from allocator.storage import Option
from compressor.lowrank import alternating as alternation
from compressor.lowrank.decompose import RankError, decompose
from compressor.lowrank.decomposition import Decomposition
from compressor.lowrank.hessian import Curvature, squared_error
from compressor.quantize.gptq import DAMPING

MakeTensor = Callable[..., Tensor]
SLACK = 1.01
"""Rounding is not monotone to the last digit."""


def carry_out(
    w_OI: Tensor, hessian_II: Tensor, options: list[Option], rounds: int = 4, elements: int = 10**6
) -> list[float]:
    """Squared output error of every option on one matrix."""
    found: dict[int, Decomposition] = dict(
        decompose([w_OI] * len(options), Curvature.of(hessian_II), options, rounds, elements)
    )
    assert sorted(found) == list(range(len(options)))
    return [squared_error(w_OI, found[p].dense(), hessian_II) for p in range(len(options))]


def falls(errors: list[float]) -> bool:
    return all(later <= earlier * SLACK for earlier, later in pairwise(errors))


@pytest.mark.parametrize("rank", [0, 6])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_error_falls_with_bits(
    normal: MakeTensor, correlated: MakeTensor, rank: int, group_size: int
) -> None:
    options = [Option(bits, rank, group_size, 4 if rank else 0) for bits in (2, 3, 4, 5, 6, 8)]
    errors = carry_out(normal(48, 96), correlated(96), options)
    assert falls(errors)
    assert errors[-1] < errors[0] / 100


@pytest.mark.parametrize("bits", [0, 2, 3, 4])
@pytest.mark.parametrize("factor_bits", [4, 8, 16])
def test_error_falls_with_rank(
    normal: MakeTensor, correlated: MakeTensor, bits: int, factor_bits: int
) -> None:
    options = [Option(bits, rank, 64 if bits else 0, factor_bits) for rank in (1, 2, 4, 8, 16)]
    if bits:
        options.insert(0, Option(bits, 0, 64, 0))
    errors = carry_out(normal(48, 96), correlated(96), options)
    assert falls(errors)
    assert errors[-1] < errors[0]


@pytest.mark.parametrize("bits", [2, 4])
def test_alternating_is_never_worse_than_one_shot_and_pays_on_heavy_tails(
    normal: MakeTensor, bits: int
) -> None:
    w_OI, options = normal(48, 96) ** 3, [Option(bits, rank, 32, 8) for rank in (2, 8, 16)]
    once, often = (carry_out(w_OI, torch.eye(96), options, rounds) for rounds in (1, 4))
    assert all(after <= before * (1 + 1e-6) for before, after in zip(once, often, strict=True))
    assert sum(often) < 0.99 * sum(once)


def test_batches_change_nothing_but_the_order(normal: MakeTensor, correlated: MakeTensor) -> None:
    options = [
        Option(3, 4, 32, 4), Option(2, 0, 64, 0), Option(0, 8, 0, 8), Option(4, 2, 64, 16), Option(8, 0, 128, 0)
    ]  # fmt: skip
    together = carry_out(normal(32, 64), correlated(64), options)
    apart = carry_out(normal(32, 64), correlated(64), options, elements=1)
    assert apart == pytest.approx(together, rel=0.02)


def test_two_runs_give_the_same_codes(normal: MakeTensor, correlated: MakeTensor) -> None:
    w_OI, curvature, option = normal(32, 64), Curvature.of(correlated(64)), Option(3, 4, 32, 4)
    ((_, first),), ((_, second),) = (decompose([w_OI], curvature, [option]) for _ in range(2))
    assert torch.equal(first.dense(), second.dense())


def test_pure_low_rank_has_no_grid_and_plain_quantization_no_factors(
    normal: MakeTensor, correlated: MakeTensor
) -> None:
    options = [Option(0, 4, 0, 8), Option(4, 0, 64, 0)]
    found = dict(decompose([normal(16, 64)] * 2, Curvature.of(correlated(64)), options))
    assert found[0].quantized is None and found[0].factors is not None
    assert found[1].quantized is not None and found[1].factors is None


@pytest.mark.parametrize("option", [Option(2, 4, 32, 4), Option(0, 4, 0, 16, 2), Option(3, 0, 64, 0)])
def test_a_matrix_of_zeros_stays_zero(correlated: MakeTensor, option: Option) -> None:
    assert carry_out(torch.zeros(16, 64), correlated(64), [option]) == [pytest.approx(0, abs=1e-12)]


@pytest.mark.parametrize(
    "option", [Option(2, 4, 32, 4), Option(0, 4, 0, 16), Option(0, 4, 0, 16, 2), Option(3, 0, 64, 0)]
)
@pytest.mark.parametrize("seen", [1, 5])
def test_fewer_tokens_than_channels_are_enough(normal: MakeTensor, option: Option, seen: int) -> None:
    w_OI, x_nI = normal(16, 64), normal(seen, 64, seed=1)
    hessian_II = x_nI.T @ x_nI / seen
    (error,) = carry_out(w_OI, hessian_II, [option])
    assert error < 0.3 * squared_error(w_OI, w_OI * 0, hessian_II)


def test_squared_error_is_the_mean_squared_output_error_of_all_rows(normal: MakeTensor) -> None:
    w_OI, other_OI, x_nI = normal(8, 20), normal(8, 20, seed=1), normal(50, 20, seed=2)
    direct = (x_nI @ (w_OI - other_OI).T).square().sum(dim=1).mean().item()
    assert squared_error(w_OI, other_OI, x_nI.T @ x_nI / 50) == pytest.approx(direct, rel=1e-4)


def test_a_rank_above_the_smaller_side_is_refused_naming_the_largest(
    normal: MakeTensor, correlated: MakeTensor
) -> None:
    with pytest.raises(RankError, match="rank 17 exceeds .* 16 × 64 matrix; use at most 16"):
        next(decompose([normal(16, 64)], Curvature.of(correlated(64)), [Option(3, 17, 64, 4)]))


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        (Option(0, 5, 0, 8, heads=4), "rank 5 exceeds .* 4 × 64 matrix; use at most 4"),
        (Option(0, 1, 0, 8, heads=3), "3 heads do not divide the 16 rows"),
    ],
)
def test_a_rank_above_a_head_s_rows_is_refused_and_so_are_heads_that_do_not_divide_them(
    normal: MakeTensor, correlated: MakeTensor, option: Option, complaint: str
) -> None:
    with pytest.raises(RankError, match=complaint):
        next(decompose([normal(16, 64)], Curvature.of(correlated(64)), [option]))


def best_low_rank(w_OI: Tensor, hessian_II: Tensor, rank: int) -> Tensor:
    """The matrix of this rank with the least output error, by the eigenvectors of W H Wᵀ in float64."""
    wide_OI = w_OI.double()
    direction_Or = torch.linalg.eigh(wide_OI @ hessian_II.double() @ wide_OI.T).eigenvectors[:, -rank:]
    return (direction_Or @ (direction_Or.T @ wide_OI)).float()


def test_every_head_gets_the_best_low_rank_part_of_its_own_rows(
    normal: MakeTensor, correlated: MakeTensor
) -> None:
    w_OI, hessian_II = normal(36, 64), correlated(64)
    ((_, found),) = decompose([w_OI], Curvature.of(hessian_II), [Option(0, 5, 0, 16, heads=3)])
    expected_OI = torch.cat([best_low_rank(head_OI, hessian_II, 5) for head_OI in w_OI.chunk(3)])
    assert (found.dense() - expected_OI).norm() < 2**-8 * expected_OI.norm()


@pytest.mark.parametrize("factor_bits", [4, 8, 16])
def test_a_head_is_rounded_as_a_matrix_of_its_own(
    normal: MakeTensor, correlated: MakeTensor, factor_bits: int
) -> None:
    w_OI, curvature = normal(36, 64), Curvature.of(correlated(64))
    ((_, found),) = decompose([w_OI], curvature, [Option(0, 5, 0, factor_bits, heads=3)])
    alone = dict(decompose(w_OI.chunk(3), curvature, [Option(0, 5, 0, factor_bits)] * 3))
    expected_OI = torch.cat([alone[head].dense() for head in range(3)])
    assert torch.allclose(found.dense(), expected_OI, atol=1e-5 * float(w_OI.abs().max()))


def test_full_rank_with_wide_factors_is_nearly_exact(normal: MakeTensor, correlated: MakeTensor) -> None:
    w_OI, hessian_II = normal(16, 64), correlated(64)
    (error,) = carry_out(w_OI, hessian_II, [Option(0, 16, 0, 16)])
    assert error < 1e-4 * squared_error(w_OI, w_OI * 0, hessian_II)


def outlying(correlated: MakeTensor, columns: int, channels: int) -> Tensor:
    """A Hessian of inputs of which a few channels are thirty times the others."""
    scale_I = torch.ones(columns)
    scale_I[:channels] = 30
    return correlated(columns) * scale_I[:, None] * scale_I


def test_a_down_dated_hessian_does_not_feel_multiples_of_r(
    normal: MakeTensor, correlated: MakeTensor
) -> None:
    curvature = Curvature.of(outlying(correlated, 96, 4))
    right_rI = normal(6, 96)
    right_rI[:4, :4] += 30 * torch.eye(4)
    (factor,) = curvature.deflated([right_rI])
    assert factor is not None
    damped_II = torch.linalg.inv((factor.values_II.T @ factor.values_II).double())
    damping = damped_II.diagonal().mean() / (1 / DAMPING + 1)
    rest_II = damped_II - damping * torch.eye(96)
    before, after = (
        torch.linalg.vector_norm(right_rI.double() @ h_II.double())
        for h_II in (curvature.hessian_II, rest_II)
    )
    assert after < 1e-5 * before
    least = torch.linalg.eigvalsh(rest_II).min()
    assert least > -1e-5 * curvature.hessian_II.diagonal().sum()


def test_rows_that_hold_little_of_the_hessian_are_not_taken_out(normal: MakeTensor) -> None:
    assert list(Curvature.of(torch.eye(96)).deflated([normal(4, 96)])) == [None]


@pytest.mark.parametrize(("bits", "factor_bits"), [(2, 4), (2, 8), (3, 8), (2, 16)])
def test_where_few_channels_hold_most_of_the_hessian_taking_them_out_pays(
    normal: MakeTensor,
    correlated: MakeTensor,
    bits: int,
    factor_bits: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    w_OI, hessian_II = normal(96, 128), outlying(correlated, 128, 6)
    option = Option(bits, 16, 64, factor_bits)
    (with_it,) = carry_out(w_OI, hessian_II, [option])
    monkeypatch.setattr(alternation, "DEFLATION_ROUNDS", 0)
    (without,) = carry_out(w_OI, hessian_II, [option])
    assert with_it < 0.85 * without
