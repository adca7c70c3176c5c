"""Random problems: matrices, and Hessians of inputs whose channels are correlated."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

torch.set_num_threads(1)

MakeTensor = Callable[..., Tensor]


@pytest.fixture(scope="session")
def normal() -> MakeTensor:
    """normal(*shape, seed=0): standard normal numbers, float32."""

    def make(*shape: int, seed: int = 0) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture(scope="session")
def correlated(normal: MakeTensor) -> MakeTensor:
    """correlated(columns, seed=0): mean x xᵀ of inputs whose spectrum decays and whose channels mix."""

    def make(columns: int, seed: int = 0) -> Tensor:
        mixing_II = normal(columns, columns, seed=seed) / columns**0.5
        decay_I = torch.exp(-4 * torch.arange(columns) / columns)
        return mixing_II.T @ (decay_I[:, None] * mixing_II) * columns

    return make
