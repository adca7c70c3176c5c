"""Grouped attention is the attention that transformers has, for a token at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM, StaticCache

from compressor.nn.attention import NAME

PROMPT, PLACES = 11, 16


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def decoded(model: LlamaForCausalLM, name: str, tokens_BT: Tensor, mask_BT: Tensor, static: bool) -> Tensor:
    """Logits after every token beyond the prompt."""
    model.set_attn_implementation(name)
    cache = StaticCache(config=model.config, max_cache_len=PLACES) if static else None
    seen, logits = 0, []
    for last in (PROMPT, *range(PROMPT + 1, tokens_BT.shape[1] + 1)):
        found = model(
            tokens_BT[:, seen:last],
            attention_mask=mask_BT[:, :last],
            past_key_values=cache,
            logits_to_keep=1,
        )
        cache, seen = found.past_key_values, last
        logits.append(found.logits)
    return torch.cat(logits[1:], dim=1)


@pytest.mark.parametrize("static", [True, False], ids=["static cache", "growing cache"])
@pytest.mark.parametrize("padding", [0, 3])
def test_logits_are_those_of_sdpa(model: LlamaForCausalLM, static: bool, padding: int) -> None:
    tokens_BT = torch.randint(64, (2, PROMPT + 4))
    mask_BT = torch.ones_like(tokens_BT)
    mask_BT[0, :padding] = 0
    expected, found = (decoded(model, name, tokens_BT, mask_BT, static) for name in ("sdpa", NAME))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_model_with_attention_sinks_is_refused(tokens: int) -> None:
    config = GptOssConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_local_experts=2,
        vocab_size=32,
        layer_types=["full_attention"],
        attn_implementation=NAME,
    )
    with pytest.raises(ValueError, match="sinks"):
        GptOssForCausalLM(config)(torch.arange(tokens)[None])


def test_no_place_that_is_masked_counts(model: LlamaForCausalLM) -> None:
    tokens_BT = torch.randint(64, (2, PROMPT + 2))
    mask_BT = torch.ones_like(tokens_BT)
    mask_BT[:, :4] = 0
    other_BT = tokens_BT.clone()
    other_BT[:, :4] = (other_BT[:, :4] + 1) % 64
    first, second = (decoded(model, NAME, tokens, mask_BT, True) for tokens in (tokens_BT, other_BT))
    assert torch.equal(first, second)
