"""Massive activations: a first token that is huge and hardly matters, as most language models have one.

<bos> has an embedding a thousand times as long as the others', and gives every down_proj an input far above all
others' (Sun et al., arXiv 2402.17762). What comes of it is lost in its own norm, and nobody reads it: heads that find
nothing look at <bos> and take nothing from there (attention sinks, Xiao et al., arXiv 2309.17453).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from allocator.plan import Plan
from api.services.usecases import plan_budget
from profiler.documents.profile import Profile
from profiler.evaluation.plan_evaluation import measure_trials
from profiler.model.checkpoint import ModelRef, find_model
from profiler.model.layers import LoadedModel, open_model
from profiler.prediction.calibration_factor import Gain
from profiler.statistics.calibration import silent
from profiler.statistics.moments import BlockInputs, InputMoment, TokenWeights, input_moments, weigh_tokens
from profiler.sweep.run import ProfileSettings, build_profile
from profiler.sweep.sweep import RowPrice, sweep_layer

HIDDEN, HEADS, KEY_HEADS, HEAD, BLOCKS, WINDOW = 64, 4, 2, 16, 4, 64
ALIKE, MASSIVE = 0, 1
"""Coordinates of hidden states: one is the same for every token of text, one is there for <bos> alone."""
SLOWEST = 7
"""The pair of a head's coordinates that positions turn least."""
SETTINGS = ProfileSettings(tokens=40 * WINDOW, bits=(2, 3, 4, 6, 8), ranks=(0,), group_sizes=(64,), rounds=1)


def with_massive_activations(folder: Path) -> ModelRef:
    """A random Llama, edited; the same to the bit wherever it is made."""
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=192,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        max_position_embeddings=WINDOW,
        vocab_size=128,
        bos_token_id=0,
        eos_token_id=None,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        edit_tables(model)
        for block in model.model.layers:
            edit_attention(block.self_attn)
            edit_mlp(block.mlp)
    model.save_pretrained(folder)
    return find_model(str(folder))


def edit_tables(model: nn.Module) -> None:
    """<bos> is long in its own direction, and is never drawn; no logit reads the two coordinates otherwise."""
    embedding_Vd, head_Vd = model.model.embed_tokens.weight, model.lm_head.weight
    embedding_Vd.normal_(generator=torch.Generator().manual_seed(1))
    embedding_Vd[:, ALIKE], embedding_Vd[:, MASSIVE] = 1, 0
    embedding_Vd[0] = 0
    embedding_Vd[0, MASSIVE] = 10_000
    head_Vd[:, [ALIKE, MASSIVE]] = 0
    head_Vd[0, ALIKE] = -30


def edit_attention(attention: nn.Module) -> None:
    """Every query looks at <bos>, whose value is nothing; the two coordinates are read for that, and not written."""
    attention.q_proj.weight *= 0.7
    attention.k_proj.weight *= 0.7
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        projection.weight[:, [ALIKE, MASSIVE]] = 0
    for head in range(HEADS):
        attention.q_proj.weight[head * HEAD + SLOWEST, ALIKE] = 3
    for head in range(KEY_HEADS):
        attention.k_proj.weight[head * HEAD + SLOWEST, MASSIVE] = 1
    attention.o_proj.weight *= 0.6
    attention.o_proj.weight[[ALIKE, MASSIVE]] = 0


def edit_mlp(mlp: nn.Module) -> None:
    """One channel is 10,000 for <bos> and nothing for text; the others are nothing for <bos>."""
    for projection in (mlp.gate_proj, mlp.up_proj):
        projection.weight[:, [ALIKE, MASSIVE]] = 0
        projection.weight[0] = 0
        projection.weight[0, MASSIVE] = 10_000**0.5 / HIDDEN**0.5
    mlp.down_proj.weight *= 0.1
    mlp.down_proj.weight[[ALIKE, MASSIVE]] = 0


