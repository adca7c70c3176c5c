"""The `pattern_overrides` of CALDERA-style tools: globs that set bits, rank, group size and factor bits.

Read from top to bottom, a later pattern overrides an earlier one, value by value: everything, then projections whose
layers agree over all blocks, then blocks whose layers agree, then single layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import escape

import yaml  # type: ignore[import-untyped]

from allocator.export.limits import refuse_heads, refuse_tables
from allocator.export.patterns import NUMBERED
from allocator.plan import Plan
from allocator.storage import Option

Values = dict[str, int]
KEYS = ("bits", "rank", "group_size", "factor_bits")


def overrides(plan: Plan) -> str:
    """YAML, one mapping `pattern_overrides`. Raises `ExportError` for tables, or where heads have their own factors."""
    refuse_tables(plan, "a tool that takes pattern overrides")
    refuse_heads(plan, "a pattern override", "plan without head-wise options: profile without --head-ratios")
    found = pattern_overrides({name: layer.option for name, layer in plan.layers.items()})
    text: str = yaml.safe_dump(
        {"pattern_overrides": found}, sort_keys=False, default_flow_style=None, width=1_000_000
    )
    return text


@dataclass(frozen=True, slots=True)
class Glob:
    """`head*tail`, and the layers that suggested it."""

    head: str
    tail: str
    members: Sequence[str]

    def matches(self, name: str) -> bool:
        long_enough = len(name) >= len(self.head) + len(self.tail)
        return long_enough and name.startswith(self.head) and name.endswith(self.tail)

    def __str__(self) -> str:
        return f"{escape(self.head)}*{escape(self.tail)}"


def pattern_overrides(options: Mapping[str, Option]) -> dict[str, Values]:
    """Values by glob. Applied in order to the names in `options`, they give back exactly `options`."""
    wanted = {name: {key: getattr(option, key) for key in KEYS} for name, option in options.items()}
    common = {
        key: Counter(values[key] for values in wanted.values()).most_common(1)[0][0]
        for key in next(iter(wanted.values()), {})
    }
    found = {"*": common} if common else {}
    told = {name: dict(common) for name in wanted}
    for glob in [*_projections(wanted), *_blocks(wanted)]:
        values = _agreed(glob.members, wanted)
        news = {k: v for k, v in values.items() if any(told[name][k] != v for name in glob.members)}
        if not news:
            continue
        found[str(glob)] = news
        for name in filter(glob.matches, told):
            told[name] |= news
    for name, values in wanted.items():
        if told[name] != values:
            found[escape(name)] = {k: v for k, v in values.items() if told[name][k] != v}
    return found


def _agreed(names: Sequence[str], wanted: Mapping[str, Values]) -> Values:
    """The values that all these layers want."""
    first = wanted[names[0]]
    return {key: value for key, value in first.items() if all(wanted[name][key] == value for name in names)}


def _projections(names: Mapping[str, Values]) -> Iterator[Glob]:
    """`model.layers.*.mlp.up_proj`, in the order of their first layers."""
    members: dict[tuple[str, str], list[str]] = {}
    for name in names:
        if match := NUMBERED.fullmatch(name):
            members.setdefault((match["head"], f".{match['tail']}"), []).append(name)
    return (Glob(head, tail, layers) for (head, tail), layers in members.items() if len(layers) > 1)


def _blocks(names: Mapping[str, Values]) -> Iterator[Glob]:
    """`model.layers.27.*`, in the order of their first layers."""
    members: dict[str, list[str]] = {}
    for name in names:
        if match := NUMBERED.fullmatch(name):
            members.setdefault(f"{match['head']}{match['block']}.", []).append(name)
    return (Glob(head, "", layers) for head, layers in members.items() if len(layers) > 1)
