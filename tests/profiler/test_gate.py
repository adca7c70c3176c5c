"""The gate on tiny real models: what it measures is what a checkpoint would show, and a losing plan says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from allocator.plan import Plan, with_choice
from allocator.storage import KEEP, Option
from allocator.strategies.strategies import manual
from api.services.usecases import execute, plan_budget
from profiler.documents.profile import Profile
from profiler.evaluation.divergence import live_logits, measure
from profiler.evaluation.plan_evaluation import measure_trials
from profiler.evaluation.verification import verified
from profiler.model.checkpoint import find_model
from profiler.model.layers import LoadedModel, load_model, open_model
from profiler.statistics.calibration import silent


@pytest.fixture
def profile(tiny_profile: Callable[[str], Profile]) -> Profile:
    return tiny_profile("llama")


@pytest.fixture
def opened(profile: Profile) -> LoadedModel:
    return open_model(find_model(profile.document.model.id))


def halfway(profile: Profile) -> str:
    """A budget between uniform 2 and uniform 3 bits."""
    sizes = [plan_budget(profile, None, f"uniform:{bits}").total_bytes for bits in (2, 3)]
    return f"{sum(sizes) // 2}B"


def test_a_trial_measures_what_the_written_checkpoint_measures(
    profile: Profile, opened: LoadedModel, tmp_path: Path
) -> None:
    plan = plan_budget(profile, halfway(profile))
    execute(plan, profile, tmp_path / "checkpoint", silent)
    (tmp_path / "trial").mkdir()
    tokens_NT = profile.probe_tokens()
    trial = {name: layer.option for name, layer in plan.layers.items()}
    kl_PN = measure_trials(opened, profile.calibration(), tokens_NT, [trial], tmp_path / "trial", silent)[
        :, :, 0
    ]
    written = load_model(find_model(str(tmp_path / "checkpoint"))).model
    original = load_model(find_model(profile.document.model.id))
    expected = measure(written, live_logits(original), tokens_NT).kl_nats
    assert kl_PN.mean().item() == pytest.approx(expected, rel=1e-3)


def test_keeping_every_layer_diverges_by_nothing_and_fewer_bits_by_more(
    profile: Profile, opened: LoadedModel, tmp_path: Path
) -> None:
    names = [layer.name for layer in opened.layers]
    trials = [dict.fromkeys(names, option) for option in (KEEP, Option(4, 0, 64, 0), Option(2, 0, 64, 0))]
    kl_PN = measure_trials(opened, profile.calibration(), profile.probe_tokens(), trials, tmp_path, silent)[
        :, :, 0
    ]
    kept, four, two = kl_PN.mean(dim=1).tolist()
    assert kept == pytest.approx(0, abs=1e-6)
    assert kept < four < two


def test_the_gate_keeps_the_budget_and_tells_what_it_measured(
    profile: Profile, opened: LoadedModel, tmp_path: Path
) -> None:
    plan = plan_budget(profile, halfway(profile))
    (found,) = verified(opened, profile, [plan], tmp_path, silent)
    assert found.total_bytes <= plan.budget.bytes
    assert found.total_bytes == sum(found.kept.values()) + found.compressible_bytes
    verification = found.verification
    assert verification is not None
    assert verification.uniform_kl is not None and verification.difference is not None
    assert verification.measured_kl - verification.uniform_kl == pytest.approx(verification.difference)
    assert verification.tokens == profile.probe_tokens().numel() - len(profile.probe_tokens())
    assert Plan.model_validate_json(found.model_dump_json()) == found


def test_a_plan_that_loses_to_uniform_says_so(profile: Profile, opened: LoadedModel, tmp_path: Path) -> None:
    """The first block at 2 bits, the second at 4, against uniform of the same size."""
    menu = profile.menu
    first = {layer.name for layer in opened.layers_of(0)}
    options = {layer.name: Option(2 if layer.name in first else 4, 0, 64, 0) for layer in opened.layers}
    plan = with_choice(
        plan_budget(profile, halfway(profile)), menu, manual(menu, options), profile.interval_factors
    )
    found = verified(opened, profile, [plan], tmp_path, silent, swaps=0)[0].verification
    assert found is not None and found.verdict == "worse"
    assert found.swaps == 0 and not found.swapped


def test_without_a_uniform_plan_on_either_side_there_is_nothing_to_compare(
    profile: Profile, opened: LoadedModel, tmp_path: Path
) -> None:
    plan = plan_budget(profile, f"{profile.menu.original_bytes}B")
    found = verified(opened, profile, [plan], tmp_path, silent, swaps=0)[0].verification
    assert found is not None
    assert found.verdict == "nothing to compare" and found.uniform_kl is None


def test_plans_verified_together_say_what_each_says_alone(
    profile: Profile, opened: LoadedModel, tmp_path: Path
) -> None:
    plans = [plan_budget(profile, budget) for budget in ("3.1bpw", "4.2bpw")]
    together = verified(opened, profile, plans, fresh(tmp_path / "together"), silent)
    alone = [verified(opened, profile, [p], fresh(tmp_path / p.budget.text), silent)[0] for p in plans]
    assert [p.layers for p in together] == [p.layers for p in alone]
    assert [p.verification for p in together] == [p.verification for p in alone]


def fresh(folder: Path) -> Path:
    folder.mkdir()
    return folder
