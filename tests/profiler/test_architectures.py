"""Every architecture goes the whole road: profile, plan, compress, load in transformers, evaluate."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import compressor.plugin  # noqa: F401  registers the checkpoint format
from allocator.plan import Plan, PlanLayer
from allocator.storage import KEEP, KEEP_BITS, Option, layer_bytes
from api.services.usecases import compress_plan, evaluate_model, plan_budget
from compressor.lowrank.decompose import decompose
from compressor.lowrank.hessian import Curvature
from profiler.documents.profile import Profile
from profiler.execution.block_pipeline import block_works
from profiler.model.checkpoint import find_model, tensor_bytes
from profiler.model.layers import load_model
from profiler.statistics.calibration import silent

ARCHITECTURES = ("gpt2", "gpt_neo", "llama", "mixtral", "opt")
EVERY_KIND = (
    Option(3, 0, 32, 0),
    Option(0, 8, 0, 4),
    Option(2, 4, 64, 8),
    KEEP,
    Option(0, 8, 0, 16),
    Option(5, 3, 128, 4),
    Option(8, 2, 32, 16),
    Option(0, 7, 0, 8, heads=2),
)


def with_options(plan: Plan, profile: Profile, options: dict[str, Option]) -> Plan:
    """The plan with other options for some layers, its bytes counted again."""
    layers = dict(plan.layers)
    for name, option in options.items():
        record = profile.document.layers[name]
        size = layer_bytes(record.rows, record.columns, option, record.original_bytes)
        layers[name] = PlanLayer(
            **asdict(option),
            bytes=size,
            error=0.0,
            cost=0.0,
        )
    total = sum(plan.kept.values()) + sum(layer.bytes for layer in layers.values())
    return plan.model_copy(update={"layers": layers, "total_bytes": total})


@dataclass(frozen=True)
class Journey:
    """A tiny model, its profile, a plan and the checkpoint made of it."""

    source: Path
    profile: Profile
    plan: Plan
    checkpoint: Path

    @classmethod
    def take(cls, source: Path, profile: Profile, plan: Plan, folder: Path) -> Journey:
        plan.save(folder / "plan.json")
        compress_plan(folder / "plan.json", folder / "checkpoint", silent, profile.path)
        return cls(source, profile, plan, folder / "checkpoint")

    def compressed_in_memory(self, folder: Path) -> nn.Module:
        """The original with every planned layer's weight replaced by its decomposition, densely."""
        loaded = load_model(find_model(str(self.source)))
        layers = {layer.name: layer for layer in loaded.layers}
        for block in block_works(loaded, *self.profile.calibration(), folder):
            for work in block.layers():
                option = self.plan.layers[work.name].option
                if option.bits == KEEP_BITS:
                    continue
                ((_, found),) = decompose([work.weight_OI], Curvature.of(work.hessian_II), [option])
                dense_OI = found.dense()
                weight = loaded.model.get_submodule(work.name).weight
                weight.data.copy_(dense_OI.T if layers[work.name].transposed else dense_OI)
        return loaded.model


@pytest.fixture(scope="module", params=ARCHITECTURES)
def optimal(
    request: pytest.FixtureRequest,
    model_directory: Callable[[str], Path],
    tiny_profile: Callable[[str], Profile],
    tmp_path_factory: pytest.TempPathFactory,
) -> Journey:
    """The optimal plan at 3.3 bits per weight, carried out."""
    profile = tiny_profile(request.param)
    plan = plan_budget(profile, "3.3bpw")
    return Journey.take(model_directory(request.param), profile, plan, tmp_path_factory.mktemp("optimal"))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def mixed(
    request: pytest.FixtureRequest,
    model_directory: Callable[[str], Path],
    tiny_profile: Callable[[str], Profile],
    tmp_path_factory: pytest.TempPathFactory,
) -> Journey:
    """A plan in which every kind of layer occurs: quantized, with factors of every width, pure low rank, kept."""
    profile = tiny_profile(request.param)
    optimal = plan_budget(profile, "3.3bpw")
    plan = with_options(optimal, profile, dict(zip(optimal.layers, cycle(EVERY_KIND), strict=False)))
    return Journey.take(model_directory(request.param), profile, plan, tmp_path_factory.mktemp("mixed"))


