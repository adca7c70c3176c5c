"""Recovery: only scales move, towards the original, and an interrupted run ends where an undisturbed one does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from allocator.storage import Option
from api.services.usecases import execute, plan_budget
from compressor.checkpoint_writer import WorkError
from compressor.lowrank.decompose import decompose
from compressor.lowrank.hessian import Curvature
from compressor.nn.linear import CompressedLinear, layer_tensors
from profiler.documents.profile import Profile
from profiler.evaluation.divergence import live_logits, measure
from profiler.model.checkpoint import find_model
from profiler.model.layers import LoadedModel, load_model
from profiler.recovery.recovery import (
    SAVED_EVERY,
    RecoverySettings,
    TrainableLinear,
    chosen_windows,
    held_back,
    learning_rate,
    recover,
)
from profiler.statistics.calibration import silent

SHORT = RecoverySettings(steps=40, windows=2)
OPTIONS = [
    Option(3, 0, 32, 0),
    Option(2, 4, 64, 8),
    Option(0, 5, 0, 4),
    Option(4, 2, 32, 16),
    Option(8, 0, 64, 0),
    Option(0, 5, 0, 4, heads=3),
    Option(0, 5, 0, 16, heads=2),
]


@pytest.fixture(scope="module")
def profile(tiny_profile: Callable[[str], Profile]) -> Profile:
    return tiny_profile("llama")


@pytest.fixture(scope="module")
def checkpoint(profile: Profile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uniform 2 bits: much to recover."""
    output = tmp_path_factory.mktemp("recovery") / "compressed"
    execute(plan_budget(profile, None, "uniform:2"), profile, output, silent)
    return output


@pytest.fixture(scope="module")
def original(profile: Profile) -> LoadedModel:
    return load_model(find_model(profile.document.model.id))


def recovered(
    profile: Profile,
    original: LoadedModel,
    source: Path,
    output: Path,
    settings: RecoverySettings = SHORT,
    progress: Callable[[str, int, int], None] = silent,
) -> dict[str, bytes]:
    """Recover on the calibration windows; the files written."""

    @torch.no_grad()
    def logits(window_NT: Tensor) -> Tensor:
        return original.model(window_NT, use_cache=False).logits

    student = load_model(find_model(str(source))).model
    tokens_NT = profile.calibration_tokens()
    recover(student, logits, tokens_NT, 0, source, output, settings, progress, "the request")
    return {file.name: file.read_bytes() for file in output.iterdir()}


