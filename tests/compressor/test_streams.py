"""Tasks side by side: all are done once, the first error is raised, and a card's results are there when they come."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from compressor.cuda.cuda_streams import SMALL_MATRIX, at_once, side_by_side

CPU = torch.device("cpu")
LARGE = SMALL_MATRIX + 1
on_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def failing() -> int:
    raise OSError("disk full")


def test_on_a_cpu_one_after_the_other_each_begun_when_it_is_asked_for() -> None:
    begun: list[int] = []

    def task(number: int) -> int:
        begun.append(number)
        return number

    found = side_by_side(CPU, [partial(task, number) for number in range(3)], LARGE)
    assert at_once(CPU) == 1
    assert next(found) == 0 and begun == [0]
    assert list(found) == [1, 2]


def test_what_a_task_raises_is_raised() -> None:
    with pytest.raises(OSError, match="disk full"):
        list(side_by_side(CPU, [lambda: 1, failing], LARGE))


@on_card
def test_on_cuda_every_task_sees_what_was_asked_before_and_is_done_when_it_comes() -> None:
    device = torch.device("cuda", 0)
    a = torch.randn(4096, 4096, device=device)
    for _ in range(20):
        a = a @ a
        a /= a.norm()
    expected = [float((a * k).sum()) for k in range(6)]
    a = a + 0

    def task(k: int) -> tuple[int, torch.Tensor]:
        return k, (a * k).sum()

    found = dict(side_by_side(device, [partial(task, k) for k in range(6)], LARGE))
    assert [found[k].item() for k in range(6)] == pytest.approx(expected)


@on_card
def test_on_cuda_what_a_task_raises_is_raised() -> None:
    with pytest.raises(OSError, match="disk full"):
        list(side_by_side(torch.device("cuda", 0), [failing, lambda: 1, lambda: 2], LARGE))
