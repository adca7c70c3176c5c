"""Tables: embedding and output head are priced by measuring, planned with the layers, stored and loaded packed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import compressor.plugin  # noqa: F401  registers the checkpoint format
from allocator.plan import Plan, load_plan
from allocator.storage import KEEP_BITS, Option
from api.services.usecases import compress_plan, plan_budget, uniform_points, verify_plan
from compressor.nn.embedding import CompressedEmbedding, rounded_table
from compressor.nn.linear import CompressedLinear
from profiler.documents.profile import Profile, ProfileError, load_profile
from profiler.documents.sidecar import TablesDocument
from profiler.evaluation.divergence import live_logits, measure
from profiler.evaluation.embeddings import find_tables, tables_rounded
from profiler.model.checkpoint import find_model, tensor_bytes
from profiler.model.layers import load_model, open_model
from profiler.statistics.calibration import silent
from profiler.sweep.run import ProfileSettings, build_profile

TABLES = {
    "llama": {"model.embed_tokens": "embedding", "lm_head": "head"},
    "gpt_neo": {"transformer.wte": "tied"},
}
Profiled = Callable[[str], Profile]


def logits(model: nn.Module) -> Tensor:
    tokens_NT = torch.randint(1, 128, (3, 40), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model.eval()(tokens_NT, use_cache=False).logits.float()


@dataclass(frozen=True)
class Journey:
    """A tiny model whose tables a plan compresses, and the checkpoint made of it."""

    profile: Profile
    plan: Plan
    checkpoint: Path

    @property
    def source(self) -> str:
        return self.plan.model.id


@pytest.fixture(scope="module", params=TABLES)
def journey(
    request: pytest.FixtureRequest, tiny_profile: Profiled, tmp_path_factory: pytest.TempPathFactory
) -> Journey:
    """Three bits per weight, tables included: too few to keep them."""
    profile, folder = tiny_profile(request.param), tmp_path_factory.mktemp("tables")
    plan = plan_budget(profile.with_tables, "3.6bpw")
    plan.save(folder / "plan.json")
    compress_plan(folder / "plan.json", folder / "checkpoint", silent, profile.path)
    return Journey(profile, load_plan(folder / "plan.json"), folder / "checkpoint")


# Measuring


@pytest.mark.parametrize("architecture", TABLES)
def test_tied_weights_are_one_table_and_untied_ones_two(architecture: str, tiny_profile: Profiled) -> None:
    found = find_tables(open_model(find_model(tiny_profile(architecture).document.model.id)))
    assert {table.name: table.role for table in found} == TABLES[architecture]


@pytest.mark.parametrize("architecture", TABLES)
def test_fewer_bits_cost_more(architecture: str, tiny_profile: Profiled) -> None:
    for table in tiny_profile(architecture).with_tables.tables.values():
        price = {m.option.bits: m.kl_nats for m in table.measurements if m.measured}
        assert 0 < price[8] < price[6] < price[4]


@pytest.mark.parametrize("architecture", TABLES)
def test_a_group_size_that_was_not_measured_is_priced_near_what_measuring_gives(
    architecture: str, tiny_profile: Profiled
) -> None:
    profile = tiny_profile(architecture)
    loaded, tokens_NT = open_model(find_model(profile.document.model.id)), profile.probe_tokens()
    reference = live_logits(load_model(loaded.ref))
    for name, table in profile.with_tables.tables.items():
        (scaled,) = [m for m in table.measurements if m.option == Option(4, 0, 32, 0)]
        with tables_rounded(loaded, {name: scaled.option}):
            measured = measure(loaded.model, reference, tokens_NT).kl_nats
        assert not scaled.measured
        assert scaled.kl_nats == pytest.approx(measured, rel=0.3)


def test_a_model_is_itself_again_once_its_tables_were_rounded(tiny_profile: Profiled) -> None:
    loaded = open_model(find_model(tiny_profile("gpt_neo").document.model.id))
    before = logits(loaded.model)
    with tables_rounded(loaded, {"transformer.wte": Option(4, 0, 64, 0)}):
        assert not torch.equal(logits(loaded.model), before)
    assert torch.equal(logits(loaded.model), before)


def test_profiling_again_measures_the_tables_that_an_earlier_version_did_not(
    tiny_profile: Profiled, tiny_settings: ProfileSettings, tmp_path: Path
) -> None:
    made = tiny_profile("gpt_neo")
    copytree(made.path, tmp_path / "old")
    (tmp_path / "old" / TablesDocument.file_name).unlink()
    again = build_profile(find_model(made.document.model.id), tmp_path / "old", tiny_settings, silent)
    assert again.sha256 == made.sha256
    assert again.with_tables.tables == made.with_tables.tables


# Planning


def test_a_profile_without_tables_says_what_to_do(tiny_profile: Profiled, tmp_path: Path) -> None:
    copytree(tiny_profile("llama").path, tmp_path / "old")
    (tmp_path / "old" / TablesDocument.file_name).unlink()
    old = load_profile(tmp_path / "old")
    with pytest.raises(ProfileError, match="has no measured tables; profile it again"):
        _ = old.with_tables
    assert plan_budget(old, "3.3bpw") == plan_budget(tiny_profile("llama"), "3.3bpw")


def test_without_tables_a_plan_says_nothing_of_them(tiny_profile: Profiled) -> None:
    profile = tiny_profile("llama")
    _ = profile.with_tables
    plan = plan_budget(profile, "3.3bpw")
    assert b"tables" not in plan.document()
    assert {f"{name}.weight" for name in TABLES["llama"]} <= plan.kept.keys()
    assert plan.layers.keys() == profile.document.layers.keys()


def test_tables_are_layers_of_the_plan_and_weights_of_its_bits_per_weight(journey: Journey) -> None:
    profile, plan = journey.profile, journey.plan
    tables = profile.with_tables.tables
    assert plan.tables == {name: table.role for name, table in tables.items()}
    assert plan.layers.keys() == {*profile.document.layers, *tables}
    assert not {f"{name}.weight" for name in tables} & plan.kept.keys()
    weights = profile.menu.compressible_weights + sum(t.rows * t.columns for t in tables.values())
    assert plan.budget.bytes == sum(plan.kept.values()) + int(3.6 * weights / 8)
    assert plan.predicted_kl == pytest.approx(sum(layer.cost for layer in plan.layers.values()))


def test_at_the_same_bytes_a_plan_with_tables_is_predicted_to_lose_no_more(journey: Journey) -> None:
    without = plan_budget(journey.profile, "3.3bpw")
    offered = plan_budget(journey.profile.with_tables, f"{without.total_bytes}B")
    assert offered.predicted_kl <= without.predicted_kl * (1 + 1e-9)


@pytest.mark.parametrize("strategy", ["uniform:3", "progressive"])
def test_strategies_keep_tables(strategy: str, tiny_profile: Profiled) -> None:
    profile = tiny_profile("gpt_neo")
    budget = None if strategy == "uniform:3" else f"{plan_budget(profile, None, 'uniform:3').total_bytes}B"
    with_tables, without = (plan_budget(p, budget, strategy) for p in (profile.with_tables, profile))
    assert with_tables.layers["transformer.wte"].bits == KEEP_BITS
    assert with_tables.total_bytes == without.total_bytes
    assert [p.kl_nats for p in uniform_points(profile.with_tables)] == [
        p.kl_nats for p in uniform_points(profile)
    ]


# Carrying out


def test_a_checkpoint_takes_exactly_the_planned_bytes(journey: Journey) -> None:
    assert any(journey.plan.layers[name].bits < KEEP_BITS for name in journey.plan.tables)
    assert tensor_bytes(journey.checkpoint) == journey.plan.total_bytes


def test_looked_up_rows_are_those_of_the_rounded_table(journey: Journey) -> None:
    model = AutoModelForCausalLM.from_pretrained(journey.checkpoint)
    original = AutoModelForCausalLM.from_pretrained(journey.source)
    embedding, weight_Vd = model.get_input_embeddings(), original.get_input_embeddings().weight.detach()
    assert isinstance(embedding, CompressedEmbedding)
    expected_Vd = rounded_table(weight_Vd, embedding.option)
    ids = torch.tensor([[3, 0, 127], [5, 3, 3]])
    assert torch.equal(embedding(ids), expected_Vd[ids])
    assert torch.equal(embedding.dense_weight(), expected_Vd)


def test_the_head_computes_with_the_rounded_table_and_shares_it_where_it_is_tied(journey: Journey) -> None:
    model = AutoModelForCausalLM.from_pretrained(journey.checkpoint)
    original = AutoModelForCausalLM.from_pretrained(journey.source)
    head, weight_Vd = model.get_output_embeddings(), original.get_output_embeddings().weight.detach()
    assert isinstance(head, CompressedLinear)
    assert torch.equal(head.dense_weight(), rounded_table(weight_Vd, head.option))
    tied = "tied" in journey.plan.tables.values()
    for part in ("weight", "weight_scale", "weight_zero"):
        assert (getattr(head, part) is getattr(model.get_input_embeddings(), part)) == tied


def test_a_loaded_checkpoint_has_the_logits_of_dense_tables(journey: Journey) -> None:
    model = AutoModelForCausalLM.from_pretrained(journey.checkpoint)
    found = logits(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    dense = nn.Embedding.from_pretrained(embedding.dense_weight())
    model.set_input_embeddings(dense)
    linear = nn.Linear(head.in_features, head.out_features, bias=False)
    linear.weight.data = head.dense_weight()
    model.set_output_embeddings(linear)
    assert (found - logits(model)).abs().max() <= 1e-4
    assert (found - logits(AutoModelForCausalLM.from_pretrained(journey.source))).abs().max() > 0.1


def test_saved_and_loaded_again_nothing_is_lost_nor_stored_twice(journey: Journey, tmp_path: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(journey.checkpoint)
    loaded.save_pretrained(tmp_path)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert {key: value for key, value in report.items() if value} == {}
    assert torch.equal(logits(again), logits(loaded))
    assert tensor_bytes(tmp_path) == journey.plan.total_bytes
    tied = "tied" in journey.plan.tables.values()
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied


def test_what_a_plan_is_verified_at_is_what_its_checkpoint_loses(journey: Journey) -> None:
    found = verify_plan(journey.plan, journey.profile, silent, constrained=True).verification
    checkpoint, original = (load_model(find_model(str(p))) for p in (journey.checkpoint, journey.source))
    tokens_NT = journey.profile.probe_tokens()
    measured = measure(checkpoint.model, live_logits(original), tokens_NT)
    assert found is not None
    assert found.measured_kl == pytest.approx(measured.kl_nats, rel=1e-3)
