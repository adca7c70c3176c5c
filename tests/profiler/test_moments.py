"""Moments: what tokens weigh and every layer's H, as one plain backward pass through the whole model gives them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from api.services.usecases import plan_budget
from profiler.execution.block_pipeline import block_works
from profiler.model.checkpoint import ModelError, find_model
from profiler.model.layers import Layer, LoadedModel, load_model, open_model
from profiler.statistics.calibration import silent
from profiler.statistics.moments import (
    BlockInputs,
    InputMoment,
    TokenWeight,
    TokenWeights,
    block_calls,
    gradient_means,
    input_moments,
    weigh_tokens,
)
from profiler.sweep.run import ProfileSettings, build_profile

ARCHITECTURES = ("gpt2", "gpt_neo", "llama", "mixtral", "opt")
TOKENS_NT = torch.randint(1, 128, (6, 24), generator=torch.Generator().manual_seed(3))
"""Six windows: a full batch of four and a short one."""
SEED = 7
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def loaded(request: pytest.FixtureRequest, model_directory: Callable[[str], Path]) -> LoadedModel:
    return load_model(find_model(str(model_directory(request.param))))


@pytest.fixture
def mixtral(model_directory: Callable[[str], Path]) -> LoadedModel:
    return load_model(find_model(str(model_directory("mixtral"))))


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


def block_inputs(loaded: LoadedModel, folder: Path, tokens_NT: Tensor = TOKENS_NT) -> list[BlockInputs]:
    count = len(loaded.block_names)
    return [BlockInputs(folder / f"{index}.f32", (*tokens_NT.shape, 64)) for index in range(count)]


def all_moments(
    loaded: LoadedModel,
    inputs: list[BlockInputs],
    weights: TokenWeights | None,
    tokens_NT: Tensor = TOKENS_NT,
) -> dict[str, InputMoment]:
    calls = block_calls(loaded, tokens_NT)
    return {
        moment.layer.name: moment
        for index in range(len(loaded.block_names))
        for moment in input_moments(loaded, index, calls, inputs[index], weights)
    }


def weighed(
    loaded: LoadedModel, folder: Path, tokens_NT: Tensor = TOKENS_NT
) -> tuple[TokenWeights, dict[str, InputMoment]]:
    inputs = block_inputs(loaded, folder, tokens_NT)
    weights, _ = weigh_tokens(loaded, tokens_NT, SEED, inputs)
    return weights, all_moments(loaded, inputs, weights, tokens_NT)


@dataclass(frozen=True)
class Seen:
    """What one layer saw: x (m, I) and g (m, O) of every row, in float64."""

    x_mI: Tensor
    g_mO: Tensor

    @property
    def weight_m(self) -> Tensor:
        return self.g_mO.square().mean(dim=1)

    def hessian(self, power: float = 1.0) -> Tensor:
        """Σ w x xᵀ / Σ w (I, I), of the weights to this power."""
        weight_m = self.weight_m**power
        return (self.x_mI * weight_m[:, None]).T @ self.x_mI / weight_m.sum()


def is_expert(name: str) -> bool:
    return ".experts." in name


def seen_directly(loaded: LoadedModel, label_NT: Tensor, first: int = 0) -> dict[str, Seen]:
    """From one forward and backward pass of the whole model; the labels count from position `first` on."""
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            found[name]["x"] = arguments[0].detach().flatten(0, -2).double()
            output.register_hook(lambda g: found[name].update(g=g.flatten(0, -2).double()))

        return hook

    handles = [
        loaded.model.get_submodule(layer.name).register_forward_hook(watch(layer.name))
        for layer in loaded.layers
    ]
    embeddings = loaded.model.get_input_embeddings()
    handles.append(embeddings.register_forward_hook(lambda m, a, output: output.requires_grad_()))
    log_p = loaded.model(TOKENS_NT, use_cache=False).logits.log_softmax(-1)
    (-log_p.gather(-1, label_NT[..., None])[:, first:].sum()).backward()
    for handle in handles:
        handle.remove()
    return {name: Seen(one["x"], one["g"]) for name, one in found.items() if "g" in one}


def near(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found.double(), expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def random_change(layer: Layer) -> Tensor:
    return torch.randn(layer.rows, layer.columns, generator=torch.Generator().manual_seed(9))


# What the statistics are


def test_statistics_are_those_of_every_token_s_input_and_gradient(
    loaded: LoadedModel, drawn: list[Tensor], tmp_path: Path
) -> None:
    """H = Σ w x xᵀ / Σ w, E[w] and the rows' shares of E[g²], with w = mean_O(g²), of every layer; in the H of an
    expert √w stands for w."""
    weights, moments = weighed(loaded, tmp_path)
    means = gradient_means(loaded, weights)
    direct = seen_directly(loaded, torch.cat(drawn).view(TOKENS_NT.shape))
    assert set(direct) == set(moments) == {layer.name for layer in loaded.layers}
    for layer in loaded.layers:
        seen, moment = direct[layer.name], moments[layer.name]
        row_O = seen.g_mO.square().sum(dim=0)
        assert moment.count == len(seen.x_mI)
        assert near(moment.hessian_II, seen.hessian(0.5 if is_expert(layer.name) else 1.0)), layer.name
        assert means[layer.name] == pytest.approx(seen.weight_m.sum().item() / TOKENS_NT.numel(), rel=1e-3)
        assert near(weights.row_shares(layer, CPU), row_O / row_O.mean()), layer.name


def test_the_price_of_any_change_is_that_of_gradient_and_input_together(
    loaded: LoadedModel, drawn: list[Tensor], tmp_path: Path
) -> None:
    """½·E[w]·tr(ΔW H ΔWᵀ) = ½·E[mean_O(g²)·‖ΔW x‖²], but for experts; the two means apart give another number."""
    weights, moments = weighed(loaded, tmp_path)
    direct = seen_directly(loaded, torch.cat(drawn).view(TOKENS_NT.shape))
    apart = []
    for layer in (layer for layer in loaded.layers if not is_expert(layer.name)):
        seen, delta_OI = direct[layer.name], random_change(layer).double()
        squared_m = (seen.x_mI @ delta_OI.T).square().sum(dim=1)
        expected = 0.5 * (seen.weight_m * squared_m).sum().item() / TOKENS_NT.numel()
        trace = (delta_OI @ moments[layer.name].hessian_II.double() @ delta_OI.T).trace().item()
        assert 0.5 * weights.mean(layer.name) * trace == pytest.approx(expected, rel=1e-3), layer.name
        apart.append(0.5 * weights.mean(layer.name) * squared_m.mean().item() / expected)
    assert max(abs(ratio - 1) for ratio in apart) > 0.02


def test_without_weights_every_token_counts_the_same(
    loaded: LoadedModel, drawn: list[Tensor], tmp_path: Path
) -> None:
    inputs = block_inputs(loaded, tmp_path)
    weigh_tokens(loaded, TOKENS_NT, SEED, inputs)
    direct = seen_directly(loaded, torch.cat(drawn).view(TOKENS_NT.shape))
    for name, moment in all_moments(loaded, inputs, None).items():
        assert near(moment.hessian_II, direct[name].hessian(0.0)), name


def test_what_predicts_the_start_of_a_text_has_no_gradient(
    tiny_llama: LoadedModel, drawn: list[Tensor], tmp_path: Path
) -> None:
    """Of a start of three tokens the first two predict tokens that are always there; no plan is measured on them."""
    started = replace(tiny_llama, text_start=(0, 5, 9))
    weights, moments = weighed(started, tmp_path)
    direct = seen_directly(started, torch.cat(drawn).view(TOKENS_NT.shape), first=2)
    for layer in started.layers:
        assert near(moments[layer.name].hessian_II, direct[layer.name].hessian()), layer.name
        expected = direct[layer.name].weight_m.sum().item() / TOKENS_NT.numel()
        assert weights.mean(layer.name) == pytest.approx(expected, rel=1e-3)


def test_labels_are_drawn_from_the_model_s_own_distribution(
    tiny_llama: LoadedModel, drawn: list[Tensor], tmp_path: Path
) -> None:
    """Their mean surprise is the model's mean entropy, within four standard errors."""
    weigh_tokens(tiny_llama, TOKENS_NT, SEED, block_inputs(tiny_llama, tmp_path))
    with torch.no_grad():
        log_p = tiny_llama.model(TOKENS_NT).logits.log_softmax(-1)
    surprise_NT = -log_p.gather(-1, torch.cat(drawn).view(*TOKENS_NT.shape, 1)).squeeze(-1)
    excess_NT = surprise_NT + (log_p.exp() * log_p).sum(-1)
    assert abs(excess_NT.mean()) < 4 * excess_NT.std() / excess_NT.numel() ** 0.5


