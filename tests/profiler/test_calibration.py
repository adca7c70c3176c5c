"""Calibration: tokens that can be drawn again, and texts that are cut into windows or refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from profiler.model.checkpoint import find_model
from profiler.model.layers import LoadedModel, load_model
from profiler.statistics.calibration import (
    CalibrationError,
    sample_tokens,
    text_tokens,
    tokens_sha256,
    windows,
)


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load_model(find_model("demo"))


def test_sampling_again_with_the_same_seed_gives_the_same_tokens(tiny_llama: LoadedModel) -> None:
    first, again, other = (sample_tokens(tiny_llama, 256, seed) for seed in (1, 1, 2))
    assert first.shape == (4, 64)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert tokens_sha256(first) == tokens_sha256(again) != tokens_sha256(other)


def test_samples_start_at_the_beginning_of_text_and_stay_in_the_vocabulary(tiny_llama: LoadedModel) -> None:
    tokens_NT = sample_tokens(tiny_llama, 256, 1)
    assert (tokens_NT[:, 0] == 0).all()
    assert ((tokens_NT >= 0) & (tokens_NT < 128)).all()


def test_samples_follow_the_model_s_own_distribution(tiny_llama: LoadedModel) -> None:
    """Their mean surprise is the model's mean entropy, within four standard errors."""
    tokens_NT = sample_tokens(tiny_llama, 2048, 1)
    with torch.no_grad():
        log_p = tiny_llama.model(tokens_NT).logits[:, :-1].log_softmax(-1)
    surprise = -log_p.gather(-1, tokens_NT[:, 1:, None]).squeeze(-1)
    excess = surprise + (log_p.exp() * log_p).sum(-1)
    assert abs(excess.mean()) < 4 * excess.std() / excess.numel() ** 0.5
    assert surprise.mean() < torch.tensor(128.0).log() - 0.5


def test_windows_are_pieces_of_the_text_taken_evenly_from_start_to_end(demo: LoadedModel) -> None:
    text = " ".join(f"Line {i} of a text that goes on for long enough." for i in range(700))
    all_tokens = demo.tokenizer(text, add_special_tokens=False)["input_ids"]
    available = len(all_tokens) // demo.window
    found = windows(demo, text, 3 * demo.window, "text")
    starts = [0, round((available - 1) / 2), available - 1]
    assert available > 6
    assert found.tolist() == [all_tokens[s * demo.window : (s + 1) * demo.window] for s in starts]


def test_a_text_gives_no_more_windows_than_it_has(demo: LoadedModel) -> None:
    text = "A short but sufficient text. " * 200
    count = len(demo.tokenizer(text, add_special_tokens=False)["input_ids"])
    assert windows(demo, text, 10**6, "text").shape == (count // demo.window, demo.window)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is empty"),
        (b"  \n ", "is empty"),
        (b"too short", "tokens; give at least 512"),
        (b"\xff\xfe\xff", "UTF-8"),
    ],
)
def test_unusable_texts_are_refused(
    demo: LoadedModel, tmp_path: Path, content: bytes, complaint: str
) -> None:
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(CalibrationError, match=complaint):
        text_tokens(demo, tmp_path / "text", 1000)


def test_a_missing_text_and_a_missing_tokenizer_are_refused(
    demo: LoadedModel, tiny_llama: LoadedModel, tmp_path: Path
) -> None:
    with pytest.raises(CalibrationError, match="cannot read"):
        text_tokens(demo, tmp_path / "absent", 1000)
    with pytest.raises(CalibrationError, match="has no tokenizer"):
        text_tokens(tiny_llama, tmp_path / "absent", 1000)


def test_a_text_of_unknown_tokens_is_refused(tiny_llama: LoadedModel) -> None:
    """A tokenizer of Latin words reads Greek as nothing but unknown tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "arma": 1, "virumque": 2, "cano": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    latin = replace(tiny_llama, tokenizer=tokenizer)
    assert len(windows(latin, "arma virumque cano " * 100, 128, "Virgil")) == 2
    with pytest.raises(CalibrationError, match="100% of the tokens of Homer are unknown"):
        windows(latin, "μῆνιν ἄειδε θεά " * 100, 128, "Homer")


def test_one_token_over_and_over_is_refused(demo: LoadedModel) -> None:
    with pytest.raises(CalibrationError, match="one token repeated"):
        windows(demo, "\x00" * 3000, 1024, "zeros")
