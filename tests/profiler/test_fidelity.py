"""Fidelity: every block measured on its own, on models of several architectures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from allocator.plan import PlanModel
from profiler.evaluation.divergence import live_logits, measure
from profiler.model.checkpoint import ModelError, find_model
from profiler.model.layers import LoadedModel, load_model, open_model
from profiler.model.weight_patching import Continuation, Weights, substituted
from profiler.statistics.calibration import CalibrationError, sample_tokens
from profiler.studies.fidelity import compressed_blocks, fidelity_document, measure_blocks

MODEL = PlanModel(id="tiny", revision=None, weights_sha256="0" * 64)
TOKENS_NT = torch.randint(1, 128, (4, 64), generator=torch.Generator().manual_seed(0))
ARCHITECTURES = ("llama", "gpt2", "gpt_neo", "opt", "mixtral")


def original_weights(loaded: LoadedModel) -> list[Weights]:
    blocks = range(len(loaded.block_names))
    return [{layer: loaded.weight(layer) for layer in loaded.layers_of(index)} for index in blocks]


def opened(directory: Path) -> LoadedModel:
    return open_model(find_model(str(directory)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_block_that_is_not_compressed_loses_nothing(
    model_directory: Callable[[str], Path], tmp_path: Path, architecture: str
) -> None:
    loaded = opened(model_directory(architecture))
    found = measure_blocks(loaded, TOKENS_NT, original_weights(loaded), tmp_path)
    assert found["probe_kl"].shape == (4, 2)
    assert np.abs(found["probe_kl"]).max() < 1e-6
    assert found["collision_margin"].max() < 1e-5
    assert (found["block_influence"] > 0).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_probe_kl_is_the_kl_of_the_whole_model_with_one_block_replaced(
    model_directory: Callable[[str], Path], tmp_path: Path, architecture: str
) -> None:
    loaded, original = (
        opened(model_directory(architecture)),
        load_model(find_model(str(model_directory(architecture)))),
    )
    blocks = list(compressed_blocks(loaded, TOKENS_NT, None, tmp_path))
    found = measure_blocks(loaded, TOKENS_NT, blocks, tmp_path)
    for index, weights in enumerate(blocks):
        with substituted(loaded, weights):
            expected = measure(loaded.model, live_logits(original), TOKENS_NT).kl_nats
        assert expected > 1e-4
        assert found["probe_kl"][:, index].mean() == pytest.approx(expected, rel=1e-3)


def test_an_identity_block_has_no_influence_and_nothing_to_lose(
    model_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    model = load_model(find_model(str(model_directory("llama"))))
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        model.model.get_submodule(f"model.layers.1.{name}").weight.zero_()
    model.model.save_pretrained(tmp_path / "model")
    loaded = opened(tmp_path / "model")
    found = measure_blocks(loaded, TOKENS_NT, compressed_blocks(loaded, TOKENS_NT, None, tmp_path), tmp_path)
    assert found["block_influence"][:, 1].tolist() == pytest.approx([0] * 4, abs=1e-9)
    assert found["probe_kl"][:, 1].tolist() == pytest.approx([0] * 4, abs=1e-6)
    assert found["probe_kl"][:, 0].min() > 1e-4


def test_the_document_has_every_block_with_intervals_and_tests(
    model_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    loaded = opened(model_directory("llama"))
    found = measure_blocks(loaded, TOKENS_NT, compressed_blocks(loaded, TOKENS_NT, None, tmp_path), tmp_path)
    document = fidelity_document(MODEL, found, "text", "text", 64)
    assert [block.block for block in document.blocks] == [0, 1]
    for block in document.blocks:
        assert block.tier in ("critical", "high", "low")
        for value in (
            block.probe_kl,
            block.block_influence,
            block.collision_margin,
            block.embedding_recovery,
        ):
            assert value is not None
            assert 0 <= value.low <= value.mean <= value.high
    assert {shape.metric for shape in document.shapes} == set(found)
    assert all(shape.verdict == "undecided" for shape in document.shapes)


def test_the_same_windows_give_the_same_document(
    model_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    def document() -> object:
        loaded = opened(model_directory("llama"))
        blocks = compressed_blocks(loaded, TOKENS_NT, None, tmp_path)
        return fidelity_document(MODEL, measure_blocks(loaded, TOKENS_NT, blocks, tmp_path), "a", "b", 64)

    assert document() == document()


def test_a_model_whose_width_is_not_its_embedding_s_lacks_the_recovery(tmp_path: Path) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=64,
        word_embed_proj_dim=32,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        vocab_size=128,
        init_std=0.2,
    )
    OPTForCausalLM(config).save_pretrained(tmp_path / "model")
    loaded = opened(tmp_path / "model")
    found = measure_blocks(loaded, TOKENS_NT, original_weights(loaded), tmp_path)
    assert "embedding_recovery" not in found
    document = fidelity_document(MODEL, found, "text", "text", 64)
    assert document.blocks[0].embedding_recovery is None


# Entering a model at a depth


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_entered_at_a_depth_goes_on_as_it_would_have(
    model_directory: Callable[[str], Path], architecture: str, whole: bool
) -> None:
    ref = find_model(str(model_directory(architecture)))
    loaded = load_model(ref) if whole else open_model(ref)
    seen: list[Tensor] = []
    handle = loaded.blocks[0].register_forward_hook(
        lambda *call: seen.append(call[-1][0] if isinstance(call[-1], tuple) else call[-1])
    )
    with torch.no_grad():
        expected = loaded.model(TOKENS_NT).logits
    handle.remove()
    found = Continuation.of(loaded).logits(1, seen[0], TOKENS_NT)
    assert torch.equal(found, expected)
    with torch.no_grad():
        assert torch.equal(loaded.model(TOKENS_NT).logits, expected)


@pytest.mark.parametrize("whole", [True, False])
def test_substituted_weights_go_when_the_block_ends(
    model_directory: Callable[[str], Path], whole: bool
) -> None:
    ref = find_model(str(model_directory("gpt2")))
    loaded = load_model(ref) if whole else open_model(ref)
    layer = loaded.layers[0]
    with torch.no_grad():
        before = loaded.model(TOKENS_NT).logits
        with substituted(loaded, {layer: torch.zeros(layer.rows, layer.columns)}):
            assert not torch.equal(loaded.model(TOKENS_NT).logits, before)
        assert torch.equal(loaded.model(TOKENS_NT).logits, before)


# Bad input


def overflowing(directory: Path, target: Path) -> Path:
    """The model with a head so large that logits overflow, though every weight is finite."""
    model = load_model(find_model(str(directory)))
    model.model.lm_head.weight.fill_(3e38)
    model.model.save_pretrained(target)
    return target


def test_logits_that_overflow_are_refused_by_the_model_s_name(
    model_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    loaded = opened(overflowing(model_directory("llama"), tmp_path / "hot"))
    with pytest.raises(ModelError, match="logits of .*hot are NaN or infinite in float32"):
        measure_blocks(loaded, TOKENS_NT, original_weights(loaded), tmp_path)
    with pytest.raises(ModelError, match="hot are NaN or infinite"):
        sample_tokens(loaded, 128, 0)


def test_one_token_repeated_is_refused(tiny_llama: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="one token repeated 256 times"):
        measure_blocks(tiny_llama, torch.full((4, 64), 7), original_weights(tiny_llama), tmp_path)


def test_one_window_is_refused(tiny_llama: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="one window of 64 tokens"):
        measure_blocks(tiny_llama, TOKENS_NT[:1], original_weights(tiny_llama), tmp_path)
