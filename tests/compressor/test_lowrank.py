"""Low rank: the best correction under a Hessian, singular or not, with factors of any width."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from compressor.cuda.scaled_half import Operand
from compressor.lowrank.factorize import (
    Factors,
    Root,
    factorize,
    leading_directions,
    orthonormal,
    sharpened,
    square_root,
    through,
)
from compressor.quantize.gptq import Factor, SingularHessianError, inverse_factor

MakeTensor = Callable[..., Tensor]
on_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def decaying(normal: MakeTensor, rows: int, columns: int, rate: float = 0.9) -> Tensor:
    """A matrix with singular values rate^i."""
    side = min(rows, columns)
    left, right = torch.linalg.qr(normal(rows, side)).Q, torch.linalg.qr(normal(columns, side, seed=1)).Q
    return left * rate ** torch.arange(side) @ right.T


def output_energy(delta_OI: Tensor, hessian_II: Tensor) -> float:
    delta_OI = delta_OI.double()
    return float(((delta_OI @ hessian_II.double()) * delta_OI).sum())


def tail_energy(residual_OI: Tensor, hessian_II: Tensor, rank: int) -> float:
    """The least error any rank-r correction can leave: the tail of the eigenvalues of E H Eᵀ."""
    residual_OI = residual_OI.double()
    value_O = torch.linalg.eigvalsh(residual_OI @ hessian_II.double() @ residual_OI.T).clamp(min=0)
    return float(value_O.flip(0)[rank:].sum())


def factors_of(residual_OI: Tensor, hessian_II: Tensor, rank: int, bits: int = 16) -> Factors:
    residual = Operand.of(residual_OI)
    direction_Or = directions_of(residual_OI, square_root(hessian_II), rank)
    return factorize([residual], [direction_Or], Factor(inverse_factor(hessian_II)), bits)[0].factors


def directions_of(residual_OI: Tensor, root_II: Tensor, rank: int) -> Tensor:
    return leading_directions([through(Operand.of(residual_OI), Root.of(root_II))], rank)[0]


def test_a_square_root_times_its_transpose_is_the_hessian(correlated: MakeTensor) -> None:
    hessian_II = correlated(50)
    root_II = square_root(hessian_II)
    assert torch.allclose(root_II @ root_II.T, hessian_II, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rank", [1, 20])
def test_a_singular_hessian_has_a_square_root(normal: MakeTensor, rank: int) -> None:
    x_RI = normal(rank, 50)
    hessian_II = x_RI.T @ x_RI
    root_II = square_root(hessian_II)
    assert torch.allclose(root_II @ root_II.T, hessian_II, atol=1e-3 * hessian_II.diagonal().mean().item())


def test_a_hessian_of_negative_curvature_has_no_square_root() -> None:
    with pytest.raises(SingularHessianError):
        square_root(torch.diag(torch.tensor([1.0, 1.0, 1.0])) - torch.ones(3, 3))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_full_rank_reproduces_the_residual_to_the_precision_of_bfloat16(
    normal: MakeTensor, correlated: MakeTensor, shape: tuple[int, int]
) -> None:
    residual_OI = normal(*shape)
    product_OI = factors_of(residual_OI, correlated(shape[1]), min(shape)).product()
    assert (product_OI - residual_OI).norm() <= 2**-8 * residual_OI.norm()


@pytest.mark.parametrize("shape", [(64, 96), (96, 64)])
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_error_is_the_tail_of_the_exact_spectrum(
    normal: MakeTensor, correlated: MakeTensor, shape: tuple[int, int], rank: int
) -> None:
    residual_OI, hessian_II = decaying(normal, *shape), correlated(shape[1])
    left = output_energy(residual_OI - factors_of(residual_OI, hessian_II, rank).product(), hessian_II)
    assert left == pytest.approx(tail_energy(residual_OI, hessian_II, rank), rel=0.03)


def test_the_hessian_decides_which_directions_count(normal: MakeTensor) -> None:
    """A residual that is small where inputs are large is corrected there first."""
    residual_OI = torch.cat([normal(20, 8) * 0.1, normal(20, 8, seed=1)], dim=1)
    hessian_II = torch.diag(torch.cat([torch.full((8,), 1e4), torch.ones(8)]))
    left_OI = residual_OI - factors_of(residual_OI, hessian_II, 8).product()
    assert left_OI[:, :8].norm() < 0.1 * residual_OI[:, :8].norm()
    assert left_OI[:, 8:].norm() > 0.3 * residual_OI[:, 8:].norm()


@pytest.mark.parametrize("rank", [4, 8])
def test_a_singular_hessian_leaves_only_its_own_tail(normal: MakeTensor, rank: int) -> None:
    residual_OI, x_nI = normal(32, 48), normal(6, 48, seed=1)
    hessian_II = x_nI.T @ x_nI / 6
    left = output_energy(residual_OI - factors_of(residual_OI, hessian_II, rank).product(), hessian_II)
    whole = output_energy(residual_OI, hessian_II)
    assert left <= 1.03 * tail_energy(residual_OI, hessian_II, rank) + 1e-4 * whole


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_residual_of_zeros_needs_no_correction(correlated: MakeTensor, bits: int) -> None:
    product_OI = factors_of(torch.zeros(16, 64), correlated(64), 4, bits).product()
    assert torch.isfinite(product_OI).all()
    assert product_OI.abs().max() < 1e-6


def test_wider_factors_leave_less_error(normal: MakeTensor, correlated: MakeTensor) -> None:
    residual_OI, hessian_II = decaying(normal, 64, 96), correlated(96)
    left = [
        output_energy(residual_OI - factors_of(residual_OI, hessian_II, 8, bits).product(), hessian_II)
        for bits in (4, 8, 16)
    ]
    assert left[0] > left[1] > left[2] * 0.999
    assert left[1] < 1.05 * left[2]


def test_directions_are_orthonormal_and_in_falling_order(normal: MakeTensor, correlated: MakeTensor) -> None:
    residual_OI, hessian_II = decaying(normal, 40, 60), correlated(60)
    direction_Or = directions_of(residual_OI, square_root(hessian_II), 6)
    energy_r = ((direction_Or.T @ residual_OI @ hessian_II) * (direction_Or.T @ residual_OI)).sum(dim=1)
    assert torch.allclose(direction_Or.T @ direction_Or, torch.eye(6), atol=1e-5)
    assert (energy_r.diff() <= 0).all()


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_problems_of_a_batch_keep_their_own_rank(
    normal: MakeTensor, correlated: MakeTensor, bits: int
) -> None:
    residuals, hessian_II, ranks = list(normal(3, 24, 64)), correlated(64), [2, 5, 3]
    root_II = square_root(hessian_II)
    directions = [
        directions_of(residual_OI, root_II, rank) for residual_OI, rank in zip(residuals, ranks, strict=True)
    ]
    batch = factorize(list(map(Operand.of, residuals)), directions, Factor(inverse_factor(hessian_II)), bits)
    assert [fit.left_rO.shape for fit in batch] == [(2, 24), (5, 24), (3, 24)]
    for residual_OI, together, rank in zip(residuals, batch, ranks, strict=True):
        single = factors_of(residual_OI, hessian_II, rank, bits)
        factors = together.factors, single
        energies = [output_energy(residual_OI - f.product(), hessian_II) for f in factors]
        assert energies[0] == pytest.approx(energies[1], rel=0.01)


@pytest.mark.parametrize("columns", [1, 3, 50, 97])
def test_through_is_the_product_with_a_triangular_root(normal: MakeTensor, columns: int) -> None:
    residual_OI, root_II = normal(20, columns), normal(columns, columns, seed=1).tril()
    weighted_OI = through(Operand.of(residual_OI), Root.of(root_II)).dense()
    assert torch.allclose(weighted_OI, residual_OI @ root_II, atol=1e-4)


@on_card
def test_on_cuda_loud_channels_and_a_large_weight_leave_the_rest_its_precision(
    normal: MakeTensor, correlated: MakeTensor
) -> None:
    """Nothing is lost to float16's range: quiet channels, a thousandth as loud, keep their energy."""
    residual_OI, size_I = 1e-3 * normal(96, 512), torch.ones(512)
    residual_OI[3, 5], size_I[::100] = 1e-1, 1e3
    root_II = square_root(correlated(512) * size_I[:, None] * size_I)
    residual = Operand.of(residual_OI.cuda(), 2.0**8)
    found_OI = through(residual, Root.of(root_II.cuda())).dense().double().cpu()
    exact_OI = residual_OI.double() @ root_II.double()
    energy_I, exact_I = found_OI.square().sum(dim=0), exact_OI.square().sum(dim=0)
    assert torch.allclose(energy_I, exact_I, rtol=0.01)


