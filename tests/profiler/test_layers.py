"""Finding layers: which matrices of which architecture, under which names, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM

from compressor.nn.experts import UnsupportedExpertsError
from profiler.model.checkpoint import ModelError, find_model
from profiler.model.layers import LoadedModel, find_blocks, find_layers, load_model

ATTENTION_AND_MLP = {
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "gpt_neo": {"q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj"},
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "mixtral": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"},
    "opt": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
}


def load(model_directory: Callable[[str], Path], architecture: str) -> LoadedModel:
    return load_model(find_model(str(model_directory(architecture))))


@pytest.mark.parametrize("architecture", sorted(ATTENTION_AND_MLP))
def test_every_projection_of_every_block_is_a_layer(
    model_directory: Callable[[str], Path], architecture: str
) -> None:
    loaded = load(model_directory, architecture)
    assert len(loaded.block_names) == 2
    for block in range(2):
        found = {layer.name.rsplit(".", 1)[1] for layer in loaded.layers_of(block)}
        assert found == ATTENTION_AND_MLP[architecture]


@pytest.mark.parametrize("architecture", sorted(ATTENTION_AND_MLP))
def test_a_layer_s_weight_is_the_matrix_of_its_output(
    model_directory: Callable[[str], Path], architecture: str
) -> None:
    """W (rows, columns) in y = Wx + b, whichever way the module stores it."""
    loaded = load(model_directory, architecture)
    for layer in loaded.layers:
        module = loaded.model.get_submodule(layer.name)
        x_I = torch.randn(1, layer.columns, generator=torch.Generator().manual_seed(0))
        bias = 0 if module.bias is None else module.bias
        assert loaded.weight(layer).shape == (layer.rows, layer.columns)
        assert torch.allclose(module(x_I), x_I @ loaded.weight(layer).T + bias, atol=1e-4)


@pytest.mark.parametrize("architecture", sorted(ATTENTION_AND_MLP))
def test_layers_and_kept_tensors_are_every_parameter_once(
    model_directory: Callable[[str], Path], architecture: str
) -> None:
    loaded = load(model_directory, architecture)
    layers = sum(layer.weights for layer in loaded.layers)
    kept = sum(tensor.numel() for _, tensor in loaded.kept_tensors())
    assert layers + kept == sum(parameter.numel() for parameter in loaded.model.parameters())


def test_tied_embeddings_are_kept_once(model_directory: Callable[[str], Path]) -> None:
    names = [name for name, _ in load(model_directory, "gpt2").kept_tensors()]
    assert "transformer.wte.weight" in names
    assert "lm_head.weight" not in names


def test_a_window_is_no_longer_than_the_model_s_context(tiny_llama: LoadedModel) -> None:
    assert tiny_llama.window == 64


def test_a_stack_of_experts_that_cannot_be_taken_apart_is_refused_by_name(tmp_path: Path) -> None:
    config = GptOssConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        vocab_size=32,
        layer_types=["full_attention"],
    )
    GptOssForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedExpertsError, match=r"model\.layers\.0\.mlp\.experts"):
        load_model(find_model(str(tmp_path)))


def test_a_parameter_of_three_dimensions_is_refused_by_name() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrices = nn.Parameter(torch.zeros(2, 3, 4))

    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), Stack())])
    with pytest.raises(
        ModelError, match=r"blocks\.0\.1\.matrices is a stack of matrices of shape \(2, 3, 4\)"
    ):
        find_layers(model, find_blocks(model))


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ModelError, match="no list of transformer blocks in Linear"):
        find_blocks(nn.Linear(2, 2))
