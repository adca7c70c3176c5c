"""The plan: budgets checked against a menu, bytes that add up, a certificate, and a file that survives."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from allocator.budget import parse_budget
from allocator.errors import BudgetAboveOriginalError, InfeasibleError, PlanError
from allocator.plan import Plan, PlanBudget, PlanLayer, PlanModel, budget_bytes, load_plan
from allocator.planner import Planner
from allocator.problem import LayerMenu, Menu
from allocator.storage import KEEP, Option, layer_bytes


def layer_menu(name: str, rows: int, columns: int, sensitivity: float) -> LayerMenu:
    options = (*(Option(bits, 0, 64, 0) for bits in (2, 3, 4, 5, 6, 8)), KEEP)
    size = np.array([layer_bytes(rows, columns, option, 2 * rows * columns) for option in options])
    error = np.array([0.1 * 4.0 ** -(option.bits - 2) for option in options[:-1]] + [0.0])
    return LayerMenu(name, rows, columns, 2 * rows * columns, options, size, error, error * sensitivity)


@pytest.fixture(scope="module")
def menu() -> Menu:
    layers = tuple(layer_menu(f"block.{i}", 64 + 32 * i, 200, 1 / (1 + i)) for i in range(6))
    return Menu(layers, {"embedding": 30_001, "norm": 400})


def plan_at(menu: Menu, text: str) -> Plan:
    planner = Planner(menu, PlanModel(id="m", revision=None, weights_sha256="w"), "p", (0.8, 1.25))
    total = budget_bytes(menu, parse_budget(text))
    bound = planner.optimum(total)
    return planner.plan(
        bound.choice, budget=PlanBudget(text=text, bytes=total), bound=bound, strategy="optimal"
    )


@pytest.mark.parametrize("text", ["2.7bpw", "3.3bpw", "4.3bpw", "45%", "100KB"])
def test_total_bytes_are_kept_and_chosen_bytes_and_fit_the_budget(menu: Menu, text: str) -> None:
    plan = plan_at(menu, text)
    assert plan.total_bytes == sum(menu.kept.values()) + sum(layer.bytes for layer in plan.layers.values())
    assert plan.total_bytes == menu.kept_bytes + plan.compressible_bytes
    assert plan.total_bytes <= plan.budget.bytes


def test_every_layer_has_an_option_of_its_menu_with_its_bytes_error_and_cost(menu: Menu) -> None:
    plan = plan_at(menu, "3.3bpw")
    assert list(plan.layers) == [layer.name for layer in menu.layers]
    for layer in menu.layers:
        planned = plan.layers[layer.name]
        index = layer.options.index(planned.option)
        expected = (layer.total_bytes[index], layer.error[index], layer.cost[index])
        assert (planned.bytes, planned.error, planned.cost) == expected


def test_certificate_encloses_the_prediction(menu: Menu) -> None:
    plan = plan_at(menu, "3.3bpw")
    assert plan.predicted_kl == pytest.approx(sum(layer.cost for layer in plan.layers.values()))
    assert plan.lower_bound <= plan.predicted_kl + 1e-12
    assert plan.gap == pytest.approx(plan.predicted_kl - plan.lower_bound, abs=1e-12)
    assert plan.shadow_price > 0
    assert plan.predicted_kl_interval == pytest.approx((0.8 * plan.predicted_kl, 1.25 * plan.predicted_kl))


def test_shadow_price_is_what_another_mebibyte_would_save(menu: Menu) -> None:
    plan, richer = plan_at(menu, "3.3bpw"), plan_at(menu, "3.5bpw")
    saved = (plan.predicted_kl - richer.predicted_kl) / (richer.total_bytes - plan.total_bytes) * 2**20
    assert plan.shadow_price == pytest.approx(saved, rel=0.5)


def test_a_larger_budget_never_predicts_more_loss(menu: Menu) -> None:
    costs = [plan_at(menu, f"{bits}bpw").predicted_kl for bits in (2.7, 3, 3.3, 4.3, 6, 9)]
    assert costs == sorted(costs, reverse=True)


@given(st.decimals(min_value="0.1", max_value="2", places=2))
def test_an_infeasible_budget_names_sizes_that_are_feasible(menu: Menu, bits: str) -> None:
    with pytest.raises(InfeasibleError) as caught:
        budget_bytes(menu, parse_budget(f"{bits}bpw"))
    suggested = re.findall(r"[\d.]+(?:MiB|%|bpw)", str(caught.value).split("takes")[1])
    assert len(suggested) == 3
    for text in [*suggested, f"{caught.value.smallest_bytes}B"]:
        assert budget_bytes(menu, parse_budget(text)) >= caught.value.smallest_bytes
    with pytest.raises(InfeasibleError):
        budget_bytes(menu, parse_budget(f"{caught.value.smallest_bytes - 1}B"))


def test_a_budget_above_the_original_is_refused(menu: Menu) -> None:
    assert budget_bytes(menu, parse_budget("100%")) == menu.original_bytes
    with pytest.raises(BudgetAboveOriginalError, match="nothing needs compressing"):
        budget_bytes(menu, parse_budget(f"{menu.original_bytes + 1}B"))


def test_a_plan_survives_its_file(menu: Menu, tmp_path: Path) -> None:
    plan = plan_at(menu, "3.3bpw")
    plan.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_the_file_has_the_fields_of_the_contract(menu: Menu, tmp_path: Path) -> None:
    plan_at(menu, "45%").save(tmp_path / "plan.json")
    document = json.loads((tmp_path / "plan.json").read_text())
    assert set(document) == {
        "schema_version", "model", "profile_sha256", "budget", "total_bytes", "predicted_kl",
        "predicted_kl_interval", "lower_bound", "gap", "shadow_price", "strategy", "target", "layers", "kept",
        "verification",
    }  # fmt: skip
    assert set(document["model"]) == {"id", "revision", "weights_sha256"}
    assert document["budget"] == {"text": "45%", "bytes": int(0.45 * (30_401 + 2 * 200 * 864))}
    assert set(document["layers"]["block.0"]) == {
        "bits", "rank", "group_size", "factor_bits", "bytes", "error", "cost"
    }  # fmt: skip


def test_only_a_rotated_layer_says_so_in_the_file(menu: Menu, tmp_path: Path) -> None:
    plan = plan_at(menu, "3.3bpw")
    first, *others = plan.layers
    turned = plan.layers[first].model_copy(update={"rotated": True})
    plan = plan.model_copy(update={"layers": plan.layers | {first: turned}})
    plan.save(tmp_path / "plan.json")
    written = json.loads((tmp_path / "plan.json").read_text())["layers"]
    assert written[first]["rotated"] is True and not any("rotated" in written[name] for name in others)
    assert load_plan(tmp_path / "plan.json") == plan
    assert plan.layers[first].option.rotated and not plan.layers[others[0]].option.rotated


def test_heads_are_in_the_file_of_the_layers_that_have_them_alone(menu: Menu, tmp_path: Path) -> None:
    plan = plan_at(menu, "45%")
    headed = PlanLayer(**asdict(Option(0, 8, 0, 4, heads=4)), bytes=1, error=0.0, cost=0.0)
    plan = plan.model_copy(update={"layers": {**plan.layers, "block.1": headed}})
    plan.save(tmp_path / "plan.json")
    layers = json.loads((tmp_path / "plan.json").read_text())["layers"]
    assert {name: layer["heads"] for name, layer in layers.items() if "heads" in layer} == {"block.1": 4}
    assert load_plan(tmp_path / "plan.json").layers["block.1"].option == Option(0, 8, 0, 4, heads=4)
    assert load_plan(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    ("damage", "complaint"), [({"heads": 4}, "4 heads go with 0 bits"), ({"heads": 0}, "heads")]
)
def test_heads_beside_bits_are_refused(
    menu: Menu, tmp_path: Path, damage: dict[str, int], complaint: str
) -> None:
    plan_at(menu, "45%").save(tmp_path / "plan.json")
    document = json.loads((tmp_path / "plan.json").read_text())
    document["layers"]["block.0"] |= damage
    (tmp_path / "plan.json").write_text(json.dumps(document))
    with pytest.raises(PlanError, match=complaint):
        load_plan(tmp_path / "plan.json")


def test_one_plan_has_one_file(menu: Menu, tmp_path: Path) -> None:
    for name in ("first.json", "second.json"):
        plan_at(menu, "3.3bpw").save(tmp_path / name)
    assert (tmp_path / "first.json").read_bytes() == (tmp_path / "second.json").read_bytes()


def test_a_plan_cannot_be_changed_in_place(menu: Menu) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        plan_at(menu, "3.3bpw").total_bytes = 1  # type: ignore[misc]


@pytest.mark.parametrize("text", ["", "nonsense", "[]", "{}", '{"schema_version": 1}', "\udcff"])
def test_what_is_not_a_plan_is_refused_in_one_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(PlanError, match="plan") as caught:
        load_plan(tmp_path / "plan.json")
    assert "\n" not in str(caught.value)


def test_a_missing_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot read the plan"):
        load_plan(tmp_path / "plan.json")


def edited(menu: Menu, folder: Path, **changes: object) -> Path:
    document = json.loads(plan_at(menu, "3.3bpw").model_dump_json()) | changes
    (folder / "plan.json").write_text(json.dumps(document))
    return folder / "plan.json"


def test_a_plan_of_a_newer_schema_asks_for_an_upgrade(menu: Menu, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="plan schema 2, this version reads up to 1; upgrade bitrank"):
        load_plan(edited(menu, tmp_path, schema_version=2))


def test_a_newer_schema_is_recognized_even_when_it_has_other_fields(menu: Menu, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="upgrade bitrank"):
        load_plan(edited(menu, tmp_path, schema_version=2, invention=1, kept=[]))
