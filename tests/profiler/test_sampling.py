"""Sampling: windows drawn from the model itself, which begin as texts of many kinds do."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from started import CONTEXT, IDS, VOCABULARY, foreign, small_llama, started_llama
from tokenizers import processors

from profiler.model.checkpoint import ModelRef, find_model
from profiler.model.layers import LoadedModel, load_model
from profiler.statistics.calibration import OPENED_SHARE, OPENINGS, drawn_openings, sample_tokens

KINDS = {
    "encyclopedia",
    "news",
    "fiction",
    "essay",
    "web",
    "code",
    "mathematics",
    "science",
    "tables",
    "dialogue",
    "instructions",
    "languages",
}
WINDOWS = 2 * len(KINDS)


def openings() -> dict[str, list[str]]:
    return dict(json.loads(OPENINGS.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def ref(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelRef]:
    """The tiny model beside a tokenizer with a start of some kind; made once."""
    made: dict[str, ModelRef] = {}

    def get(start: str) -> ModelRef:
        if start not in made:
            made[start] = started_llama(tmp_path_factory.mktemp("started") / start, start)
        return made[start]

    return get


@pytest.fixture(params=["none", "one", "two"])
def start(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def loaded(ref: Callable[[str], ModelRef], start: str) -> LoadedModel:
    return load_model(ref(start))


# Openings


def test_there_are_openings_of_every_kind() -> None:
    found = openings()
    assert set(found) == KINDS
    assert all(len(texts) >= 10 for texts in found.values())


def test_every_opening_is_a_text_of_its_own() -> None:
    texts = [text for kind in openings().values() for text in kind]
    assert len(texts) >= 250
    assert all(isinstance(text, str) and text.strip() and len(text) <= 200 for text in texts)
    assert len(set(texts)) == len(texts)
    assert len({text[:12] for text in texts}) > 0.9 * len(texts), "beginnings differ too"


def test_openings_are_drawn_kind_by_kind_each_once_before_any_comes_again() -> None:
    found = openings()
    kind_of = {text: kind for kind, texts in found.items() for text in texts}
    smallest = min(len(texts) for texts in found.values())
    drawn = drawn_openings(len(KINDS) * smallest, Random(0))
    assert len(set(drawn)) == len(drawn)
    assert set(Counter(kind_of[text] for text in drawn).values()) == {smallest}
    assert {kind_of[text] for text in drawn[: len(KINDS)]} == KINDS
    again = drawn_openings(1000, Random(0))
    assert again[: len(drawn)] == drawn != drawn_openings(len(drawn), Random(1))
    assert set(Counter(kind_of[text] for text in again).values()) <= {83, 84}


# Windows


def kinds_begun(loaded: LoadedModel, tokens_NT: torch.Tensor) -> list[str | None]:
    """The kind of opening that each window goes on with after its start; `None` for none.

    Start and opening fill half a window at most, a <bos> that is dropped among them.
    """
    room = loaded.window // 2 - max(1, len(loaded.text_start))
    begun = {}
    for kind, texts in openings().items():
        for text in texts:
            begun[tuple(loaded.tokenizer(text, add_special_tokens=False)["input_ids"][:room])] = kind
    bodies = tokens_NT[:, len(loaded.text_start) :].tolist()
    return [
        next((kind for tokens, kind in begun.items() if tuple(body[: len(tokens)]) == tokens), None)
        for body in bodies
    ]


def test_a_window_begins_with_the_start_and_an_opening(loaded: LoadedModel, start: str) -> None:
    """Of every kind as many; the rest of the window, half of it at least, is the model's own."""
    tokens_NT = sample_tokens(loaded, WINDOWS * loaded.window, 1, opened_share=1.0)
    assert tokens_NT.shape == (WINDOWS, CONTEXT)
    assert tokens_NT[:, : len(IDS[start])].tolist() == [list(IDS[start])] * WINDOWS
    assert Counter(kinds_begun(loaded, tokens_NT)) == dict.fromkeys(KINDS, 2)
    assert len({tuple(body) for body in tokens_NT[:, CONTEXT // 2 :].tolist()}) == WINDOWS


def test_a_share_of_windows_can_be_the_model_s_own_from_the_start(loaded: LoadedModel) -> None:
    for share, expected in ((0.0, 0), (0.5, WINDOWS // 2), (1.0, WINDOWS)):
        tokens_NT = sample_tokens(loaded, WINDOWS * loaded.window, 1, opened_share=share)
        assert sum(kind is not None for kind in kinds_begun(loaded, tokens_NT)) == expected
    usual = kinds_begun(loaded, sample_tokens(loaded, WINDOWS * loaded.window, 1))
    assert sum(kind is not None for kind in usual) == round(OPENED_SHARE * WINDOWS)
    assert set(usual) - {None} == KINDS


def test_openings_come_in_an_order_of_the_seed(loaded: LoadedModel) -> None:
    first, again, other = (sample_tokens(loaded, WINDOWS * loaded.window, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert kinds_begun(loaded, first) != kinds_begun(loaded, other)


def test_where_the_tokenizer_adds_no_start_text_is_drawn_after_bos_which_is_dropped(
    ref: Callable[[str], ModelRef],
) -> None:
    """It is the text of a tokenizer that does add it, a token longer at its end."""
    dropped, kept = (
        sample_tokens(load_model(ref(start)), 6 * CONTEXT, 1, opened_share=0.0) for start in ("none", "one")
    )
    assert (kept[:, 0] == 0).all()
    assert torch.equal(dropped[:, :-1], kept[:, 1:])


def test_without_bos_anywhere_a_window_begins_with_any_token(tmp_path: Path) -> None:
    loaded = load_model(small_llama(tmp_path, bos=None))
    tokens_NT = sample_tokens(loaded, 100 * CONTEXT, 1)
    assert tokens_NT.shape == (100, CONTEXT)
    assert len(tokens_NT[:, 0].unique()) > 60
    assert ((tokens_NT >= 0) & (tokens_NT < VOCABULARY)).all()


def test_told_tokens_leave_the_rest_to_the_model_s_own_distribution(ref: Callable[[str], ModelRef]) -> None:
    """After the openings, the tokens' mean surprise is the model's mean entropy, within four standard errors."""
    loaded = load_model(ref("one"))
    tokens_NT = sample_tokens(loaded, 60 * CONTEXT, 1)
    with torch.no_grad():
        log_p = loaded.model(tokens_NT).logits[:, CONTEXT // 2 - 1 : -1].log_softmax(-1)
    surprise = -log_p.gather(-1, tokens_NT[:, CONTEXT // 2 :, None]).squeeze(-1)
    excess = surprise + (log_p.exp() * log_p).sum(-1)
    assert abs(excess.mean()) < 4 * excess.std() / excess.numel() ** 0.5


def test_progress_counts_windows(loaded: LoadedModel) -> None:
    seen: list[tuple[str, int, int]] = []
    sample_tokens(loaded, 150 * loaded.window, 1, lambda *step: seen.append(step))
    assert {(stage, total) for stage, _, total in seen} == {("sampling calibration text", 150)}
    done = [count for _, count, _ in seen]
    assert done == sorted(done)
    assert done[-1] == 150


@pytest.mark.parametrize("kind", ["letters", "words"])
@pytest.mark.parametrize("bos", [0, None])
def test_a_tokenizer_that_reads_no_opening_leaves_the_whole_text_to_the_model(
    tmp_path: Path, kind: str, bos: int | None
) -> None:
    tokenizer = foreign(kind)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.save_pretrained(tmp_path)
    small_llama(tmp_path, bos)
    tokens_NT = sample_tokens(load_model(find_model(str(tmp_path))), 30 * CONTEXT, 1)
    assert ((tokens_NT >= 0) & (tokens_NT < VOCABULARY)).all()