def logits(model: nn.Module) -> Tensor:
    tokens_NT = torch.randint(1, 128, (3, 40), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model.eval()(tokens_NT, use_cache=False).logits.float()


def check_same_logits(journey: Journey, folder: Path) -> None:
    loaded = logits(AutoModelForCausalLM.from_pretrained(journey.checkpoint))
    original = logits(AutoModelForCausalLM.from_pretrained(journey.source))
    assert (loaded - original).abs().max() > 0.1, "compression is too mild for this test to see anything"
    assert (loaded - logits(journey.compressed_in_memory(folder))).abs().max() <= 1e-4


def test_every_matrix_of_every_block_is_planned_but_for_routers(optimal: Journey) -> None:
    loaded = load_model(find_model(str(optimal.source)))
    matrices = {
        name.removesuffix(".weight")
        for block in loaded.block_names
        for name, parameter in loaded.model.named_parameters()
        if name.startswith(f"{block}.") and parameter.dim() == 2
    }
    assert {name for name in matrices - set(optimal.plan.layers) if not name.endswith("mlp.gate")} == set()
    assert set(optimal.plan.layers) <= matrices


def test_optimal_plan_fits_its_budget_and_the_checkpoint_takes_exactly_its_bytes(optimal: Journey) -> None:
    assert optimal.plan.total_bytes <= optimal.plan.budget.bytes
    assert tensor_bytes(optimal.checkpoint) == optimal.plan.total_bytes


def test_every_kind_of_layer_takes_exactly_its_planned_bytes(mixed: Journey) -> None:
    assert tensor_bytes(mixed.checkpoint) == mixed.plan.total_bytes


def test_optimal_checkpoint_loads_to_the_logits_of_the_model_compressed_in_memory(
    optimal: Journey, tmp_path: Path
) -> None:
    check_same_logits(optimal, tmp_path)


def test_checkpoint_with_every_kind_of_layer_loads_to_the_logits_of_the_model_compressed_in_memory(
    mixed: Journey, tmp_path: Path
) -> None:
    check_same_logits(mixed, tmp_path)


def test_nothing_is_missing_or_unexpected_when_the_checkpoint_loads(mixed: Journey) -> None:
    _, report = AutoModelForCausalLM.from_pretrained(mixed.checkpoint, output_loading_info=True)
    assert {key: value for key, value in report.items() if value} == {}


def test_a_loaded_checkpoint_can_be_saved_and_loaded_again(mixed: Journey, tmp_path: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(mixed.checkpoint)
    loaded.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(loaded))


def test_evaluation_measures_a_divergence_near_the_predicted_one(optimal: Journey) -> None:
    found = evaluate_model(str(optimal.checkpoint), str(optimal.source), None, 512, silent)
    assert found.tensor_bytes == optimal.plan.total_bytes
    assert 1 / 3 < optimal.plan.predicted_kl / found.kl_nats < 3
    assert found.perplexity > found.reference_perplexity > 1


def test_model_with_every_expert_kept_still_loads_its_experts(
    model_directory: Callable[[str], Path], tiny_profile: Callable[[str], Profile], tmp_path: Path
) -> None:
    profile = tiny_profile("mixtral")
    plan = plan_budget(profile, "3.3bpw")
    plan = with_options(plan, profile, {name: KEEP for name in plan.layers})
    journey = Journey.take(model_directory("mixtral"), profile, plan, tmp_path)
    loaded, original = (
        AutoModelForCausalLM.from_pretrained(path) for path in (journey.checkpoint, journey.source)
    )
    assert (logits(loaded) - logits(original)).abs().max() <= 1e-4


LOAD_WITHOUT_PLUGIN = """
import sys
from transformers import AutoModelForCausalLM
for path in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(path)
    except RuntimeError:
        continue
    sys.exit(f"{path} was loaded")
sys.exit(42)
"""


def test_without_the_plugin_loading_fails_whichever_kind_of_layer_is_compressed(
    model_directory: Callable[[str], Path], tiny_profile: Callable[[str], Profile], tmp_path: Path
) -> None:
    """One layer, or the tables, is compressed and all others kept, so that it alone must stop the loader."""
    cases = [
        ("llama", "model.layers.0.self_attn.q_proj", Option(3, 0, 32, 0)),
        ("llama", "model.layers.1.mlp.down_proj", Option(0, 8, 0, 16)),
        ("llama", "model.layers.1.self_attn.q_proj", Option(0, 8, 0, 4)),
        ("gpt2", "transformer.h.0.attn.c_attn", Option(0, 8, 0, 16)),
        ("gpt2", "transformer.h.1.mlp.c_fc", Option(4, 2, 32, 8)),
        ("mixtral", "model.layers.0.mlp.experts.1.down_proj", Option(3, 0, 32, 0)),
        ("mixtral", "model.layers.1.mlp.experts.3.gate_up_proj", Option(0, 8, 0, 16)),
    ]
    checkpoints = []
    for index, (architecture, name, option) in enumerate(cases):
        profile = tiny_profile(architecture)
        plan = plan_budget(profile, "3.3bpw")
        plan = with_options(plan, profile, {layer: KEEP for layer in plan.layers} | {name: option})
        folder = tmp_path / str(index)
        folder.mkdir()
        journey = Journey.take(model_directory(architecture), profile, plan, folder)
        checkpoints.append(str(journey.checkpoint))
    for architecture in ("llama", "gpt_neo"):
        profile = tiny_profile(architecture)
        plan = plan_budget(profile.with_tables, "3.6bpw")
        plan = with_options(plan, profile, {layer: KEEP for layer in profile.document.layers})
        (tmp_path / architecture).mkdir()
        journey = Journey.take(model_directory(architecture), profile, plan, tmp_path / architecture)
        checkpoints.append(str(journey.checkpoint))
    command = [sys.executable, "-c", LOAD_WITHOUT_PLUGIN, *checkpoints]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 42, finished.stderr[-2000:]
