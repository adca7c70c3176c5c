"""Windows: every one starts as the model's tokenizer starts a text, wherever it comes from."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from started import CONTEXT, IDS, VOCABULARY, byte_pairs, foreign, small_llama, started_llama
from tokenizers import processors
from torch import Tensor

from api.services.usecases import plan_budget
from profiler.documents.profile import Profile
from profiler.evaluation.divergence import compare, live_logits, measure, stored_logits, window_divergences
from profiler.evaluation.prompts import NEW_TOKENS, prompt_tokens
from profiler.evaluation.verification import verified
from profiler.model.checkpoint import ModelError, ModelRef, find_model
from profiler.model.layers import LoadedModel, load_model, open_model
from profiler.statistics.calibration import CalibrationError, silent, text_tokens, windows
from profiler.sweep.run import ProfileSettings, build_profile

KINDS = ("none", "one", "two")
LINES = "\n".join(
    f"Line {number} of a text that goes on for {number * 7} words or so." for number in range(400)
)


@pytest.fixture(scope="module")
def ref(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelRef]:
    """The tiny model beside a tokenizer with a start of some kind; made once."""
    made: dict[str, ModelRef] = {}

    def get(start: str) -> ModelRef:
        if start not in made:
            made[start] = started_llama(tmp_path_factory.mktemp("started") / start, start)
        return made[start]

    return get


@pytest.fixture(params=KINDS)
def start(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def loaded(ref: Callable[[str], ModelRef], start: str) -> LoadedModel:
    return load_model(ref(start))


def plain_tokens(loaded: LoadedModel, text: str) -> list[int]:
    return list(loaded.tokenizer(text, add_special_tokens=False)["input_ids"])


# What a text starts with


def test_a_text_starts_with_what_the_tokenizer_puts_before_it(
    ref: Callable[[str], ModelRef], start: str
) -> None:
    for load in (load_model, open_model):
        loaded = load(ref(start))
        assert loaded.text_start == IDS[start]
        assert loaded.first_scored == max(0, len(IDS[start]) - 1)
        assert loaded.tokenizer("Hello")["input_ids"] == [*IDS[start], *plain_tokens(loaded, "Hello")]


def test_what_the_tokenizer_puts_after_a_text_is_no_part_of_its_start(
    ref: Callable[[str], ModelRef], tmp_path: Path
) -> None:
    tokenizer = byte_pairs("none")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <sop>", special_tokens=[("<bos>", 0), ("<sop>", 2)]
    )
    tokenizer.save_pretrained(tmp_path)
    small_llama(tmp_path)
    assert load_model(find_model(str(tmp_path))).text_start == (0,)


@pytest.mark.parametrize(("bos", "start"), [(7, (7,)), (None, ()), (VOCABULARY, ())])
def test_without_a_tokenizer_a_text_starts_with_the_configuration_s_bos(
    tmp_path: Path, bos: int | None, start: tuple[int, ...]
) -> None:
    """Where it has one that the model knows."""
    loaded = load_model(small_llama(tmp_path / "model", bos))
    assert loaded.tokenizer is None
    assert loaded.text_start == start


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neo", "llama", "mixtral", "opt"])
def test_a_directory_without_a_tokenizer_has_none_whatever_its_architecture(
    model_directory: Callable[[str], Path], architecture: str
) -> None:
    """transformers makes up an empty one for some of them, which reads every text as nothing."""
    loaded = load_model(find_model(str(model_directory(architecture))))
    assert loaded.tokenizer is None
    assert loaded.text_start == (loaded.model.config.bos_token_id,)


def test_a_start_that_the_model_has_no_embedding_for_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    ref = started_llama(tmp_path / "model", "outside")
    for load in (load_model, open_model):
        with pytest.raises(ModelError) as refusal:
            load(ref)
        message = str(refusal.value)
        assert f"starts every text with token {VOCABULARY}, but the model knows {VOCABULARY};" in message
        assert "\n" not in message and message.count(". ") == 0


# Windows of texts


def test_every_window_of_a_text_starts_as_a_text_does(loaded: LoadedModel, start: str) -> None:
    """Its length counts the start; the text goes on where the window before it ended."""
    taken = loaded.window - len(IDS[start])
    tokens_NT = windows(loaded, LINES, 10**6, "text")
    text = plain_tokens(loaded, LINES)
    assert tokens_NT.shape == (len(text) // taken, loaded.window)
    assert tokens_NT[:, : len(IDS[start])].tolist() == [list(IDS[start])] * len(tokens_NT)
    assert tokens_NT[:, len(IDS[start]) :].flatten().tolist() == text[: len(tokens_NT) * taken]


def test_no_more_tokens_are_taken_than_asked_for_with_the_starts_among_them(loaded: LoadedModel) -> None:
    assert windows(loaded, LINES, 5 * loaded.window + 1, "text").numel() == 5 * loaded.window


def test_a_text_shorter_than_a_window_is_refused_with_the_tokens_that_it_needs(
    loaded: LoadedModel, start: str
) -> None:
    beside = {"none": "one window$", "one": "beside 1 that start it", "two": "beside 2 that start it"}[start]
    needed = loaded.window - len(IDS[start])
    text = loaded.tokenizer.decode(plain_tokens(loaded, LINES)[:needed])
    assert len(plain_tokens(loaded, text)) == needed
    assert windows(loaded, text, 1000, "text").shape == (1, loaded.window)
    short = loaded.tokenizer.decode(plain_tokens(loaded, LINES)[: needed - 1])
    with pytest.raises(
        CalibrationError, match=f"has {needed - 1} tokens; give at least {needed}, .*{beside}"
    ):
        windows(loaded, short, 1000, "text")


def written(folder: Path, **texts: str) -> list[Path]:
    paths = []
    for name, text in texts.items():
        paths.append(folder / f"{name}.txt")
        paths[-1].write_text(text, encoding="utf-8")
    return paths


def test_several_texts_are_mixed_evenly(loaded: LoadedModel, tmp_path: Path) -> None:
    """As many windows of each as of the others, taken as from that text alone."""
    texts = {"counted": LINES, "shouted": LINES.upper(), "spelled": " ".join(LINES)}
    paths = written(tmp_path, **texts)
    tokens_NT = text_tokens(loaded, paths, 12 * loaded.window)
    assert tokens_NT.shape == (12, loaded.window)
    for share_NT, text in zip(tokens_NT.split(4), texts.values(), strict=True):
        assert torch.equal(share_NT, windows(loaded, text, 4 * loaded.window, "text"))
    assert torch.equal(text_tokens(loaded, paths[0], 4 * loaded.window), tokens_NT[:4])


def test_a_text_too_short_for_its_share_gives_what_it_has(loaded: LoadedModel, tmp_path: Path) -> None:
    taken = loaded.window - len(loaded.text_start)
    short = loaded.tokenizer.decode(plain_tokens(loaded, LINES)[: 2 * taken])
    paths = written(tmp_path, long=LINES, short=short)
    assert len(text_tokens(loaded, paths, 20 * loaded.window)) == 10 + 2


def test_a_text_that_cannot_be_used_is_named_among_several(loaded: LoadedModel, tmp_path: Path) -> None:
    paths = written(tmp_path, long=LINES, short="too short")
    with pytest.raises(CalibrationError, match=r"short\.txt has \d+ tokens"):
        text_tokens(loaded, paths, 1000)


# The windows of a profile

SMALL = ProfileSettings(
    tokens=640, bits=(2, 3, 4), ranks=(0, 4), group_sizes=(64,), factor_bits=(8,), rounds=1
)


def profiled(ref: ModelRef, folder: Path, **settings: object) -> Profile:
    return build_profile(ref, folder / "profile", replace(SMALL, **settings), silent)


@pytest.mark.parametrize("texts", [{}, {"counted": LINES, "shouted": LINES.upper()}])
def test_a_profile_is_measured_on_windows_that_start_as_a_text_does(
    ref: Callable[[str], ModelRef], start: str, texts: dict[str, str], tmp_path: Path
) -> None:
    """Sampled or of several texts, for the statistics and for the probes."""
    profile = profiled(ref(start), tmp_path, calibration=tuple(written(tmp_path, **texts)))
    for tokens_NT in (profile.calibration_tokens(), profile.probe_tokens()):
        assert len(tokens_NT) >= 2
        assert tokens_NT[:, : len(IDS[start])].tolist() == [list(IDS[start])] * len(tokens_NT)
    record = profile.document.calibration
    assert record.text_start == IDS[start]
    assert record.windows + record.probe_windows == 10
    assert record.source == (
        "counted.txt + shouted.txt" if texts else "sampled from the model, after openings"
    )


# What is measured


def damaged(loaded: LoadedModel) -> torch.nn.Module:
    model = deepcopy(loaded.model)
    generator = torch.Generator().manual_seed(2)
    for layer in loaded.layers:
        weight = model.get_submodule(layer.name).weight
        weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    return model


@torch.no_grad()
def divergence_NT(loaded: LoadedModel, model: torch.nn.Module, tokens_NT: Tensor) -> Tensor:
    log_p, log_q = (m(tokens_NT).logits.double().log_softmax(-1) for m in (loaded.model, model))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def test_the_start_of_a_text_is_read_but_not_scored(loaded: LoadedModel, start: str, tmp_path: Path) -> None:
    """Scored are the predictions of the text's own tokens, its first one too where anything precedes it."""
    tokens_NT, model = windows(loaded, LINES, 6 * loaded.window, "text"), damaged(loaded)
    first = {"none": 0, "one": 0, "two": 1}[start]
    scored = loaded.window - {"none": 1, "one": 1, "two": 2}[start]
    expected_N = divergence_NT(loaded, model, tokens_NT)[:, first:-1].mean(dim=1)
    found = measure(model, live_logits(loaded), tokens_NT)
    assert found.tokens == 6 * scored
    assert found.kl_nats == pytest.approx(expected_N.mean().item(), rel=1e-4)
    targets = tokens_NT[:, first + 1 :, None]
    with torch.no_grad():
        log_q = model(tokens_NT).logits[:, first:-1].log_softmax(-1)
    assert found.perplexity == pytest.approx((-log_q.gather(-1, targets)).mean().exp().item(), rel=1e-4)

    stored = stored_logits(loaded, tokens_NT, tmp_path / "reference.f32")
    assert measure(model, stored, tokens_NT) == found
    with torch.no_grad():
        logits_NTV = model(tokens_NT[2:4]).logits
    by_window_N = window_divergences(logits_NTV, stored, 2, tokens_NT[2:4])
    assert torch.allclose(by_window_N.double(), expected_N[2:4], rtol=1e-4)
    assert torch.allclose(compare(model, stored, tokens_NT)[:, 0], expected_N, rtol=1e-4)


