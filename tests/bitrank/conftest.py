"""A profile and a checkpoint of the tiny Llama, made through the Python interface once for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import bitrank

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        vocab_size=128,
        bos_token_id=0,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("door") / "model"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def made(tiny_model: Path) -> bitrank.Profile:
    settings = {"tokens": 640, "bits": (2, 3, 4), "ranks": (0, 4), "group_sizes": (64,), "rounds": 1}
    return bitrank.profile(str(tiny_model), tiny_model.parent / "profile", **settings)


@pytest.fixture(scope="session")
def small(made: bitrank.Profile) -> Path:
    return bitrank.compress(made.plan("3.25bpw"), made.path.parent / "small", profile=made)
