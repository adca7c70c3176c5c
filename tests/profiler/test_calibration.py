"""Calibration: tokens that can be drawn again, and statistics that equal what autograd and hooks give."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from profiler.calibration import (
    BlockInputs,
    CalibrationError,
    block_calls,
    gradient_moments,
    input_moments,
    sample_tokens,
    text_tokens,
    tokens_sha256,
    windows,
)
from profiler.checkpoint import find_model
from profiler.layers import LoadedModel, load_model
from profiler.stream import block_works

ARCHITECTURES = ("gpt2", "gpt_neo", "llama", "mixtral", "opt")
TOKENS_NT = torch.randint(1, 128, (6, 24), generator=torch.Generator().manual_seed(3))
"""Six windows: a full batch of four and a short one."""


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load_model(find_model("demo"))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def loaded(request: pytest.FixtureRequest, model_directory: Callable[[str], Path]) -> LoadedModel:
    return load_model(find_model(str(model_directory(request.param))))


def block_inputs(loaded: LoadedModel, folder: Path) -> list[BlockInputs]:
    return [BlockInputs(folder / f"{i}.f32", (*TOKENS_NT.shape, 64)) for i in range(len(loaded.block_names))]


def hooked(loaded: LoadedModel, hook: Callable[[str], Callable[..., None]]) -> list[Any]:
    return [
        loaded.model.get_submodule(layer.name).register_forward_hook(hook(layer.name))
        for layer in loaded.layers
    ]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The labels of the gradients, as they are drawn."""
    labels: list[Tensor] = []
    multinomial = torch.multinomial

    def listen(*arguments: Any, **keywords: Any) -> Tensor:
        label = multinomial(*arguments, **keywords)
        labels.append(label.flatten())
        return label

    monkeypatch.setattr(torch, "multinomial", listen)
    return labels