@dataclass(frozen=True)
class Subject:
    """The model, its profile, and what its layers' inputs and gradients are on the profile's windows."""

    loaded: LoadedModel
    profile: Profile
    weights: TokenWeights
    folder: Path

    @property
    def tokens(self) -> Tensor:
        return self.profile.calibration_tokens()

    def names(self, projection: str) -> list[str]:
        return [layer.name for layer in self.loaded.layers if layer.projection.endswith(projection)]

    def measured(self, plans: list[Plan], weights: TokenWeights | None, folder: Path) -> list[float]:
        """KL of each on the windows held back, its layers compressed under these weights."""
        folder.mkdir()
        trials = [{name: layer.option for name, layer in plan.layers.items()} for plan in plans]
        windows_NT = self.profile.probe_tokens()
        found = measure_trials(self.loaded, (self.tokens, weights), windows_NT, trials, folder, silent)
        return [float(kl) for kl in found[:, :, 0].mean(dim=1)]


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = tmp_path_factory.mktemp("massive")
    ref = with_massive_activations(folder / "model")
    profile = build_profile(ref, folder / "profile", SETTINGS, silent)
    weights = profile.token_weights()
    assert weights is not None
    return Subject(open_model(ref), profile, weights, folder)


def moments_of(
    loaded: LoadedModel, tokens_NT: Tensor, folder: Path, even: bool
) -> tuple[TokenWeights, list[InputMoment]]:
    folder.mkdir()
    shape = (*tokens_NT.shape, HIDDEN)
    inputs = [BlockInputs(folder / f"{index}.f32", shape) for index in range(BLOCKS)]
    weights, calls = weigh_tokens(loaded, tokens_NT, SETTINGS.seed, inputs)
    used = None if even else weights
    return weights, [
        m for index in range(BLOCKS) for m in input_moments(loaded, index, calls, inputs[index], used)
    ]


@pytest.fixture(scope="module")
def apart(subject: Subject) -> Profile:
    """The same profile, priced by the moments apart: ½·mean(diag G)·tr(ΔW H ΔWᵀ), every token alike in H."""
    document, measurements, layers = subject.profile.document, {}, {}
    _, moments = moments_of(subject.loaded, subject.tokens, subject.folder / "even", even=True)
    for moment in moments:
        name = moment.layer.name
        price = RowPrice(subject.weights.mean(name), torch.ones(moment.layer.rows))
        sweep = sweep_layer(subject.loaded, moment, price, document.grid, lambda *_: None, SETTINGS.rounds)
        measurements[name] = sweep.measurements
        layers[name] = document.layers[name].model_copy(
            update={"signal": sweep.signal, "sensitivity": sweep.sensitivity, "correction": 1.0}
        )
    document = document.model_copy(update={"layers": layers, "gain": Gain(1.0, 0.5, 2.0)})
    return replace(subject.profile, document=document, measurements=measurements)


# The model is what it is made to be


