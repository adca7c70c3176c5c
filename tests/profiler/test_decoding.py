"""A step of drawing text: the same logits from a cache of fixed memory, and no recorded step that is not trusted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, MambaConfig, MistralConfig, PretrainedConfig

from profiler.model.checkpoint import ModelError, find_model
from profiler.model.layers import load_model
from profiler.statistics import calibration
from profiler.statistics.calibration import sample_tokens
from profiler.statistics.decoding import Step, appended_step, eager_step, recorded_step, static_cache

ARCHITECTURES = ("gpt2", "llama", "mixtral", "opt")
LENGTH, WINDOWS = 40, 3
SLIDING: dict[str, PretrainedConfig] = {
    "mistral": MistralConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
        vocab_size=128,
        initializer_range=0.2,
    ),
    "gemma3": Gemma3TextConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        vocab_size=128,
        initializer_range=0.2,
    ),
}
on_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def drawn_tokens() -> torch.Tensor:
    return torch.randint(128, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(0))


def check_steps(model: torch.nn.Module) -> None:
    tokens_NT, cache = drawn_tokens(), static_cache(model, LENGTH)
    assert cache is not None
    step = eager_step(model)
    with torch.inference_mode():
        for t in range(LENGTH):
            token_n1 = tokens_NT[:, t : t + 1]
            found_nV = model(token_n1, past_key_values=cache, use_cache=True).logits[:, -1]
            torch.testing.assert_close(found_nV, step(token_n1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_cache_of_fixed_memory_gives_the_same_logits(
    architecture: str, model_directory: Callable[[str], Path]
) -> None:
    check_steps(load_model(find_model(str(model_directory(architecture)))).model)


@pytest.mark.parametrize("architecture", (*ARCHITECTURES, "gpt_neo"))
def test_keys_appended_in_place_give_the_same_logits(
    architecture: str, model_directory: Callable[[str], Path]
) -> None:
    model = load_model(find_model(str(model_directory(architecture)))).model
    tokens_NT = drawn_tokens()
    with torch.inference_mode():
        appended, eager = appended_step(model, LENGTH), eager_step(model)
        assert appended is not None
        for t in range(LENGTH):
            token_n1 = tokens_NT[:, t : t + 1]
            torch.testing.assert_close(appended(token_n1), eager(token_n1), rtol=1e-5, atol=1e-5)


def test_layers_that_see_less_than_a_window_are_left_to_transformers() -> None:
    model = AutoModelForCausalLM.from_config(SLIDING["mistral"]).eval()
    with torch.inference_mode():
        assert appended_step(model, LENGTH) is None
        assert appended_step(model, 8) is not None


@pytest.mark.parametrize("architecture", SLIDING)
def test_sliding_windows_are_masked(architecture: str) -> None:
    torch.manual_seed(0)
    check_steps(AutoModelForCausalLM.from_config(SLIDING[architecture]).eval())


def test_a_model_with_another_state_than_keys_and_values_is_not_recorded() -> None:
    config = MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.inference_mode():
        assert static_cache(model, LENGTH) is None
        with pytest.raises(ModelError, match="give --calibration FILE"):
            eager_step(model)(torch.zeros(1, 1, dtype=torch.int64))


def test_logits_of_another_model_are_noticed(model_directory: Callable[[str], Path]) -> None:
    loaded = load_model(find_model(str(model_directory("llama"))))
    tokens_NT = drawn_tokens()
    with torch.inference_mode():
        logits_TV = loaded.model(tokens_NT[:1, :-1]).logits[0]
        seen = {t: logits_TV[t] for t in (7, LENGTH - 2)}
        assert calibration._agrees(loaded, tokens_NT, seen)
        assert not calibration._agrees(loaded, tokens_NT, seen | {7: 1.1 * logits_TV[7]})
        assert not calibration._agrees(loaded, tokens_NT, seen | {7: logits_TV[8]})


def test_a_model_that_masks_by_the_length_of_its_cache_is_noticed(
    model_directory: Callable[[str], Path],
) -> None:
    loaded = load_model(find_model(str(model_directory("gpt_neo"))))
    tokens_NT, cache = drawn_tokens(), static_cache(loaded.model, LENGTH)
    with torch.inference_mode():
        steps = [
            loaded.model(token_n1, past_key_values=cache, use_cache=True).logits[0, -1]
            for token_n1 in tokens_NT[:, :-1].split(1, dim=1)
        ]
        assert not calibration._agrees(loaded, tokens_NT, dict(enumerate(steps)))


@on_card
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_recorded_step_replays_the_model(architecture: str, model_directory: Callable[[str], Path]) -> None:
    model = load_model(find_model(str(model_directory(architecture))), "cuda").model
    tokens_NT = drawn_tokens().cuda()
    with torch.inference_mode():
        recorded, eager = recorded_step(model, WINDOWS, LENGTH), eager_step(model)
        if recorded is None:
            pytest.skip("this model asks the card for numbers, so its step cannot be recorded")
        for t in range(LENGTH):
            token_n1 = tokens_NT[:, t : t + 1]
            torch.testing.assert_close(recorded(token_n1), eager(token_n1), rtol=1e-3, atol=1e-3)


@on_card
def test_windows_are_drawn_again_where_the_recorded_step_is_wrong(
    model_directory: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(find_model(str(model_directory("llama"))), "cuda")
    monkeypatch.setattr(calibration, "recorded_step", lambda *asked: None)
    expected_NT = sample_tokens(loaded, 4 * loaded.window, 1)

    def wrong(*asked: object) -> Step:
        return lambda token_n1: torch.randn(len(token_n1), loaded.vocabulary, device="cuda")

    monkeypatch.setattr(calibration, "recorded_step", wrong)
    assert torch.equal(sample_tokens(loaded, 4 * loaded.window, 1), expected_NT)