def direct_moments(loaded: LoadedModel, label_NT: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """mean x xᵀ of every layer, and diag G per token, from one forward and backward pass of the whole model."""
    inputs: dict[str, list[Tensor]] = defaultdict(list)
    squares: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[name].append(arguments[0].detach().flatten(0, -2).double())
            output.register_hook(
                lambda g: squares.update({name: squares[name] + g.flatten(0, -2).square().sum(0)})
            )

        return hook

    handles = hooked(loaded, watch)
    embeddings = loaded.model.get_input_embeddings()
    handles.append(embeddings.register_forward_hook(lambda m, a, output: output.requires_grad_()))
    log_p = loaded.model(TOKENS_NT, use_cache=False).logits.log_softmax(-1)
    (-log_p.gather(-1, label_NT[..., None]).sum()).backward()
    for handle in handles:
        handle.remove()
    hessians = {name: torch.cat(x).T @ torch.cat(x) / len(torch.cat(x)) for name, x in inputs.items()}
    return hessians, {name: total / TOKENS_NT.numel() for name, total in squares.items()}


def test_block_by_block_statistics_are_those_of_the_whole_model(
    loaded: LoadedModel, drawn: list[Tensor], tmp_path: Path
) -> None:
    """The Hessians, the gradient moments and their layers, for a model of every architecture."""
    inputs = block_inputs(loaded, tmp_path)
    found, _ = gradient_moments(loaded, TOKENS_NT, 7, inputs)
    hessians, moments = direct_moments(loaded, torch.cat(drawn).view(TOKENS_NT.shape))
    for layer in loaded.layers:
        expected = moments.get(layer.name, torch.zeros(layer.rows))
        assert torch.allclose(found[layer.name], expected, rtol=1e-3, atol=1e-6 * float(expected.max())), (
            layer
        )
    calls = block_calls(loaded, TOKENS_NT)
    for index in range(len(loaded.block_names)):
        seen = []
        for moment in input_moments(loaded, index, calls, inputs[index]):
            for layer in moment.layers:
                seen.append(layer)
                expected = hessians[layer.name].float()
                assert torch.allclose(
                    moment.hessian_II, expected, rtol=1e-3, atol=1e-5 * float(expected.max())
                )
        assert sorted(layer.name for layer in seen) == sorted(layer.name for layer in loaded.layers_of(index))


def test_labels_are_drawn_from_the_model_s_own_distribution(
    tiny_llama: LoadedModel, drawn: list[Tensor], tmp_path: Path
) -> None:
    """Their mean surprise is the model's mean entropy, within four standard errors."""
    gradient_moments(tiny_llama, TOKENS_NT, 7, block_inputs(tiny_llama, tmp_path))
    with torch.no_grad():
        log_p = tiny_llama.model(TOKENS_NT).logits.log_softmax(-1)
    surprise_NT = -log_p.gather(-1, torch.cat(drawn).view(*TOKENS_NT.shape, 1)).squeeze(-1)
    excess_NT = surprise_NT + (log_p.exp() * log_p).sum(-1)
    assert abs(excess_NT.mean()) < 4 * excess_NT.std() / excess_NT.numel() ** 0.5


def test_the_worker_s_stream_has_the_hessians_and_weights_of_the_profile(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    inputs = block_inputs(loaded, tmp_path)
    _, calls = gradient_moments(loaded, TOKENS_NT, 7, inputs)
    (tmp_path / "stream").mkdir()
    layers = {layer.name: layer for layer in loaded.layers}
    for block in block_works(loaded, TOKENS_NT, tmp_path / "stream"):
        moments = input_moments(loaded, block.index, calls, inputs[block.index])
        expected = {layer.name: moment.hessian_II for moment in moments for layer in moment.layers}
        works = block.layers()
        assert {work.name for work in works} == set(expected)
        for work in works:
            hessian_II = expected[work.name]
            assert torch.allclose(work.hessian_II, hessian_II, rtol=1e-4, atol=1e-6 * float(hessian_II.max()))
            assert torch.equal(work.weight_OI, loaded.weight(layers[work.name]))


def test_layers_that_share_an_input_share_one_moment(tiny_llama: LoadedModel, tmp_path: Path) -> None:
    inputs = block_inputs(tiny_llama, tmp_path)
    gradient_moments(tiny_llama, TOKENS_NT, 7, inputs)
    moments = input_moments(tiny_llama, 0, block_calls(tiny_llama, TOKENS_NT), inputs[0])
    groups = [[layer.projection for layer in moment.layers] for moment in moments]
    assert groups == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_an_expert_counts_only_the_tokens_routed_to_it(
    model_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    loaded = load_model(find_model(str(model_directory("mixtral"))))
    inputs = block_inputs(loaded, tmp_path)
    gradient_moments(loaded, TOKENS_NT, 7, inputs)
    moments = input_moments(loaded, 0, block_calls(loaded, TOKENS_NT), inputs[0])
    counts = {moment.layers[0].projection: moment.count for moment in moments}
    routed = sum(count for name, count in counts.items() if name.endswith("down_proj"))
    assert routed == 2 * TOKENS_NT.numel()
    assert counts["q_proj"] == TOKENS_NT.numel()


def test_an_expert_that_no_token_reached_counts_its_plain_weight_error_at_its_neighbours_price(
    model_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    loaded = load_model(find_model(str(model_directory("mixtral"))))
    one_NT = torch.full((1, 1), 5)
    inputs = [BlockInputs(tmp_path / f"{i}.f32", (1, 1, 64)) for i in range(2)]
    gradients, _ = gradient_moments(loaded, one_NT, 7, inputs)
    experts = [
        moment
        for moment in input_moments(loaded, 0, block_calls(loaded, one_NT), inputs[0])
        if moment.layers[0].name.endswith("down_proj")
    ]
    idle = [moment for moment in experts if moment.count == 0]
    heard = [gradients[moment.layers[0].name] for moment in experts if moment.count]
    assert (len(idle), len(heard)) == (2, 2)
    for moment in idle:
        assert torch.equal(moment.hessian_II, torch.eye(moment.layers[0].columns))
        assert torch.allclose(gradients[moment.layers[0].name], torch.stack(heard).mean(dim=0))


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