def test_sharpening_a_neighbouring_basis_leads_to_the_leading_directions(
    normal: MakeTensor, correlated: MakeTensor
) -> None:
    weighted = through(Operand.of(decaying(normal, 64, 96)), Root.of(square_root(correlated(96))))
    lead_1Or = leading_directions([weighted], 8)
    near_1Or = orthonormal(lead_1Or + 0.05 * normal(1, 64, 8))
    found_1Or = torch.stack(sharpened([weighted], list(near_1Or)))
    kept, best = ((d_1Or.mT @ weighted.dense()).square().sum() for d_1Or in (found_1Or, lead_1Or))
    assert kept > 0.99 * best


@pytest.mark.parametrize("condition", [1e0, 1e4, 1e12, float("inf")])
def test_directions_are_orthonormal_however_fast_the_energy_falls(
    normal: MakeTensor, condition: float
) -> None:
    """`inf` is a residual of rank one, of which sixteen directions are asked."""
    energy_I = torch.zeros(96)
    energy_I[0] = 1
    if condition != float("inf"):
        energy_I = torch.logspace(0, -math.log10(condition), 96)
    residual_POI = torch.linalg.qr(normal(2, 128, 96)).Q * energy_I
    found_POr = leading_directions(list(map(Operand.of, residual_POI)), 16)
    gram_Prr = found_POr.mT @ found_POr
    assert torch.allclose(gram_Prr, torch.eye(16).expand(2, -1, -1), atol=1e-4)


def test_a_residual_of_zeros_has_directions_too(normal: MakeTensor) -> None:
    found_POr = leading_directions([Operand.of(torch.zeros(40, 64))], 8)
    assert torch.allclose(found_POr.mT @ found_POr, torch.eye(8)[None], atol=1e-5)