def tensors(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def layer_of(option: Option, bias: bool = True) -> CompressedLinear:
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(24, 70, generator=generator)
    ((_, made),) = decompose([weight_OI], Curvature.of(torch.eye(70)), [option])
    layer = CompressedLinear(24, 70, option, bias=bias)
    layer.load_state_dict(layer_tensors(made), strict=False)
    if bias:
        layer.bias.data = torch.randn(24, generator=generator)
    return layer


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_an_untrained_layer_computes_what_the_compressed_one_does(option: Option, bias: bool) -> None:
    layer = layer_of(option, bias)
    x = torch.randn(5, 70, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(TrainableLinear(layer)(x), layer(x), atol=1e-4)


@pytest.mark.parametrize("option", OPTIONS)
def test_an_untrained_layer_stores_what_it_was_made_of(option: Option) -> None:
    layer = layer_of(option)
    for name, tensor in TrainableLinear(layer).stored().items():
        assert torch.equal(tensor, getattr(layer, name))
        assert tensor.dtype == torch.bfloat16


@pytest.mark.parametrize("option", OPTIONS)
def test_every_scale_and_bfloat16_factor_is_trained_and_nothing_else(option: Option) -> None:
    layer = TrainableLinear(layer_of(option).requires_grad_(False))
    layer(torch.ones(1, 70)).square().sum().backward()
    trained = {name for name, p in layer.named_parameters() if p.grad is not None and p.grad.any()}
    matrices = (option.bits > 0) + 2 * (option.rank > 0)
    assert len(trained) == matrices
    assert all("delta" in name for name in trained)


def test_recovery_brings_the_model_nearer_and_changes_scales_alone(
    profile: Profile, original: LoadedModel, checkpoint: Path, tmp_path: Path
) -> None:
    recovered(profile, original, checkpoint, tmp_path / "out")
    tokens_NT = profile.calibration_tokens()
    kl = [
        measure(load_model(find_model(str(folder))).model, live_logits(original), tokens_NT).kl_nats
        for folder in (checkpoint, tmp_path / "out")
    ]
    assert kl[1] < 0.9 * kl[0]
    before, after = tensors(checkpoint), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.endswith("_scale") for name in changed)
    assert all(before[name].dtype == after[name].dtype for name in changed)


def test_training_that_does_not_help_leaves_the_checkpoint_as_it_was(
    profile: Profile, original: LoadedModel, checkpoint: Path, tmp_path: Path
) -> None:
    recovered(profile, original, checkpoint, tmp_path / "out", replace(SHORT, learning_rate=100.0))
    before, after = tensors(checkpoint), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(("windows", "trained"), [(1, 1), (2, 1), (15, 14), (32, 30)])
def test_the_last_windows_are_held_back(windows: int, trained: int) -> None:
    tokens_NT = torch.arange(windows)[:, None]
    train_NT, held_NT = held_back(tokens_NT)
    assert train_NT.flatten().tolist() == list(range(trained))
    assert held_NT.flatten().tolist() == list(range(trained, windows)) or windows == 1


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(
    profile: Profile, original: LoadedModel, checkpoint: Path, tmp_path: Path
) -> None:
    settings = replace(SHORT, steps=6)
    made = [
        recovered(profile, original, checkpoint, tmp_path / str(index), replace(settings, seed=seed))
        for index, seed in enumerate((0, 0, 1))
    ]
    assert made[0] == made[1]
    assert made[0] != made[2]


def interrupting(after: int) -> Callable[[str, int, int], None]:
    def progress(stage: str, done: int, total: int) -> None:
        if done == after:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("after", [3, SAVED_EVERY, SAVED_EVERY + 4])
def test_an_interrupted_recovery_resumes_to_the_same_bytes(
    profile: Profile, original: LoadedModel, checkpoint: Path, tmp_path: Path, after: int
) -> None:
    undisturbed = recovered(profile, original, checkpoint, tmp_path / "undisturbed")
    with pytest.raises(KeyboardInterrupt):
        recovered(profile, original, checkpoint, tmp_path / "out", progress=interrupting(after))
    assert not (tmp_path / "out").exists()
    steps: list[int] = []
    resumed = recovered(
        profile, original, checkpoint, tmp_path / "out", progress=lambda _, done, total: steps.append(done)
    )
    assert resumed == undisturbed
    assert steps[0] == (SAVED_EVERY if after >= SAVED_EVERY else 0) + 1


def test_the_state_of_other_settings_is_not_resumed(
    profile: Profile, original: LoadedModel, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        recovered(profile, original, checkpoint, tmp_path / "out", progress=interrupting(SAVED_EVERY + 1))
    settings, steps = replace(SHORT, steps=SAVED_EVERY + 2), list[int]()
    recovered(
        profile, original, checkpoint, tmp_path / "out", settings, lambda _, done, total: steps.append(done)
    )
    assert steps[0] == 1


def test_an_output_in_use_is_refused_before_anything_is_trained(
    profile: Profile, original: LoadedModel, checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WorkError, match="already exists and is not empty"):
        recovered(profile, original, checkpoint, tmp_path, progress=interrupting(1))


def test_every_epoch_takes_every_window_once_in_an_order_of_its_own() -> None:
    settings = RecoverySettings(windows=3)

    def epoch(number: int) -> Iterator[int]:
        for step in range(4 * number, 4 * number + 4):
            yield from chosen_windows(step, 12, settings).tolist()

    orders = [list(epoch(number)) for number in range(3)]
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert orders[0] != orders[1] != orders[2]


def test_few_windows_are_all_taken_every_step() -> None:
    assert sorted(chosen_windows(7, 2, RecoverySettings(windows=4)).tolist()) == [0, 1]


def test_the_learning_rate_warms_up_and_ends_near_nothing() -> None:
    settings = RecoverySettings(steps=200, learning_rate=1.0)
    rates = [learning_rate(step, settings) for step in range(200)]
    assert rates[0] == pytest.approx(0.1, rel=0.01)
    assert max(rates) == pytest.approx(1.0, rel=0.01)
    assert rates[-1] < 1e-3
