"""Products of rounded factors: exact on a CPU, within 11 bits of every term on CUDA."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from compressor.cuda.scaled_half import ROOM, Operand, largest_of, product, subtract_product

MakeTensor = Callable[..., Tensor]
on_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_on_a_cpu_nothing_is_rounded_or_copied(normal: MakeTensor) -> None:
    a, b = normal(5, 7), normal(7, 3, seed=1)
    assert Operand.of(a).values is a
    assert torch.equal(product(Operand.of(a), Operand.of(b)), a @ b)
    onto = torch.ones(5, 3)
    subtract_product(onto, Operand.of(a), Operand.of(b))
    assert torch.allclose(onto, 1 - a @ b)


def test_a_part_is_a_view_that_takes_up_other_numbers(normal: MakeTensor) -> None:
    whole = Operand.of(torch.zeros(4, 6))
    whole[1:3].put(normal(2, 6))
    assert torch.equal(whole.values[1:3], normal(2, 6)) and not whole.values[::3].any()
    assert torch.equal(whole.T.values, whole.values.T)
    assert whole[1:3, 2:4].values.shape == (2, 2)


@pytest.mark.parametrize("x", [torch.zeros(0, 3), torch.zeros(2, 2), torch.tensor([[1.0, -7.0]])])
def test_the_largest_magnitude(x: Tensor) -> None:
    assert largest_of(x) == max([0.0, *x.abs().flatten().tolist()])


@on_card
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_on_cuda_a_term_is_rounded_to_11_bits_whatever_its_size(normal: MakeTensor, size: float) -> None:
    a, b = normal(64, 128).cuda() * size, normal(128, 32, seed=1).cuda()
    exact = a.double() @ b.double()
    bound = a.double().abs() @ b.double().abs() * 2**-10
    assert ((product(Operand.of(a), Operand.of(b)) - exact).abs() <= bound).all()
    onto = torch.zeros(64, 32, device="cuda")
    subtract_product(onto, Operand.of(a, largest_of(a) * ROOM), Operand.of(b))
    assert ((onto + exact).abs() <= bound).all()


@on_card
def test_on_cuda_numbers_of_an_operand_may_grow_by_the_room_given(normal: MakeTensor) -> None:
    x = normal(16, 16).cuda()
    operand = Operand.of(x, largest_of(x) * ROOM)
    operand.put(x * ROOM)
    assert torch.isfinite(operand.values).all()
