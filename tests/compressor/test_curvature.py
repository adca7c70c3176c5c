"""Curvature: what an error costs under a Hessian, and what is only worked out when it is asked for."""

from __future__ import annotations

import pytest
import torch
from conftest import MakeTensor
from torch import Tensor

from allocator.storage import Option
from compressor.cuda.scaled_half import Operand
from compressor.lowrank.decompose import decompose
from compressor.lowrank.hessian import Curvature, row_errors, squared_error
from compressor.quantize.gptq import SingularHessianError

OPTIONS = (Option(3, 0, 64, 0), Option(2, 4, 64, 8), Option(0, 8, 0, 8))


@pytest.fixture
def inputs(normal: MakeTensor) -> Tensor:
    return normal(300, 64, seed=2) * torch.logspace(0, 1, 64)


def test_root_and_factor_are_those_of_the_hessian(normal: MakeTensor) -> None:
    x_nI = normal(300, 64)
    hessian_II = x_nI.T @ x_nI / 300
    curvature = Curvature.of(hessian_II)
    assert torch.allclose(curvature.root_II @ curvature.root_II.T, hessian_II, rtol=1e-3, atol=1e-3)
    identity_II = curvature.factor_II.T @ curvature.factor_II @ hessian_II
    assert torch.allclose(identity_II, torch.eye(64), atol=0.1), "but for the damping"
    assert curvature.root_II is curvature.root_II
    assert curvature.factor_II is curvature.factor_II


def test_a_hessian_that_cannot_be_factored_is_refused_when_its_factor_is_asked_for() -> None:
    curvature = Curvature.of(torch.full((8, 8), torch.nan))
    with pytest.raises(SingularHessianError):
        _ = curvature.factor_II


def test_errors_are_those_of_the_outputs_with_every_row_s_share(normal: MakeTensor, inputs: Tensor) -> None:
    """Σ_O s_O · mean (ΔW x)_O², by the outputs themselves; without shares every row counts once."""
    curvature = Curvature.of(inputs.T @ inputs / 300)
    weight_OI, share_O = normal(48, 64, seed=3), torch.linspace(0, 2, 48)
    found = [decomposition for _, decomposition in decompose([weight_OI] * 3, curvature, OPTIONS, rounds=1)]
    largest = weight_OI.abs().max().item()
    error_PO = torch.stack([(inputs @ (weight_OI - one.dense()).T).square().mean(dim=0) for one in found])
    for shares, expected_P in ((None, error_PO.sum(dim=1)), (share_O, error_PO @ share_O)):
        together = [curvature.squared_errors([weight_OI], [one], largest, shares) for one in found]
        assert torch.allclose(torch.cat(together), expected_P, rtol=1e-3)
    signal_O = (inputs @ weight_OI.T).square().mean(dim=0)
    signal = curvature.squared_norms(Operand.of(weight_OI), 1, share_O)
    assert signal.item() == pytest.approx((signal_O @ share_O).item(), rel=1e-3)
    twice = curvature.squared_norms(Operand.of(torch.cat((weight_OI, 2 * weight_OI))), 2, share_O)
    assert torch.allclose(twice, signal * torch.tensor([1.0, 4.0]), rtol=1e-3)


def test_errors_of_rows_sum_to_that_of_the_matrix(normal: MakeTensor, inputs: Tensor) -> None:
    hessian_II, weight_OI = inputs.T @ inputs / 300, normal(48, 64, seed=3)
    rounded_OI = weight_OI.round()
    error_O = row_errors(weight_OI, rounded_OI, hessian_II)
    assert torch.allclose(error_O, (inputs @ (weight_OI - rounded_OI).T).square().mean(dim=0), rtol=1e-3)
    assert squared_error(weight_OI, rounded_OI, hessian_II) == pytest.approx(error_O.sum().item())