# Prompts


def test_a_prompt_starts_as_a_text_does(loaded: LoadedModel, start: str) -> None:
    assert prompt_tokens(loaded, "Hello").tolist() == [[*IDS[start], *plain_tokens(loaded, "Hello")]]
    assert prompt_tokens(loaded, "Hello").tolist() == [loaded.tokenizer("Hello")["input_ids"]]


def test_of_a_long_prompt_the_end_is_read_and_still_the_start(loaded: LoadedModel, start: str) -> None:
    (tokens,) = prompt_tokens(loaded, LINES).tolist()
    room = loaded.window - NEW_TOKENS
    assert len(tokens) == room
    assert tokens == [*IDS[start], *plain_tokens(loaded, LINES)[-(room - len(IDS[start])) :]]


def test_an_empty_prompt_is_the_start_alone(ref: Callable[[str], ModelRef]) -> None:
    tokens_1T = prompt_tokens(load_model(ref("one")), "")
    assert tokens_1T.dtype == torch.int64
    assert tokens_1T.tolist() == [[0]]


# What a plan's verification counts


def test_a_verified_plan_says_how_many_tokens_it_was_measured_on(
    ref: Callable[[str], ModelRef], start: str, tmp_path: Path
) -> None:
    """Those that are scored: of a start of two tokens not the second."""
    profile = profiled(ref(start), tmp_path)
    (tmp_path / "work").mkdir()
    (plan,) = verified(
        open_model(ref(start)), profile, [plan_budget(profile, "3.1bpw")], tmp_path / "work", silent
    )
    scored = CONTEXT - {"none": 1, "one": 1, "two": 2}[start]
    assert plan.verification is not None
    assert plan.verification.tokens == len(profile.probe_tokens()) * scored


# Tokenizers that cannot read every text


@pytest.mark.parametrize("kind", ["letters", "words"])
def test_a_tokenizer_that_knows_no_latin_letter_still_starts_its_texts(tmp_path: Path, kind: str) -> None:
    foreign(kind).save_pretrained(tmp_path)
    small_llama(tmp_path)
    assert load_model(find_model(str(tmp_path))).text_start == (0,)