def inputs_of(subject: Subject, names: list[str]) -> dict[str, Tensor]:
    """‖x‖ (N, T) of these modules' inputs on the profile's windows."""
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...], keywords: dict[str, Tensor]) -> None:
            x = arguments[0] if arguments else keywords["hidden_states"]
            found[name] = torch.linalg.vector_norm(x, dim=-1)

        return hook

    handles = [
        subject.loaded.model.get_submodule(name).register_forward_pre_hook(watch(name), with_kwargs=True)
        for name in names
    ]
    with torch.no_grad():
        subject.loaded.model(subject.tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def test_bos_is_hundreds_of_times_as_long_as_any_token_of_text(subject: Subject) -> None:
    """On average, before every block and before every down_proj."""
    assert (subject.tokens[:, 0] == 0).all() and (subject.tokens[:, 1:] != 0).all()
    names = [*subject.loaded.block_names, *subject.names("down_proj")]
    for name, norm_NT in inputs_of(subject, names).items():
        assert norm_NT[:, 0].min() > 300 * norm_NT[:, 1:].mean(), name


def test_bos_has_almost_no_gradient_where_it_is_massive(subject: Subject) -> None:
    for name in subject.names("down_proj"):
        weight_NT = subject.weights.by_layer[name].weight_m.view(subject.tokens.shape)
        assert weight_NT[:, 0].mean() < 1e-4 * weight_NT[:, 1:].mean(), name


def test_heads_look_at_bos_more_than_at_all_else(subject: Subject) -> None:
    loaded = subject.loaded
    loaded.model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = loaded.model(subject.tokens[:4], use_cache=False, output_attentions=True).attentions
    loaded.model.set_attn_implementation("sdpa")
    assert len(attentions) == BLOCKS
    assert torch.stack(attentions)[..., 1:, 0].mean() > 0.5


# Prices and plans


def test_the_means_apart_price_what_bos_excites_a_hundred_times_too_high(
    subject: Subject, apart: Profile
) -> None:
    """Together they price every class of matrices and every block, measured alone at 3 bits, within a half."""
    check = subject.profile.document.check
    assert check is not None
    assert len(check.parts) == 7 + BLOCKS
    for part in check.parts:
        assert 2 / 3 < part.predicted_kl / part.measured_kl < 3 / 2, part
    for name in subject.names("down_proj"):
        together, wrong = (p.document.layers[name].sensitivity for p in (subject.profile, apart))
        assert wrong > 100 * together, name


@pytest.mark.parametrize("bits", [3, 4])
def test_the_means_apart_plan_worse_than_uniform_and_the_profile_better(
    subject: Subject, apart: Profile, tmp_path: Path, bits: int
) -> None:
    """At the bytes of a uniform width; each compressed under the Hessians that it was planned with, beside uniform."""
    uniform = plan_budget(subject.profile, None, f"uniform:{bits}")
    budget = f"{uniform.total_bytes}B"
    found, misled = plan_budget(subject.profile, budget), plan_budget(apart, budget)
    assert max(found.total_bytes, misled.total_bytes) <= uniform.total_bytes
    down = subject.names("down_proj")
    bought = [sum(plan.layers[name].bits for name in down) for plan in (misled, found)]
    assert bought[0] > 1.3 * bought[1]
    even_kl, misled_kl = subject.measured([uniform, misled], None, tmp_path / "even")
    uniform_kl, found_kl = subject.measured([uniform, found], subject.weights, tmp_path / "weighted")
    assert misled_kl > 1.3 * even_kl
    assert found_kl < 0.75 * uniform_kl
    assert found_kl < 0.4 * misled_kl


def test_the_profile_knows_that_its_plans_are_better_and_by_how_much(subject: Subject) -> None:
    profile = subject.profile
    assert profile.document.check is not None
    assert [plan.verdict for plan in profile.document.check.plans] == ["better"] * 3
    assert 2 / 3 < profile.document.gain.mean < 3 / 2
    assert profile.warnings == ()


# Windows with and without <bos>


def test_statistics_of_windows_without_bos_are_those_of_another_model(
    subject: Subject, tmp_path: Path
) -> None:
    """Heads that have nothing to look at take what there is: what they hand on is more than twice as much."""
    with_bos = {
        m.layer.name: m for m in moments_of(subject.loaded, subject.tokens, tmp_path / "with", False)[1]
    }
    text = replace(subject.loaded, text_start=())
    without = {
        m.layer.name: m for m in moments_of(text, subject.tokens[:, 1:], tmp_path / "without", False)[1]
    }
    for name in subject.names("o_proj"):
        hessian_II, other_II = with_bos[name].hessian_II, without[name].hessian_II
        assert other_II.trace() > 2 * hessian_II.trace(), name


def test_the_profile_takes_its_windows_with_bos(subject: Subject, tmp_path: Path) -> None:
    """Its Hessians are those of windows that start with it, for the statistics and for what is compressed."""
    assert subject.loaded.text_start == (0,)
    weights, _ = moments_of(subject.loaded, subject.tokens, tmp_path / "again", False)
    assert weights.serialized() == subject.weights.serialized()


def test_the_same_plan_costs_otherwise_without_bos(subject: Subject, tmp_path: Path) -> None:
    plan = plan_budget(subject.profile, None, "uniform:3")
    trial = {name: layer.option for name, layer in plan.layers.items()}
    windows_NT = subject.profile.probe_tokens()
    calibration = subject.tokens, subject.weights
    kls = []
    for loaded, tokens_NT in (
        (subject.loaded, windows_NT),
        (replace(subject.loaded, text_start=()), windows_NT[:, 1:]),
    ):
        (folder := tmp_path / str(tokens_NT.shape[1])).mkdir()
        found = measure_trials(loaded, calibration, tokens_NT, [trial], folder, silent)
        kls.append(found[0, :, 0].mean().item())
    assert kls[1] > 1.1 * kls[0]
