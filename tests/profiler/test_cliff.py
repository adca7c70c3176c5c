"""The quality cliff: what is lost as rank falls, and where it is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from allocator.plan import PlanModel
from profiler.documents.sidecar import CliffDocument, Cut
from profiler.evaluation.prompts import repeated_share
from profiler.model.checkpoint import find_model
from profiler.model.layers import LoadedModel, load_model
from profiler.statistics.calibration import CalibrationError
from profiler.statistics.estimate import Estimate
from profiler.studies.cliff import Part, crossing, cut_weights, groups_of, measure_cliff, name_cliff

MODEL = PlanModel(id="tiny", revision=None, weights_sha256="0" * 64)
TOKENS_NT = torch.randint(1, 128, (3, 64), generator=torch.Generator().manual_seed(0))


def cut(ratio: float, energy: float, kl: float) -> Cut:
    return Cut(ratio, energy, Estimate(kl, kl, kl), 0.0)


@pytest.fixture(scope="module")
def studied(
    model_directory: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> CliffDocument:
    loaded = load_model(find_model(str(model_directory("llama"))))
    folder = tmp_path_factory.mktemp("cliff")
    with torch.no_grad():
        before = loaded.model(TOKENS_NT).logits
        found = measure_cliff(loaded, MODEL, TOKENS_NT, "text", folder, (0.75, 0.5, 0.25))
        assert torch.equal(loaded.model(TOKENS_NT).logits, before)
    return found


def test_every_projection_and_every_kind_of_head_is_a_group(studied: CliffDocument) -> None:
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    heads = ["q heads", "k heads", "v heads", "o heads"]
    assert [group.group for group in studied.groups] == projections + heads


def test_the_experts_of_a_mixture_are_one_group(model_directory: Callable[[str], Path]) -> None:
    loaded = load_model(find_model(str(model_directory("mixtral"))))
    groups = groups_of(loaded)
    experts = [name for name in groups if "experts" in name]
    assert experts == ["experts.*.gate_up_proj", "experts.*.down_proj"]
    assert all(len(groups[name]) == 2 * 4 for name in experts)


def test_nothing_is_lost_at_full_rank_and_more_the_lower_it_is(studied: CliffDocument) -> None:
    for group in studied.groups:
        losses = [cut.kl.mean for cut in group.cuts]
        assert losses[0] == 0
        assert losses == sorted(losses)
        assert losses[-1] > 0
        assert [cut.ratio for cut in group.cuts] == [1, 0.75, 0.5, 0.25]
        energies = [cut.energy for cut in group.cuts]
        assert energies == sorted(energies, reverse=True)


def test_the_cut_by_energy_leaves_just_that_much(studied: CliffDocument) -> None:
    for group in studied.groups:
        assert 0.95 <= group.energy_cut.energy < 1
        assert group.energy_is_enough == (group.energy_cut.kl.mean < studied.threshold_kl)


def test_the_threshold_is_what_rounding_to_four_bits_costs(studied: CliffDocument) -> None:
    assert 0 < studied.threshold_kl < 5
    for group in studied.groups:
        if group.cliff_ratio is not None:
            assert group.cuts[-1].kl.mean >= studied.threshold_kl
            assert group.cuts[-1].ratio <= group.cliff_ratio <= 1


def test_a_part_at_full_rank_is_left_to_the_bit(tiny_llama: LoadedModel) -> None:
    parts = [Part.of(tiny_llama, layer, head) for layer, head in groups_of(tiny_llama)["q heads"]]
    assert cut_weights(tiny_llama, parts, [part.full_rank for part in parts]) == {}


def test_cutting_heads_cuts_each_on_its_own(tiny_llama: LoadedModel) -> None:
    parts = [Part.of(tiny_llama, layer, head) for layer, head in groups_of(tiny_llama)["o heads"]]
    weights = cut_weights(tiny_llama, parts, [3] * len(parts))
    for part in parts:
        assert part.head is not None
        assert torch.linalg.matrix_rank(part.head.cut(weights[part.layer])) == 3


def test_the_cliff_lies_between_the_cuts_around_the_threshold() -> None:
    falling = [cut(1, 1, 0), cut(0.8, 0.98, 0.1), cut(0.6, 0.9, 0.5)]
    assert crossing(falling, 0.1) == pytest.approx((0.8, 0.98))
    assert crossing(falling, 0.3) == pytest.approx((0.7, 0.94))
    assert crossing(falling, 0.6) is None


@pytest.mark.parametrize(("kl_at_energy", "enough"), [(0.2, True), (0.4, False)])
def test_energy_is_enough_only_below_the_threshold(kl_at_energy: float, enough: bool) -> None:
    cuts = (cut(1, 1, 0), cut(0.5, 0.9, 0.5))
    named = name_cliff("q_proj", 64, cuts, cut(0.7, 0.95, kl_at_energy), 0.3)
    assert named.energy_is_enough == enough
    assert (named.cliff_ratio, named.cliff_energy) == pytest.approx((0.7, 0.94))


def test_repetition_counts_ngrams_that_were_there_before() -> None:
    assert repeated_share([1, 2, 3, 4, 5, 6]) == 0
    assert repeated_share([7] * 8) == pytest.approx(4 / 5)
    assert repeated_share([1, 2, 1, 2, 1, 2, 1, 2], n=2) == pytest.approx(5 / 7)
    assert repeated_share([1, 2]) == 0


def test_one_window_is_refused(tiny_llama: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="one window"):
        measure_cliff(tiny_llama, MODEL, TOKENS_NT[:1], "text", tmp_path)
