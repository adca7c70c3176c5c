"""Low-rank key-value caches of whole models: exact at full rank, and ranks where they are worth most."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.cache_utils import DynamicCache

from compressor.kvranks import CacheError, predicted_bytes, uniform
from profiler.checkpoint import find_model
from profiler.kvcache import (
    KeysAndValues,
    adaptive_ranks,
    cache_kl,
    keys_and_values,
    plain_bytes,
    reference_logits,
    sensitivities,
)
from profiler.layers import LoadedModel, load_model


def calibrated(loaded: LoadedModel, chunk_size: int = 8) -> tuple[KeysAndValues, torch.Tensor]:
    vocabulary = loaded.model.config.vocab_size
    tokens_NT = torch.randint(vocabulary, (6, loaded.window), generator=torch.Generator().manual_seed(0))
    return keys_and_values(loaded, tokens_NT[:4], chunk_size), tokens_NT


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_at_full_rank_the_logits_are_the_models_own(
    model_directory: Callable[[str], Path], architecture: str
) -> None:
    loaded = load_model(find_model(str(model_directory(architecture))))
    found, tokens_NT = calibrated(loaded)
    cache = found.cache(np.full(found.shape, found.chunk_size))
    with torch.no_grad():
        expected = loaded.model(
            tokens_NT[:2], past_key_values=DynamicCache(config=loaded.model.config)
        ).logits
        first = loaded.model(tokens_NT[:2, :20], past_key_values=cache, use_cache=True).logits
        rest = loaded.model(tokens_NT[:2, 20:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(torch.cat([first, rest], dim=1), expected, atol=1e-5, rtol=1e-5)


def test_a_cache_of_half_the_bytes_holds_them_and_generates(tiny_llama: LoadedModel) -> None:
    found, tokens_NT = calibrated(tiny_llama)
    ranks = uniform(found.shape, 0.5, tiny_llama.window, found.chunk_size)
    cache = found.cache(ranks, 8)
    drawn = tiny_llama.model.generate(
        tokens_NT[:1, :8], past_key_values=cache, max_new_tokens=8, min_new_tokens=8, do_sample=False
    )
    assert drawn.shape == (1, 16)
    assert cache.held_bytes() == predicted_bytes(ranks, 15, 1, found.chunk_size, 4, 8)
    full = np.full(found.shape, found.chunk_size)
    assert predicted_bytes(full, 64, 1, found.chunk_size, 4) > plain_bytes(found, 64)


def test_adaptive_ranks_lose_less_than_uniform_ones_of_the_same_bytes(tmp_path: Path) -> None:
    loaded = load_model(find_model("demo"))
    from profiler.calibration import text_tokens
    from profiler.checkpoint import DEMO_PATH

    tokens_NT = text_tokens(loaded, DEMO_PATH / "evaluation.txt", 6 * loaded.window)[:, :128]
    found = keys_and_values(loaded, tokens_NT[2:], 16)
    reference = reference_logits(loaded, tokens_NT[:2], tmp_path)
    weight_LK = sensitivities(loaded, found, reference, tokens_NT[:1])
    even = uniform(found.shape, 0.5, 128, 16)
    ranks = adaptive_ranks(found, weight_LK, int(even.sum()))
    assert predicted_bytes(ranks, 128, 1, 16, 4) == predicted_bytes(even, 128, 1, 16, 4)
    adaptive, flat = (
        cache_kl(loaded, reference, tokens_NT[:2], lambda r=r: found.cache(r)).mean() for r in (ranks, even)
    )
    assert adaptive < 0.7 * flat


def test_chunks_that_do_not_divide_a_head_are_refused(tiny_llama: LoadedModel) -> None:
    with pytest.raises(CacheError, match="chunks of 5 do not divide a head of 16"):
        calibrated(tiny_llama, 5)
