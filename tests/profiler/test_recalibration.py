"""Calibrating on whole plans: what the new profile says, that runs repeat and resume to the byte, and refusals."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from torch import Tensor

from allocator.problem import Integers
from allocator.storage import KEEP
from allocator.strategies.strategies import choice_bytes, choice_cost
from profiler.documents.profile import Profile, ProfileError, load_profile
from profiler.evaluation.plan_calibration import (
    FEWEST_PLANS,
    RecalibrationSettings,
    agreement,
    conformal_width,
    predictions_by_class,
    random_choices,
    recalibrate,
)
from profiler.evaluation.plan_evaluation import measure_trials, trial_of
from profiler.model.checkpoint import find_model
from profiler.model.layers import LoadedModel, open_model
from profiler.prediction.class_calibration import option_class
from profiler.statistics.calibration import Progress, silent
from profiler.sweep.run import ProfileSettings, build_profile

FEW = RecalibrationSettings(plans=FEWEST_PLANS)
LARGE = RecalibrationSettings(plans=FEWEST_PLANS, low_bpw=3.6, high_bpw=4.4)
OTHER = RecalibrationSettings(plans=FEWEST_PLANS, seed=100)


@pytest.fixture(scope="module")
def profile(tiny_profile: Callable[[str], Profile]) -> Profile:
    return tiny_profile("llama")


@pytest.fixture(scope="module")
def calibrated(profile: Profile, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """An undisturbed run. Read-only."""
    return run(profile, tmp_path_factory.mktemp("calibrated") / "out")


def opened(profile: Profile) -> LoadedModel:
    return open_model(find_model(profile.document.model.id))


def run(
    profile: Profile,
    output: Path,
    settings: RecalibrationSettings = FEW,
    progress: Progress = silent,
    tokens_NT: Tensor | None = None,
) -> Profile:
    windows_NT = profile.probe_tokens() if tokens_NT is None else tokens_NT
    return recalibrate(opened(profile), profile, windows_NT, output, settings, progress)


def interrupted(
    profile: Profile, output: Path, trials: int, settings: RecalibrationSettings = FEW
) -> dict[Path, int]:
    """Stop a run after `trials` measured ones; the work it left, with times of writing."""

    def stop(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("measuring trials", trials):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(profile, output, settings, stop)
    assert not (output / "profile.json").exists()
    return {file: file.stat().st_mtime_ns for file in (output / ".work").glob("*.safetensors")}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def layer_kinds(profile: Profile) -> dict[str, str]:
    return {name: record.projection for name, record in profile.document.layers.items()}


def uncalibrated(profile: Profile, choice: Integers) -> float:
    """Σ error × sensitivity × correction, without any gain."""
    taken = zip(profile.menu.layers, choice.tolist(), strict=True)
    records = profile.document.layers
    return sum(
        float(layer.error[index]) * records[layer.name].sensitivity * records[layer.name].correction
        for layer, index in taken
    )


# What the new profile says


def test_prices_are_the_old_corrected_sensitivities_times_the_mean_times_the_class_gain(
    profile: Profile, calibrated: Profile
) -> None:
    gain = calibrated.document.gain
    assert gain.mean != profile.document.gain.mean
    assert len(set(gain.classes.values())) > 10, "the classes differ"
    for name, kind in layer_kinds(profile).items():
        record = profile.document.layers[name]
        sensitivity = record.sensitivity * record.correction
        assert calibrated.document.layers[name] == profile.document.layers[name]
        for bits, tier in ((2, "low"), (3, "middle"), (4, "high"), (8, "high")):
            expected = sensitivity * gain.mean * gain.classes[f"{kind} {tier}"]
            assert calibrated.price(name, bits) == pytest.approx(expected, rel=1e-12)


def test_the_menu_costs_error_times_price_and_keeps_errors_and_sizes(
    profile: Profile, calibrated: Profile
) -> None:
    for old, new in zip(profile.menu.layers, calibrated.menu.layers, strict=True):
        assert (new.name, new.options) == (old.name, old.options)
        assert new.error.tolist() == old.error.tolist()
        assert new.total_bytes.tolist() == old.total_bytes.tolist()
        prices = [calibrated.price(new.name, option.bits) for option in new.options]
        assert new.cost.tolist() == pytest.approx((old.error * np.array(prices)).tolist(), rel=1e-12)
        assert new.cost[new.options.index(KEEP)] == 0


def test_a_plan_costs_what_its_classes_add_times_their_gains(profile: Profile, calibrated: Profile) -> None:
    choices = random_choices(profile.menu, FEW)
    names, x_PK = predictions_by_class(profile, choices)
    assert set(names) == {
        option_class(kind, bits) for kind in layer_kinds(profile).values() for bits in (2, 3, 4)
    }
    gain = calibrated.document.gain
    gain_K = gain.mean * np.array([gain.classes[name] for name in names])
    costs = [choice_cost(calibrated.menu, choice) for choice in choices]
    assert (x_PK @ gain_K).tolist() == pytest.approx(costs)


def test_a_class_that_no_plan_uses_has_the_mean_gain(profile: Profile, tmp_path: Path) -> None:
    """Plans near 4 bits have most matrices of some kinds at none of the lower tiers."""
    names, x_PK = predictions_by_class(profile, random_choices(profile.menu, LARGE))
    unused = [name for name, added in zip(names, x_PK.sum(axis=0), strict=True) if added == 0]
    assert unused, "of the small model's classes one at least is rare"
    gain = run(profile, tmp_path / "out", LARGE).document.gain
    assert [gain.classes[name] for name in unused] == pytest.approx([1] * len(unused))


def test_plans_say_their_bytes_and_error_times_sensitivity(profile: Profile, calibrated: Profile) -> None:
    choices = random_choices(profile.menu, FEW)
    plans = calibrated.document.plans
    assert [plan.total_bytes for plan in plans] == [choice_bytes(profile.menu, choice) for choice in choices]
    expected = [uncalibrated(profile, choice) for choice in choices]
    assert [plan.predicted_kl for plan in plans] == pytest.approx(expected, rel=1e-9)


def test_plans_say_what_was_measured(profile: Profile, calibrated: Profile, tmp_path: Path) -> None:
    trials = [trial_of(profile.menu, choice) for choice in random_choices(profile.menu, FEW)]
    tokens_NT = profile.probe_tokens()
    kl_PN = measure_trials(opened(profile), profile.calibration(), tokens_NT, trials, tmp_path, silent)[
        :, :, 0
    ].numpy()
    plans = calibrated.document.plans
    assert [plan.measured_kl for plan in plans] == kl_PN.mean(axis=1).tolist()
    error_P = kl_PN.std(axis=1, ddof=1) / math.sqrt(len(tokens_NT))
    assert [plan.standard_error for plan in plans] == pytest.approx(error_P.tolist())


def test_other_windows_measure_something_else_of_the_same_plans(
    profile: Profile, calibrated: Profile, tmp_path: Path
) -> None:
    made = run(profile, tmp_path / "out", tokens_NT=profile.calibration_tokens()[:3]).document.plans
    plans = calibrated.document.plans
    assert [plan.predicted_kl for plan in made] == [plan.predicted_kl for plan in plans]
    assert all(a.measured_kl != b.measured_kl for a, b in zip(made, plans, strict=True))


def test_the_gain_s_mean_is_that_of_the_plans_and_its_interval_lies_around_it_evenly(
    calibrated: Profile,
) -> None:
    gain, plans = calibrated.document.gain, calibrated.document.plans
    ratios = [math.log(plan.measured_kl / plan.predicted_kl) for plan in plans]
    assert math.log(gain.mean) == pytest.approx(sum(ratios) / len(ratios))
    assert gain.low < gain.mean < gain.high
    assert gain.low * gain.high == pytest.approx(gain.mean**2)


@pytest.mark.parametrize("plans", [10, 40, 99])
def test_the_interval_holds_nine_further_plans_in_ten_however_errors_are_spread(plans: int) -> None:
    draw = np.random.default_rng(plans)
    for errors in (draw.standard_normal, draw.standard_cauchy, draw.random):
        drawn = errors((4_000, plans + 1))
        inside = [abs(row[-1]) <= conformal_width(row[:-1]) for row in drawn]
        assert 0.885 <= np.mean(inside) <= 0.9 + 1 / (plans + 1) + 0.015


def test_predictions_of_plans_come_nearer_than_under_the_gain_of_the_probes(
    profile: Profile, calibrated: Profile
) -> None:
    """Each plan predicted from the others. On this model uniform probes are off by a third, classes by a thirtieth."""
    found = calibrated.document.agreement
    assert found is not None
    before = [
        abs(math.log(plan.predicted_kl * profile.document.gain.mean / plan.measured_kl))
        for plan in calibrated.document.plans
    ]
    assert found.median_log_ratio_before == pytest.approx(float(np.median(before)))
    assert found.median_log_ratio < found.median_log_ratio_before / 2
    assert found.spearman > 0.9
    assert found.misordered < 0.1
    assert 0.8 <= found.coverage <= 1


def test_what_the_gain_does_not_touch_stays(profile: Profile, calibrated: Profile) -> None:
    new = {"gain", "plans", "agreement"}
    assert calibrated.document.model_dump(exclude=new) == profile.document.model_dump(exclude=new)
    before, after = contents(profile.path), contents(calibrated.path)
    stays = set(before) - {"profile.json", "request.json"}
    assert {name: after[name] for name in stays} == {name: before[name] for name in stays}
    assert set(after) == {*stays, "profile.json", "request.json"}, "no work is left"


def test_figures_of_merit_by_hand() -> None:
    """Predicted 2, 1, 8 of measured 1, 2, 4: one pair of three in the wrong order."""
    log = math.log(2)
    found = agreement(np.array([1.0, 2.0, 4.0]), np.array([log, -log, log]), np.array([0.0, 3.0, -1.0]), 0.7)
    assert found.spearman == pytest.approx(0.5)
    assert found.misordered == pytest.approx(1 / 3)
    assert found.median_log_ratio == pytest.approx(log)
    assert found.median_log_ratio_before == 1
    assert found.coverage == 1
    narrow = agreement(np.array([1.0, 2.0, 4.0]), np.array([log, 0.0, 0.1]), np.zeros(3), 0.5)
    assert narrow.coverage == pytest.approx(2 / 3)
    assert narrow.median_log_ratio == pytest.approx(0.1)


# The plans


@pytest.mark.parametrize(
    "settings", [FEW, OTHER, RecalibrationSettings(plans=25, low_bpw=1.0, high_bpw=40.0)]
)
def test_random_plans_fill_their_budgets_and_never_exceed_them(
    profile: Profile, settings: RecalibrationSettings
) -> None:
    menu = profile.menu
    choices = random_choices(menu, settings)
    assert len(choices) == settings.plans
    for p, choice in enumerate(choices):
        share = p / (settings.plans - 1)
        bits = settings.low_bpw + (settings.high_bpw - settings.low_bpw) * share
        budget = menu.kept_bytes + bits * menu.compressible_weights / 8
        size = choice_bytes(menu, choice)
        assert menu.smallest_bytes <= size <= max(budget, menu.smallest_bytes)
        assert size >= 0.95 * min(budget, menu.original_bytes)


def test_random_plans_are_the_same_for_the_same_seed_and_others_for_another(profile: Profile) -> None:
    def drawn(settings: RecalibrationSettings) -> list[tuple[int, ...]]:
        return [tuple(choice.tolist()) for choice in random_choices(profile.menu, settings)]

    plans = drawn(FEW)
    assert drawn(FEW) == plans
    assert len(set(plans)) == FEWEST_PLANS
    assert not set(plans[1:]) & set(drawn(OTHER)[1:]), "only the smallest plan is the same"


# Repeating and resuming


def test_the_same_seed_makes_the_same_profile_to_the_byte(
    profile: Profile, calibrated: Profile, tmp_path: Path
) -> None:
    run(profile, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(calibrated.path)
    other = run(profile, tmp_path / "other", OTHER)
    assert other.document.plans != calibrated.document.plans


def test_a_finished_run_is_returned_as_it_is(profile: Profile, calibrated: Profile) -> None:
    before = {file: file.stat().st_mtime_ns for file in calibrated.path.iterdir()}
    stages: list[str] = []
    again = run(profile, calibrated.path, progress=lambda stage, *_: stages.append(stage))
    assert stages == []
    assert (again.sha256, again.document) == (calibrated.sha256, calibrated.document)
    assert {file: file.stat().st_mtime_ns for file in calibrated.path.iterdir()} == before


def test_an_interrupted_run_resumes_where_it_was(
    profile: Profile, calibrated: Profile, tmp_path: Path
) -> None:
    """Twice interrupted and then finished, it is the undisturbed profile to the byte, nothing made twice."""
    output = tmp_path / "out"
    first = interrupted(profile, output, 3)
    rows = Counter(file.name.endswith(".windows.safetensors") for file in first)
    assert rows[True] == 3 and rows[False] > 14
    second = interrupted(profile, output, 6)
    assert {file: second[file] for file in first} == first
    assert sorted(file.name for file in second.keys() - first.keys()) == [
        f"{index}.windows.safetensors" for index in (3, 4, 5)
    ]
    with pytest.raises(ProfileError, match="not a profile directory"):
        load_profile(output)

    steps: list[tuple[str, int, int]] = []
    run(profile, output, progress=lambda *step: steps.append(step))
    assert steps[-FEWEST_PLANS:] == [
        ("measuring trials", n + 1, FEWEST_PLANS) for n in range(FEWEST_PLANS)
    ], "progress counts what was there already"
    assert contents(output) == contents(calibrated.path)


def test_a_measured_row_is_taken_as_it_lies(profile: Profile, tmp_path: Path) -> None:
    """Swapped rows come out swapped, so that nothing of them was measured again."""
    output = tmp_path / "out"
    interrupted(profile, output, 2)
    a, b = (output / ".work" / f"{index}.windows.safetensors" for index in (0, 1))
    means = [load_file(row)["found_N5"][:, 0].mean().item() for row in (a, b)]
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    plans = run(profile, output).document.plans
    assert [plan.measured_kl for plan in plans[:2]] == means[::-1]


def test_an_interruption_while_compressing_is_resumed_too(
    profile: Profile, calibrated: Profile, tmp_path: Path
) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if stage == "compressing trials":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(profile, tmp_path / "out", progress=stop)
    layers = list((tmp_path / "out" / ".work").glob("*.safetensors"))
    assert layers and all(".layers.0." in layer.name for layer in layers)
    run(profile, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(calibrated.path)


def test_another_request_discards_unfinished_work(
    profile: Profile, calibrated: Profile, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    left = interrupted(profile, output, 4, OTHER)
    between = interrupted(profile, output, 1)
    rows = [file for file in between if file.name.endswith(".windows.safetensors")]
    assert len(rows) == 1
    assert between[rows[0]] > max(left.values()), "measured anew"
    run(profile, output)
    assert contents(output) == contents(calibrated.path)


def test_other_windows_are_another_request(profile: Profile, calibrated: Profile, tmp_path: Path) -> None:
    output = tmp_path / "out"
    tokens_NT = profile.calibration_tokens()[:2]

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "measuring trials":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(profile, output, progress=stop, tokens_NT=tokens_NT)
    run(profile, output)
    assert contents(output) == contents(calibrated.path)


def test_a_calibrated_profile_can_be_calibrated_again(
    profile: Profile, calibrated: Profile, tmp_path: Path
) -> None:
    """Its plans are other ones, drawn under its own costs; a finished run of it is returned as it is."""
    again = run(calibrated, tmp_path / "out")
    assert again.document.layers == profile.document.layers
    for plan, choice in zip(again.document.plans, random_choices(calibrated.menu, FEW), strict=True):
        assert plan.predicted_kl == pytest.approx(uncalibrated(profile, choice))
    assert run(calibrated, tmp_path / "out").sha256 == again.sha256


# Refusals


def test_too_few_plans_are_refused_before_anything_is_written(profile: Profile, tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=f"9 plans are too few.*measure {FEWEST_PLANS} at least"):
        run(profile, tmp_path / "out", RecalibrationSettings(plans=FEWEST_PLANS - 1))
    assert not (tmp_path / "out").exists()


def test_a_directory_in_use_is_named_and_left_alone(profile: Profile, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "diary.txt").write_text("mine")
    with pytest.raises(ProfileError, match=f"{output} already exists and is not empty; choose another"):
        run(profile, output)
    assert contents(output) == {"diary.txt": b"mine"}


def test_a_file_where_the_directory_should_be_is_named_and_left_alone(
    profile: Profile, tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ProfileError, match=f"{tmp_path / 'out'} already exists"):
        run(profile, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_an_empty_directory_will_do(profile: Profile, calibrated: Profile, tmp_path: Path) -> None:
    run(profile, tmp_path)
    assert contents(tmp_path) == contents(calibrated.path)


def test_a_profile_is_not_calibrated_in_its_own_place(profile: Profile) -> None:
    before = contents(profile.path)
    with pytest.raises(ProfileError, match=f"{profile.path} already holds another profile"):
        run(profile, profile.path)
    assert contents(profile.path) == before


def test_another_calibrated_profile_is_not_overwritten(profile: Profile, calibrated: Profile) -> None:
    before = contents(calibrated.path)
    with pytest.raises(ProfileError, match=f"{calibrated.path} already holds another profile"):
        run(profile, calibrated.path, OTHER)
    assert contents(calibrated.path) == before


def test_a_profile_with_one_plan_within_the_budgets_is_refused(
    model_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    """Of 8 bits only: every budget is raised to the smallest plan, and plans that are all alike have no order."""
    grid = ProfileSettings(tokens=320, bits=(8,), ranks=(0,), group_sizes=(64,), rounds=1)
    only_8 = build_profile(find_model(str(model_directory("llama"))), tmp_path / "profile", grid, silent)
    with pytest.raises(ProfileError, match="plans"):
        run(only_8, tmp_path / "out")
    assert not (tmp_path / "out" / "profile.json").exists()
