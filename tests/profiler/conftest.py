"""Tiny random models of every architecture on the road, with weights large enough for logits of order one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PretrainedConfig,
)

from profiler.documents.profile import Profile
from profiler.model.checkpoint import find_model
from profiler.model.layers import LoadedModel, load_model
from profiler.statistics.calibration import silent
from profiler.sweep.run import ProfileSettings, build_profile

torch.set_num_threads(1)

TINY = ProfileSettings(
    tokens=640, bits=(2, 3, 4), ranks=(0, 4), group_sizes=(64,), factor_bits=(8,), rounds=1
)
HIDDEN, CONTEXT, VOCABULARY = 64, 64, 128
CONFIGS: dict[str, PretrainedConfig] = {
    "gpt2": GPT2Config(
        n_embd=HIDDEN,
        n_layer=2,
        n_head=4,
        n_positions=CONTEXT,
        vocab_size=VOCABULARY,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.2,
    ),
    "llama": LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        vocab_size=VOCABULARY,
        bos_token_id=0,
        initializer_range=0.2,
    ),
    "opt": OPTConfig(
        hidden_size=HIDDEN,
        word_embed_proj_dim=HIDDEN,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        vocab_size=VOCABULARY,
        init_std=0.2,
    ),
    "mixtral": MixtralConfig(
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=CONTEXT,
        vocab_size=VOCABULARY,
        bos_token_id=0,
        initializer_range=0.2,
    ),
    "gpt_neo": GPTNeoConfig(
        hidden_size=HIDDEN,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=16,
        max_position_embeddings=CONTEXT,
        vocab_size=VOCABULARY,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.2,
    ),
}


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny random model, by architecture; made once."""
    made: dict[str, Path] = {}

    def directory(architecture: str) -> Path:
        if architecture not in made:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(CONFIGS[architecture], dtype=torch.float32)
            made[architecture] = tmp_path_factory.mktemp("models") / architecture
            model.save_pretrained(made[architecture])
        return made[architecture]

    return directory


@pytest.fixture
def tiny_settings() -> ProfileSettings:
    """Those of `tiny_profile`."""
    return TINY


@pytest.fixture
def tiny_llama(model_directory: Callable[[str], Path]) -> LoadedModel:
    return load_model(find_model(str(model_directory("llama"))))


@pytest.fixture(scope="session")
def tiny_profile(
    model_directory: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Profile]:
    """The profile of a tiny model over a small grid, by architecture; made once."""
    made: dict[str, Profile] = {}

    def profile(architecture: str) -> Profile:
        if architecture not in made:
            output = tmp_path_factory.mktemp("profiles") / architecture
            ref = find_model(str(model_directory(architecture)))
            made[architecture] = build_profile(ref, output, TINY, silent)
        return made[architecture]

    return profile
