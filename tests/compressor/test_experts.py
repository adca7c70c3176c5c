"""Experts taken apart compute what the fused stack does; stacks of other layouts are refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from compressor.nn.experts import ExpertList, UnsupportedExpertsError, unstack_experts

MakeTensor = Callable[..., Tensor]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}


@pytest.fixture
def stack(normal: MakeTensor) -> MixtralExperts:
    experts = MixtralExperts(MixtralConfig(**SIZES, experts_implementation="eager"))
    experts.gate_up_proj = nn.Parameter(normal(4, 48, 32) * 0.3, requires_grad=False)
    experts.down_proj = nn.Parameter(normal(4, 32, 24, seed=1) * 0.3, requires_grad=False)
    return experts


@pytest.mark.parametrize("used", [4, 2, 1])
def test_the_list_gives_the_output_of_the_stack(stack: MixtralExperts, normal: MakeTensor, used: int) -> None:
    """`used` experts are routed to; the others see no token."""
    hidden_nd, weight_nk = normal(20, 32), normal(20, 2, seed=1).softmax(-1)
    generator = torch.Generator().manual_seed(2)
    index_nk = torch.stack([torch.randperm(max(used, 2), generator=generator)[:2] % used for _ in range(20)])
    expected = stack(hidden_nd, index_nk, weight_nk)
    assert expected.abs().max() > 0.1
    assert torch.allclose(ExpertList(stack)(hidden_nd, index_nk, weight_nk), expected, atol=1e-5)


def test_a_whole_model_gives_the_same_logits_before_and_after() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MixtralConfig(**SIZES, initializer_range=0.2)).eval()
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        before = model(tokens).logits
        unstack_experts(model)
        after = model(tokens).logits
    assert before.std() > 0.1
    assert (after - before).abs().max() <= 1e-5


def test_every_expert_becomes_two_linear_layers_of_its_own() -> None:
    model = AutoModelForCausalLM.from_config(MixtralConfig(**SIZES))
    unstack_experts(model)
    found = {name for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".experts." in name}
    assert found == {
        f"model.layers.{block}.mlp.experts.{expert}.{projection}"
        for block in range(2)
        for expert in range(4)
        for projection in ("gate_up_proj", "down_proj")
    }


def test_taking_apart_twice_changes_nothing() -> None:
    model = AutoModelForCausalLM.from_config(MixtralConfig(**SIZES))
    unstack_experts(model)
    names = list(model.state_dict())
    unstack_experts(model)
    assert list(model.state_dict()) == names


def test_a_transposed_stack_with_biases_is_refused_by_name() -> None:
    model = AutoModelForCausalLM.from_config(GptOssConfig(**SIZES, layer_types=["full_attention"] * 2))
    with pytest.raises(UnsupportedExpertsError, match=r"model\.layers\.0\.mlp\.experts \(GptOssExperts\)"):
        unstack_experts(model)
