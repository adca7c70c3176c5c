"""Every architecture goes the whole road: profile, plan, compress, load in transformers, evaluate."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS
from torch import Tensor
from transformers import AutoModelForCausalLM

import compressor.plugin  # noqa: F401  registers the checkpoint format
from allocator.plan import Plan
from allocator.storage import KEEP_BITS
from api.usecases import compress_plan, evaluate_model, plan_budget, profile_model
from compressor.decompose import Curvature, decompose
from profiler.calibration import silent
from profiler.checkpoint import find_model, tensor_bytes
from profiler.layers import load_model
from profiler.profile import Profile, ProfileSettings
from profiler.stream import block_works

SETTINGS = ProfileSettings(tokens=640, bits=(2, 3, 4), ranks=(0, 4), group_sizes=(32,), factor_bits=(8,), rounds=1)


class Journey:
    """One tiny model taken down the road at 3.3 bits per weight."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.source, self.checkpoint = source, folder / "checkpoint"
        self.profile: Profile = profile_model(str(source), folder / "profile", SETTINGS, silent)
        plan_budget(self.profile, "3.3bpw").save(folder / "plan.json")
        self.plan: Plan = compress_plan(folder / "plan.json", self.checkpoint, silent, folder / "profile")

    def compressed_in_memory(self, folder: Path) -> torch.nn.Module:
        """The original with every planned layer's weight replaced by its decomposition, densely."""
        loaded = load_model(find_model(str(self.source)))
        for block in block_works(loaded, self.profile.calibration_tokens(), folder):
            works = block.layers()
            for work in works:
                planned = self.plan.layers[work.name]
                if planned.bits == KEEP_BITS:
                    continue
                curvature = Curvature.of(work.hessian_II)
                ((_, found),) = decompose([work.weight_OI], curvature, [planned.option])
                layer = next(layer for layer in loaded.layers if layer.name == work.name)
                dense_OI = found.dense()
                weight = loaded.model.get_submodule(work.name).weight
                weight.data.copy_(dense_OI.T if layer.transposed else dense_OI)
        return loaded.model


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def journey(
    request: pytest.FixtureRequest, model_directory: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Journey:
    return Journey(model_directory(request.param), tmp_path_factory.mktemp(request.param))


def logits(model: torch.nn.Module) -> Tensor:
    tokens_NT = torch.randint(1, 128, (3, 40), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(tokens_NT, use_cache=False).logits.float()


def test_checkpoint_takes_exactly_the_bytes_of_the_plan(journey: Journey) -> None:
    assert tensor_bytes(journey.checkpoint) == journey.plan.total_bytes
    assert journey.plan.total_bytes <= journey.plan.budget.bytes


def test_plan_covers_every_matrix_of_every_block(journey: Journey) -> None:
    original = AutoModelForCausalLM.from_pretrained(journey.source)
    matrices = sum(p.numel() for n, p in original.named_parameters() if p.dim() > 1 and n.split(".")[-2].isdigit() is False)
    assert matrices > 0
    assert {layer.bits for layer in journey.plan.layers.values()} <= {2, 3, 4, 16}


def test_loaded_checkpoint_gives_the_logits_of_the_model_compressed_in_memory(journey: Journey, tmp_path: Path) -> None:
    loaded = logits(AutoModelForCausalLM.from_pretrained(journey.checkpoint))
    in_memory = logits(journey.compressed_in_memory(tmp_path))
    original = logits(AutoModelForCausalLM.from_pretrained(journey.source))
    print("max diff", (loaded - in_memory).abs().max(), "effect", (loaded - original).abs().max(), original.std())
    assert (loaded - original).abs().max() > 0.1
    assert (loaded - in_memory).abs().max() <= 1e-4


def test_evaluation_of_the_checkpoint_is_finite_and_below_the_original_s_entropy(journey: Journey) -> None:
    found = evaluate_model(str(journey.checkpoint), str(journey.source), None, 256, silent)
    print(found, journey.plan.predicted_kl)
    assert 0 < found.kl_nats < 5
    assert found.tensor_bytes == journey.plan.total_bytes