def test_the_same_seed_draws_the_same_weights(tiny_llama: LoadedModel, tmp_path: Path) -> None:
    first, again, other = (
        weigh_tokens(tiny_llama, TOKENS_NT, seed, block_inputs(tiny_llama, tmp_path))[0].serialized()
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_blocks_are_called_as_another_pass_finds(loaded: LoadedModel, tmp_path: Path) -> None:
    """Of full batches and of the short last one, with no key or value kept between them."""
    _, calls = weigh_tokens(loaded, TOKENS_NT, SEED, block_inputs(loaded, tmp_path))
    later = block_calls(loaded, TOKENS_NT)
    assert sorted(calls) == sorted(later) == [2, 4]
    hidden = {
        size: torch.randn(size, 24, 64, generator=torch.Generator().manual_seed(size)) for size in calls
    }
    with torch.no_grad():
        for size, per_block in calls.items():
            for index, call in enumerate(per_block):
                expected = later[size][index](loaded.blocks[index], hidden[size])
                assert torch.equal(call(loaded.blocks[index], hidden[size]), expected)


# The worker's stream


def test_the_worker_s_stream_has_the_hessians_of_the_profile_to_the_bit(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    """With the weights as the profile's directory keeps them, of a model that is read block by block."""
    inputs = block_inputs(loaded, tmp_path)
    weights, calls = weigh_tokens(loaded, TOKENS_NT, SEED, inputs)
    (tmp_path / "weights").write_bytes(weights.serialized())
    kept = TokenWeights.load(tmp_path / "weights")
    (tmp_path / "stream").mkdir()
    opened, layers = open_model(loaded.ref), {layer.name: layer for layer in loaded.layers}
    streamed = []
    for block in block_works(opened, TOKENS_NT, kept, tmp_path / "stream"):
        moments = input_moments(loaded, block.index, calls, inputs[block.index], weights)
        expected = {moment.layer.name: moment.hessian_II for moment in moments}
        for work in block.layers():
            streamed.append(work.name)
            assert torch.equal(work.hessian_II, expected[work.name]), work.name
            assert torch.equal(work.weight_OI, loaded.weight(layers[work.name]))
    assert sorted(streamed) == sorted(layers)


def test_the_stream_of_a_profile_without_weights_weighs_tokens_evenly(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    inputs = block_inputs(loaded, tmp_path)
    weigh_tokens(loaded, TOKENS_NT, SEED, inputs)
    even = all_moments(loaded, inputs, None)
    (tmp_path / "stream").mkdir()
    for block in block_works(loaded, TOKENS_NT, None, tmp_path / "stream"):
        for work in block.layers():
            assert torch.equal(work.hessian_II, even[work.name].hessian_II), work.name


def test_weights_come_back_from_their_file_as_they_were(loaded: LoadedModel, tmp_path: Path) -> None:
    weights, _ = weigh_tokens(loaded, TOKENS_NT, SEED, block_inputs(loaded, tmp_path))
    (tmp_path / "weights").write_bytes(weights.serialized())
    kept = TokenWeights.load(tmp_path / "weights")
    assert kept.tokens == weights.tokens == TOKENS_NT.numel()
    assert kept.by_layer.keys() == weights.by_layer.keys()
    for name, weight in weights.by_layer.items():
        assert torch.equal(kept.by_layer[name].weight_m, weight.weight_m)
        assert kept.mean(name) == weights.mean(name)
        there, here = kept.by_layer[name].token_m, weight.token_m
        assert there is here is None or torch.equal(there, here)
    for layer in loaded.layers:
        assert torch.equal(kept.row_shares(layer, CPU), weights.row_shares(layer, CPU))
    assert kept.serialized() == weights.serialized()


# Experts


def routed_tokens(loaded: LoadedModel, tokens_NT: Tensor) -> dict[str, list[int]]:
    """The tokens of every expert, by the router's own largest two, in a plain pass."""
    found: dict[str, list[int]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Any) -> None:
            logits_nE = nn.functional.linear(arguments[0].flatten(0, -2), module.weight)
            for expert in range(logits_nE.shape[1]):
                chosen_n = (logits_nE.topk(2).indices == expert).any(dim=1)
                found[f"{name}.experts.{expert}"] = chosen_n.nonzero()[:, 0].tolist()

        return hook

    handles = [
        module.register_forward_hook(watch(name.removesuffix(".gate")))
        for name, module in loaded.model.named_modules()
        if name.endswith("mlp.gate")
    ]
    with torch.no_grad():
        loaded.model(tokens_NT, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def test_an_expert_s_weights_are_of_the_tokens_routed_to_it(mixtral: LoadedModel, tmp_path: Path) -> None:
    weights, moments = weighed(mixtral, tmp_path)
    routed = routed_tokens(mixtral, TOKENS_NT)
    experts = [layer.name for layer in mixtral.layers if is_expert(layer.name)]
    assert len(experts) == 2 * 4 * 2
    for name in experts:
        tokens = routed[name.rpartition(".")[0]]
        weight = weights.by_layer[name]
        assert weight.token_m is not None and weight.token_m.tolist() == tokens
        assert moments[name].count == len(tokens)
    assert moments["model.layers.0.self_attn.q_proj"].count == TOKENS_NT.numel()


def test_a_token_weighs_what_it_weighed_wherever_it_comes_in_a_batch() -> None:
    weight = TokenWeight(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([4, 7, 11]))
    assert weight.of(torch.tensor([7, 11, 4])).tolist() == [2, 6, 1]
    assert TokenWeight(torch.tensor([1.0, 2.0, 6.0])).of(torch.tensor([2, 0])).tolist() == [6, 1]


def test_a_token_that_was_not_routed_before_counts_as_the_mean() -> None:
    """A router that rounding tips over sends an expert a token without a weight: before, between, after the known."""
    weight = TokenWeight(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([4, 7, 11]))
    assert weight.of(torch.tensor([0, 4, 5, 11, 90])).tolist() == [3, 1, 3, 6, 3]


def test_a_gradient_that_stays_away_from_some_tokens_is_averaged_over_all(
    mixtral: LoadedModel, tmp_path: Path
) -> None:
    """An expert's E[w] is over all tokens of calibration, since the others feel nothing of its errors."""
    weights, _ = weighed(mixtral, tmp_path)
    name = "model.layers.0.mlp.experts.0.down_proj"
    total = weights.by_layer[name].weight_m.sum().item()
    assert weights.mean(name) == pytest.approx(total / TOKENS_NT.numel(), rel=1e-5)


def test_an_expert_that_no_token_reached_counts_its_plain_weight_error_at_its_neighbours_price(
    mixtral: LoadedModel, tmp_path: Path
) -> None:
    one_NT = torch.full((1, 1), 5)
    weights, moments = weighed(mixtral, tmp_path, one_NT)
    means = gradient_means(mixtral, weights)
    experts = [m for m in moments.values() if m.layer.block == 0 and m.layer.name.endswith("down_proj")]
    idle = [moment for moment in experts if moment.count == 0]
    heard = [means[moment.layer.name] for moment in experts if moment.count]
    assert (len(idle), len(heard)) == (2, 2)
    for moment in idle:
        assert torch.equal(moment.hessian_II, torch.eye(moment.layer.columns))
        assert means[moment.layer.name] == pytest.approx(sum(heard) / 2)
        assert weights.row_shares(moment.layer, CPU).tolist() == [1] * moment.layer.rows


# Gradients that are zero, or none at all

SMALL = ProfileSettings(tokens=320, bits=(2, 4), ranks=(0, 4), group_sizes=(64,), factor_bits=(8,), rounds=1)


def edited(llama: Path, folder: Path, edit: Callable[[nn.Module], None]) -> LoadedModel:
    """The tiny Llama with other weights."""
    model = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        edit(model)
    model.save_pretrained(folder / "model")
    return load_model(find_model(str(folder / "model")))


def test_a_layer_that_nothing_listens_to_is_weighed_evenly_and_costs_nothing(
    model_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    """gate and up of a block whose down_proj is zero: no gradient, H of all tokens alike, and a profile that plans."""
    loaded = edited(
        model_directory("llama"), tmp_path, lambda model: model.model.layers[1].mlp.down_proj.weight.zero_()
    )
    deaf = [f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up")]
    inputs = block_inputs(loaded, tmp_path)
    weights, _ = weigh_tokens(loaded, TOKENS_NT, SEED, inputs)
    moments, even = (all_moments(loaded, inputs, choice) for choice in (weights, None))
    means = gradient_means(loaded, weights)
    assert sorted(name for name, mean in means.items() if mean == 0) == deaf
    assert all(torch.equal(moments[name].hessian_II, even[name].hessian_II) for name in deaf)
    assert not torch.equal(*(m["model.layers.0.mlp.up_proj"].hessian_II for m in (moments, even)))

    profile = build_profile(loaded.ref, tmp_path / "profile", SMALL, silent)
    for name in deaf:
        assert profile.document.layers[name].sensitivity == 0 < profile.document.layers[name].signal
        assert all(0 < m.error < 1.5 for m in profile.measurements[name])
    plan = plan_budget(profile, "3.0bpw")
    smallest = min(profile.menu.layers[0].options)
    assert all(plan.layers[name].option.bits == smallest.bits for name in deaf)


@pytest.mark.parametrize("silenced", ["model.norm", "lm_head"])
def test_a_model_that_says_the_same_whatever_it_reads_is_profiled_too(
    model_directory: Callable[[str], Path], tmp_path: Path, silenced: str
) -> None:
    """Its last norm or its head is zero, so that no layer has a gradient and no plan diverges."""
    loaded = edited(
        model_directory("llama"), tmp_path, lambda model: model.get_submodule(silenced).weight.zero_()
    )
    profile = build_profile(loaded.ref, tmp_path / "profile", SMALL, silent)
    assert {record.sensitivity for record in profile.document.layers.values()} == {0}
    plan = plan_budget(profile, "3.0bpw")
    assert plan.predicted_kl == 0
    assert plan.total_bytes <= plan.budget.bytes


def test_gradients_that_overflow_are_refused_and_their_layer_named(
    model_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    """up gives zeros, which weights of 1e25 leave at zero; but an error of up would come out 1e25 times as large."""

    def overflow(model: nn.Module) -> None:
        model.model.layers[0].mlp.up_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.fill_(1e25)

    loaded = edited(model_directory("llama"), tmp_path, overflow)
    assert torch.isfinite(loaded.model(TOKENS_NT).logits).all()
    with pytest.raises(ModelError, match=r"gradients of model\.layers\.0\.mlp\.up_proj are NaN or infinite"):
        weigh_tokens(loaded, TOKENS_NT, SEED, block_inputs(loaded, tmp_path))
    with pytest.raises(ModelError, match=r"gradients of model\.layers\.0\.mlp\.up_proj are NaN or infinite"):
        build_profile(loaded.ref, tmp_path / "profile", SMALL, silent)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_gradient_that_is_no_number_is_refused(
    tiny_llama: LoadedModel, tmp_path: Path, value: float
) -> None:
    """As an operation without a finite derivative gives it, such as a root at zero."""

    def spoil(module: nn.Module, by_inputs: tuple[Tensor, ...], by_outputs: tuple[Tensor, ...]) -> Any:
        return tuple(torch.full_like(gradient, value) for gradient in by_inputs)

    tiny_llama.model.get_submodule("model.layers.1.self_attn.o_proj").register_full_backward_hook(spoil)
    with pytest.raises(ModelError, match=r"gradients of model\.layers\.[01]\.\S+ are NaN or infinite"):
        weigh_tokens(tiny_llama, TOKENS_NT, SEED, block_inputs(tiny_llama, tmp_path))
