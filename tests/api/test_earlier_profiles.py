"""Profiles of earlier versions, which have no weights of their tokens: planned from as before, with a warning."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from command_line import CommandLine
from road import Road
from safetensors.torch import load_file
from service_process import ServiceProcess

from allocator.plan import Plan, load_plan
from api.jobs.tasks import Executor, Reporter, Tasks, planned
from api.schemas.jobs import PlanJob, ProfileOptions
from api.services.demo import plan_summary
from api.services.kvcache import plan_jointly
from api.services.usecases import plan_budget
from api.settings import Settings
from api.storage.database import Database, open_database
from api.storage.profiles import ProfileStore
from profiler.documents.profile import TOKEN_WEIGHTS, load_profile
from profiler.statistics.calibration import silent

BUDGET = "3.2bpw"
SAID = "prices with the means of gradients and activations apart"


@pytest.fixture
def earlier(road: Road, tmp_path: Path) -> Path:
    """The road's profile as an earlier version left it."""
    copy = tmp_path / "earlier"
    shutil.copytree(road.profile, copy)
    (copy / TOKEN_WEIGHTS).unlink()
    return copy


@pytest.fixture
def warning(earlier: Path) -> str:
    (sentence,) = load_profile(earlier).warnings
    assert SAID in sentence and "profile the model again" in sentence
    return sentence


def test_it_is_planned_from_as_before_with_one_sentence(
    bitrank: CommandLine, road: Road, earlier: Path, warning: str
) -> None:
    outcome = bitrank("plan", earlier, "--budget", BUDGET, "--json")
    assert outcome.code == 0
    assert outcome.stderr == f"bitrank: {warning}\n"
    written = load_plan(bitrank.folder / "plan.json")
    assert json.loads(outcome.stdout)["warnings"] == list(written.warnings) == [warning]
    assert without_warnings(written) == without_warnings(load_plan(road.plan))


@pytest.mark.parametrize(
    "arguments",
    [
        ("frontier",),
        ("compare", "uniform:3"),
        ("plan", "--budget", BUDGET, "--verify"),
        ("plan", "--strategy", "ultra"),
    ],
)
def test_every_command_that_plans_says_so_once(
    bitrank: CommandLine, earlier: Path, warning: str, arguments: tuple[str, ...]
) -> None:
    command, *rest = arguments
    outcome = bitrank(command, earlier, *rest, "--json")
    assert outcome.code == 0, outcome.stderr
    assert outcome.stderr.count(f"bitrank: {warning}\n") == 1
    assert json.loads(outcome.stdout)


def test_a_plan_from_it_is_carried_out(bitrank: CommandLine, earlier: Path, road: Road, warning: str) -> None:
    """So is one that the earlier version made, which has no warnings yet."""
    for name, warnings in (("new", (warning,)), ("old", ())):
        plan = plan_budget(load_profile(earlier), BUDGET).model_copy(update={"warnings": warnings})
        plan.save(bitrank.folder / f"{name}.json")
        outcome = bitrank("compress", f"{name}.json", "--profile", earlier, "-o", name, "--json")
        assert outcome.code == 0, outcome.stderr
        assert json.loads(outcome.stdout)["tensor_bytes"] == plan.total_bytes
        assert outcome.stderr.count(f"bitrank: {warning}\n") == 1
    evaluated = bitrank("evaluate", "new", "--reference", road.model, "--text", road.text)
    assert evaluated.code == 0, evaluated.stderr
    old, new = (
        {name: tensor for file in files for name, tensor in load_file(file).items()}
        for files in (sorted((bitrank.folder / name).glob("*.safetensors")) for name in ("old", "new"))
    )
    assert old and old.keys() == new.keys()
    assert all(old[name].equal(new[name]) for name in old)


def test_calibrating_it_does_not_silence_it(bitrank: CommandLine, earlier: Path, warning: str) -> None:
    outcome = bitrank("calibrate", earlier, "-o", "out", "--plans", "10")
    assert outcome.code == 0, outcome.stderr
    assert outcome.stderr.count(f"bitrank: {warning}\n") == 1


def test_weights_and_cache_planned_together_carry_the_warning(earlier: Path, warning: str) -> None:
    plan = plan_jointly(load_profile(earlier), "90%", 64, 1, silent)
    assert plan.warnings == (warning,)


def test_a_plan_without_warnings_is_written_as_before(road: Road) -> None:
    plan = load_plan(road.plan).model_copy(update={"warnings": ()})
    assert b"warnings" not in plan.document()
    assert Plan.model_validate_json(plan.document()) == plan


def test_the_report_has_the_warning_beside_the_plan(earlier: Path, warning: str) -> None:
    profile = load_profile(earlier)
    summary = plan_summary(profile, "small", plan_budget(profile, BUDGET))
    assert summary.model_dump()["warnings"] == (warning,)


# The service


def test_the_service_answers_with_the_warning(
    earlier: Path, road: Road, tmp_path: Path, warning: str
) -> None:
    process = ServiceProcess(
        tmp_path / "data", "--profile", earlier, BITRANK_MODEL_ROOTS=str(road.folder), BITRANK_HUB="0"
    )
    try:
        made = process.client.post("/v1/plans", json={"model": "model", "budget": BUDGET})
        assert made.status_code == 201 and made.json()["warnings"] == [warning]
        assert process.client.get(made.headers["location"]).content == made.content
        profile = f"/v1/profiles/{made.json()['profile_sha256']}"
        preview = process.client.get(f"{profile}/preview", params={"budget": BUDGET})
        assert preview.content == made.content
    finally:
        process.stop()


def test_a_job_plans_with_the_warning(earlier: Path, warning: str) -> None:
    assert planned(PlanJob(model="model", budget=BUDGET), load_profile(earlier)).warnings == (warning,)


@dataclass(frozen=True)
class Machine:
    tasks: Tasks
    database: Database
    profile_id: str


@pytest.fixture
def machine(earlier: Path, road: Road, tmp_path: Path) -> Iterator[Machine]:
    """A worker that knows the earlier profile as that of `model`."""
    settings = Settings(data_dir=tmp_path / "data", model_roots=(road.folder,), hub=False)
    database = open_database(settings)
    profile_id = ProfileStore(settings, database).register(earlier, "model")
    yield Machine(Tasks(settings, database, Executor("one", "cpu", lambda _: True)), database, profile_id)
    database.close()


class Begun(Exception):
    """Profiling begins."""


def begin(*given: Any) -> None:
    raise Begun


def test_a_job_that_plans_takes_it_and_one_that_profiles_makes_another(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("profiler.sweep.run.begin_profile", begin)
    request = {"model": "model", "directory": None, "settings": ProfileOptions().model_dump(mode="json")}
    report = Reporter.__new__(Reporter)
    assert machine.tasks.begin(request, report) == {"profile_id": machine.profile_id}
    with pytest.raises(Begun):
        machine.tasks.begin(request | {"current": True}, report)


def without_warnings(plan: Plan) -> Plan:
    return plan.model_copy(update={"warnings": ()})
