"""Low-rank key-value caches of whole models: exact at full rank, and ranks where they are worth most."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM
from transformers.cache_utils import DynamicCache

from compressor.kvcache.cache import LowRankCache, Projected, Unrounded
from compressor.kvcache.layout import CacheLayout, bases_of
from compressor.kvcache.ranks import CacheError, predicted_bytes, uniform
from profiler.kvcache.study import (
    PROBE_WINDOWS,
    KeysAndValues,
    adaptive_ranks,
    cache_kl,
    keys_and_values,
    plain_bytes,
    reference_logits,
    sensitivities,
)
from profiler.model.checkpoint import DEMO_PATH, find_model
from profiler.model.layers import LoadedModel, load_model
from profiler.statistics.calibration import text_tokens

SHARED = Path(__file__).parents[3] / "shared"


def calibrated(loaded: LoadedModel, chunk_size: int = 8) -> tuple[KeysAndValues, torch.Tensor]:
    vocabulary = loaded.model.config.vocab_size
    tokens_NT = torch.randint(vocabulary, (6, loaded.window), generator=torch.Generator().manual_seed(0))
    return keys_and_values(loaded, tokens_NT[:4], chunk_size), tokens_NT


def projected_in_full(found: KeysAndValues) -> LowRankCache:
    """A cache on bases that keep every direction."""

    def side(vector_HCcc: torch.Tensor) -> Projected:
        full_HC = np.full(vector_HCcc.shape[:2], found.chunk_size)
        return Projected(bases_of(vector_HCcc, full_HC, found.dtype), Unrounded(found.dtype))

    sides = tuple((side(keys), side(values)) for keys, values in found.vector_LKHCcc)
    return CacheLayout(sides, found.rotary).empty()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_at_full_rank_the_logits_are_the_models_own(
    model_directory: Callable[[str], Path], architecture: str
) -> None:
    loaded = load_model(find_model(str(model_directory(architecture))))
    found, tokens_NT = calibrated(loaded)
    cache = projected_in_full(found)
    with torch.no_grad():
        expected = loaded.model(
            tokens_NT[:2], past_key_values=DynamicCache(config=loaded.model.config)
        ).logits
        first = loaded.model(tokens_NT[:2, :20], past_key_values=cache, use_cache=True).logits
        rest = loaded.model(tokens_NT[:2, 20:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(torch.cat([first, rest], dim=1), expected, atol=1e-5, rtol=1e-5)


def test_beams_are_searched_through_a_full_cache_as_through_a_plain_one(tiny_llama: LoadedModel) -> None:
    found, tokens_NT = calibrated(tiny_llama)
    cache = projected_in_full(found)
    settings = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    expected, drawn = (
        tiny_llama.model.generate(tokens_NT[:1, :8], past_key_values=past, **settings)
        for past in (DynamicCache(config=tiny_llama.model.config), cache)
    )
    assert drawn.tolist() == expected.tolist()


def test_a_rotation_of_neighbours_is_refused(tmp_path: Path) -> None:
    config = CohereConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    CohereForCausalLM(config).save_pretrained(tmp_path / "cohere")
    with pytest.raises(CacheError, match="turns neighbouring numbers of a key together"):
        calibrated(load_model(find_model(str(tmp_path / "cohere"))))


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
    assert predicted_bytes(full, 64, 1, found.chunk_size, 4) == plain_bytes(found, 64)


def share_of_uniform(model: str, text: Path, calibration: Path, folder: Path, chunk_size: int) -> float:
    """KL with adaptive ranks over KL with uniform ones of the same bytes, half the cache's; no probe is measured on."""
    loaded = load_model(find_model(model))
    tokens_NT = text_tokens(loaded, text, 4 * loaded.window)
    fitting_NT = text_tokens(loaded, calibration, 16 * loaded.window)
    found = keys_and_values(loaded, fitting_NT, chunk_size)
    references = []
    for name, windows_NT in (("probe", fitting_NT[:PROBE_WINDOWS]), ("measured", tokens_NT)):
        (folder / name).mkdir()
        references.append(reference_logits(loaded, windows_NT, folder / name))
    weight_LK = sensitivities(loaded, found, references[0], fitting_NT[:PROBE_WINDOWS])
    even = uniform(found.shape, 0.5, loaded.window, chunk_size)
    ranks = adaptive_ranks(found, weight_LK, int(even.sum()))
    taken = [predicted_bytes(r, loaded.window, 1, chunk_size, 4) for r in (ranks, even)]
    assert taken[0] <= taken[1] <= plain_bytes(found, loaded.window) / 2
    adaptive, flat = (
        cache_kl(loaded, references[1], tokens_NT, partial(found.cache, r)).mean() for r in (ranks, even)
    )
    return float(adaptive / flat)


def test_adaptive_ranks_lose_less_than_uniform_ones_of_the_same_bytes(tmp_path: Path) -> None:
    whole = (DEMO_PATH / "evaluation.txt").read_text(encoding="utf-8")
    texts = tmp_path / "measured.txt", tmp_path / "calibration.txt"
    for path, part in zip(texts, (whole[: len(whole) // 3], whole[len(whole) // 3 :]), strict=True):
        path.write_text(part, encoding="utf-8")
    assert share_of_uniform("demo", *texts, tmp_path, 16) < 0.7


@pytest.mark.skipif(not SHARED.exists(), reason="the reference models are not beside the project")
def test_adaptive_ranks_lose_at_most_three_fifths_of_uniform_on_a_reference_model(tmp_path: Path) -> None:
    data = SHARED / "data"
    model, texts = SHARED / "models" / "llama-22m", (data / "heldout-books.txt", data / "calibration.txt")
    assert share_of_uniform(str(model), *texts, tmp_path, 32) <= 0.6


def test_chunks_that_do_not_divide_a_head_are_refused(tiny_llama: LoadedModel) -> None:
    with pytest.raises(CacheError, match="chunks of 5 do not divide a head of 16"):
        calibrated(tiny_llama, 5)
