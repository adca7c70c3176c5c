"""Policies: the file's rules, which layers they reach, and the options these get."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from allocator.errors import StrategyError
from allocator.problem import LayerMenu, Menu
from allocator.storage import KEEP, Option, layer_bytes
from allocator.strategies.policy import Policy, PolicyRule, load_policy
from allocator.strategies.strategies import ByRules, choose, parse_strategy

RANKS = (8, 16, 32)
OPTIONS = (
    *(Option(bits, 0, 64, 0) for bits in (2, 3, 4)),
    *(Option(3, rank, 64, 8) for rank in RANKS),
    *(Option(0, rank, 0, 8) for rank in RANKS),
    KEEP,
)


def layer(name: str, rows: int = 64, columns: int = 64, options: tuple[Option, ...] = OPTIONS) -> LayerMenu:
    size = np.array([layer_bytes(rows, columns, o, 2 * rows * columns) for o in options])
    error = np.linspace(1, 0, len(options))
    return LayerMenu(name, rows, columns, 2 * rows * columns, options, size, error, error)


MENU = Menu(
    tuple(
        layer(f"transformer.h.{block}.{part}", *shape)
        for block in range(4)
        for part, shape in (("attn.q_proj", (64, 64)), ("mlp.c_fc", (256, 64)))
    ),
    {"wte": 1000},
)


HEADED = Menu(
    tuple(
        layer(
            f"h.0.{part}",
            16 * heads,
            64,
            (*(Option(0, r, 0, 4, heads) for r in ranks if heads > 1), *OPTIONS),
        )
        for part, heads, ranks in (("q", 4, (8, 14)), ("k", 2, (8, 14)), ("v", 2, (8, 14, 16)), ("o", 1, ()))
    ),
    {"wte": 1000},
)
"""Heads of 16 rows: four queries, two keys and values; ratios of a half, 0.875, and of the values 1."""


def options(
    policy: Policy, energies: dict[str, dict[int, float]] | None = None, menu: Menu = MENU
) -> dict[str, Option]:
    rules = policy.resolved(menu, energies or {})
    choice = choose(parse_strategy("policy", rules), menu, menu.original_bytes)
    return {layer.name: layer.options[k] for layer, k in zip(menu.layers, choice, strict=True)}


def policy(*rules: PolicyRule) -> Policy:
    return Policy(rules=rules)


def test_the_first_rule_that_matches_decides() -> None:
    found = options(
        policy(
            PolicyRule(layers=("*.mlp.*",), keep=True),
            PolicyRule(layers=("*attn*", "*mlp*"), bits=0, rank=16),
        )
    )
    assert found["transformer.h.0.mlp.c_fc"] == KEEP
    assert found["transformer.h.0.attn.q_proj"] == Option(0, 16, 0, 8)


def test_first_and_last_blocks_may_have_rules_of_their_own() -> None:
    found = options(policy(PolicyRule(first_blocks=1, last_blocks=2, bits=3, rank=32), PolicyRule(bits=2)))
    ranks = [found[f"transformer.h.{block}.attn.q_proj"].rank for block in range(4)]
    assert ranks == [32, 0, 32, 32]


@pytest.mark.parametrize(
    "rule",
    [
        PolicyRule(shape=(256, 64), bits=4),
        PolicyRule(min_weights=64 * 64 + 1, bits=4),
        PolicyRule(layers=("*.c_fc",), bits=4),
    ],
)
def test_a_rule_may_go_by_shape_size_or_name(rule: PolicyRule) -> None:
    found = options(policy(rule, PolicyRule(keep=True)))
    assert [name for name, option in found.items() if option.bits == 4] == [
        f"transformer.h.{block}.mlp.c_fc" for block in range(4)
    ]


def test_a_smaller_side_below_the_least_is_left_to_later_rules() -> None:
    assert set(options(policy(PolicyRule(min_side=65, bits=2), PolicyRule(bits=4))).values()) == {
        Option(4, 0, 64, 0)
    }


def test_an_energy_takes_the_least_rank_that_holds_it() -> None:
    held = {layer.name: {0: 0.0, 8: 0.5, 16: 0.8, 32: 0.95} for layer in MENU.layers}
    held["transformer.h.1.mlp.c_fc"] = {0: 0.0, 8: 0.9, 16: 0.95, 32: 1.0}
    found = options(policy(PolicyRule(bits=0, energy=0.8)), held)
    assert found["transformer.h.0.mlp.c_fc"].rank == 16
    assert found["transformer.h.1.mlp.c_fc"].rank == 8


def test_an_energy_that_no_profiled_rank_holds_is_refused_with_the_most_they_hold() -> None:
    held = {layer.name: dict.fromkeys((0, *RANKS), 0.7) for layer in MENU.layers}
    with pytest.raises(StrategyError, match=r"rule 1 keeps 0.99 .* keep at most 0.7; profile higher --ranks"):
        options(policy(PolicyRule(bits=0, energy=0.99)), held)


def test_a_head_ratio_gives_every_layer_with_heads_its_own_and_leaves_the_others_to_later_rules() -> None:
    found = options(
        policy(PolicyRule(bits=0, head_ratio=0.9, factor_bits=4), PolicyRule(bits=3)), menu=HEADED
    )
    assert found == {
        "h.0.q": Option(0, 14, 0, 4, heads=4),
        "h.0.k": Option(0, 14, 0, 4, heads=2),
        "h.0.v": Option(0, 14, 0, 4, heads=2),
        "h.0.o": Option(3, 0, 64, 0),
    }


@pytest.mark.parametrize(
    ("rule", "menu", "complaint"),
    [
        (PolicyRule(bits=0, head_ratio=1, factor_bits=4), HEADED, "'h.0.q', which has 0.5, 0.875 with 4-bit"),
        (
            PolicyRule(bits=0, head_ratio=0.5),
            HEADED,
            r"0.5 with 8-bit .*profile with --head-ratios 0.5 .*-bits 8",
        ),
        (PolicyRule(bits=0, head_ratio=0.5), MENU, r"none was profiled; profile with --head-ratios 0.5"),
    ],
)
def test_a_head_ratio_that_was_not_profiled_is_refused_with_those_that_were(
    rule: PolicyRule, menu: Menu, complaint: str
) -> None:
    with pytest.raises(StrategyError, match=complaint):
        options(policy(rule, PolicyRule(bits=3)), menu=menu)


def test_a_layer_without_a_rule_is_named() -> None:
    with pytest.raises(StrategyError, match="no rule covers 'transformer.h.0.mlp.c_fc'"):
        options(policy(PolicyRule(layers=("*attn*",), bits=2)))


def test_a_rank_above_the_smaller_side_is_refused() -> None:
    with pytest.raises(StrategyError, match="rank 65 .* 64 × 64 matrix; use at most 64"):
        options(policy(PolicyRule(bits=0, rank=65)))


def test_a_rank_that_was_not_profiled_is_refused_with_what_was() -> None:
    with pytest.raises(
        StrategyError, match=r"does not offer 0 bits.*rank 12 with 8-bit factors.*0 bits g0 r16/8"
    ):
        options(policy(PolicyRule(bits=0, rank=12)))


def test_a_glob_that_matches_nothing_is_told_with_the_closest_names() -> None:
    (said,) = policy(PolicyRule(layers=("transformer.h.0.atn.q_proj",), bits=2)).unmatched(MENU)
    assert said.startswith(
        "rule 1: no layer matches 'transformer.h.0.atn.q_proj'; the closest are transformer.h.0.attn.q_proj"
    )


def test_the_strategy_needs_rules() -> None:
    with pytest.raises(StrategyError, match="give a file with --policy"):
        parse_strategy("policy")
    rules = policy(PolicyRule(bits=2)).resolved(MENU, {})
    assert parse_strategy("policy", rules) == ByRules(rules)


def test_a_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text("rules:\n- {layers: ['*attn*'], bits: 0, rank: 8}\n- keep: true\n")
    assert load_policy(file) == policy(PolicyRule(layers=("*attn*",), bits=0, rank=8), PolicyRule(keep=True))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("rules: []", "malformed at rules"),
        ("rules:\n- {layers: ['*']}", "either keep or bits"),
        ("rules:\n- {bits: 3, keep: true}", "either keep or bits"),
        ("rules:\n- {bits: 0}", "needs a rank, an energy or a head_ratio"),
        ("rules:\n- {bits: 3, rank: 8, energy: 0.9}", "one of rank, energy and head_ratio"),
        ("rules:\n- {bits: 0, rank: 8, head_ratio: 0.9}", "one of rank, energy and head_ratio"),
        ("rules:\n- {bits: 3, head_ratio: 0.9}", "goes with 0 bits"),
        ("rules:\n- {bits: 0, head_ratio: 1.5}", "malformed at rules.0.head_ratio"),
        ("rules:\n- {bits: 3, ranc: 8}", "malformed at rules.0.ranc"),
        ("rules:\n- {bits: 1}", "malformed at rules.0.bits"),
        ("rules: [", "cannot read the policy"),
        ("3", "malformed at the file"),
    ],
)
def test_a_malformed_file_is_told_where(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(text)
    with pytest.raises(StrategyError, match=complaint):
        load_policy(file)


def test_a_missing_file_is_told() -> None:
    with pytest.raises(StrategyError, match="cannot read the policy"):
        load_policy(Path("nowhere.yaml"))
