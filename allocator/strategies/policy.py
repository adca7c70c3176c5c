"""Policies: rules in a file that give layers an option by name, place, shape and size, the first match winning.

What lives here: the file's form, reading it, and what its rules come to on a menu. Taking the options they name is
`strategies.policy`.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from allocator.errors import StrategyError
from allocator.problem import LayerMenu, Menu
from allocator.storage import KEEP, KEEP_BITS, Option, head_rank
from allocator.strategies.strategies import Rule

Energies = Mapping[str, Mapping[int, float]]
"""The share of a layer's squared singular values in its leading ranks, by layer and rank."""


class PolicyRule(BaseModel):
    """Which layers: `layers` (globs, any of which matches), first and last blocks, shape, smaller side, weights.
    What they get: `keep`, or bits with a rank, or bits with the least rank that holds a share `energy`, or with 0 bits
    a share `head_ratio` of the rank of every head, where layers without heads are left to later rules."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: tuple[str, ...] = ("*",)
    first_blocks: Annotated[int, Field(ge=0)] = 0
    last_blocks: Annotated[int, Field(ge=0)] = 0
    shape: tuple[int, int] | None = None
    min_side: Annotated[int, Field(ge=0)] = 0
    min_weights: Annotated[int, Field(ge=0)] = 0
    max_weights: Annotated[int, Field(ge=0)] | None = None

    keep: bool = False
    bits: Literal[0, 2, 3, 4, 5, 6, 7, 8, 16] | None = None
    rank: Annotated[int, Field(ge=0)] = 0
    energy: Annotated[float, Field(gt=0, le=1)] | None = None
    head_ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    group_size: Literal[32, 64, 128] = 64
    factor_bits: Literal[4, 8, 16] = 8

    @model_validator(mode="after")
    def _says_one_thing(self) -> PolicyRule:
        if self.keep == (self.bits is not None):
            raise ValueError("a rule has either keep or bits")
        if (self.rank > 0) + (self.energy is not None) + (self.head_ratio is not None) > 1:
            raise ValueError("a rule has one of rank, energy and head_ratio")
        if self.head_ratio is not None and self.bits != 0:
            raise ValueError("a head_ratio goes with 0 bits")
        if self.bits == 0 and not self.rank and self.energy is None and self.head_ratio is None:
            raise ValueError("a rule of 0 bits needs a rank, an energy or a head_ratio")
        return self

    def option(self, rank: int) -> Option:
        if self.keep or self.bits in (None, KEEP_BITS):
            return KEEP
        group_size, factor_bits = self.group_size if self.bits else 0, self.factor_bits if rank else 0
        return Option(self.bits or 0, rank, group_size, factor_bits)


class Policy(BaseModel):
    """The file: `rules`, first match wins."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rules: Annotated[tuple[PolicyRule, ...], Field(min_length=1)]

    @property
    def needs_energies(self) -> bool:
        return any(rule.energy is not None for rule in self.rules)

    def resolved(self, menu: Menu, energies: Energies) -> tuple[Rule, ...]:
        """Rules for single layers, in their order.

        Raises `StrategyError` where no offered rank holds the energy, or where a head ratio was not profiled.
        """
        found = []
        for number, rule in enumerate(self.rules, start=1):
            for glob in rule.layers:
                where = Rule(
                    rule.option(rule.rank),
                    glob,
                    rule.shape,
                    rule.min_weights,
                    rule.max_weights,
                    rule.min_side,
                    rule.first_blocks,
                    rule.last_blocks,
                )
                if rule.energy is not None:
                    found += self._by_energy(number, rule, where, menu, energies)
                elif rule.head_ratio is not None:
                    found += self._by_head(number, rule, where, menu)
                else:
                    found.append(where)
        return tuple(found)

    def _by_energy(
        self, number: int, rule: PolicyRule, where: Rule, menu: Menu, energies: Energies
    ) -> list[Rule]:
        assert rule.energy is not None
        found = []
        for layer in (layer for layer in menu.layers if where.matches(layer, menu)):
            offered = sorted(o.rank for o in layer.options if o == rule.option(o.rank) and o.rank)
            enough = [rank for rank in offered if energies[layer.name][rank] >= rule.energy]
            if not enough:
                most = max((energies[layer.name][rank] for rank in offered), default=0.0)
                raise StrategyError(
                    f"rule {number} keeps {rule.energy:g} of the energy of {layer.name!r}, but the ranks profiled"
                    f" keep at most {most:.3g}; profile higher --ranks or lower the energy"
                )
            found.append(Rule(rule.option(enough[0]), layer.name))
        return found

    def _by_head(self, number: int, rule: PolicyRule, where: Rule, menu: Menu) -> list[Rule]:
        assert rule.head_ratio is not None
        headed = [layer for layer in menu.layers if any(option.heads > 1 for option in layer.options)]
        if not headed:
            raise StrategyError(
                f"rule {number} asks for a head ratio of {rule.head_ratio:g}, but none was profiled; profile with"
                f" --head-ratios {rule.head_ratio:g} --factor-bits {rule.factor_bits}"
            )
        found = []
        for layer in (layer for layer in headed if where.matches(layer, menu)):
            heads = max(option.heads for option in layer.options)
            rank = head_rank(rule.head_ratio, layer.rows, layer.columns, heads)
            option = Option(0, rank, 0, rule.factor_bits, heads)
            if option not in layer.options:
                raise StrategyError(
                    f"rule {number} asks for a head ratio of {rule.head_ratio:g} with {rule.factor_bits}-bit factors"
                    f" for {layer.name!r}, which has {_head_ratios(layer)}; take one of these, or profile with"
                    f" --head-ratios {rule.head_ratio:g} --factor-bits {rule.factor_bits}"
                )
            found.append(Rule(option, layer.name))
        return found

    def unmatched(self, menu: Menu) -> list[str]:
        """One sentence for every glob that matches no layer, with the closest names."""
        names, said = [layer.name for layer in menu.layers], []
        for number, rule in enumerate(self.rules, start=1):
            for glob in rule.layers:
                if not any(fnmatchcase(name, glob) for name in names):
                    near = get_close_matches(glob, names, n=2, cutoff=0.0)
                    said.append(
                        f"rule {number}: no layer matches {glob!r}; the closest are {', '.join(near)}"
                    )
        return said


def _head_ratios(layer: LayerMenu) -> str:
    """The ratios profiled of a layer's heads, by factor bits."""
    ratios: dict[int, list[str]] = {}
    for option in layer.options:
        if option.heads > 1:
            full = min(layer.rows // option.heads, layer.columns)
            ratios.setdefault(option.factor_bits, []).append(f"{option.rank / full:.3g}")
    return ", and ".join(
        f"{', '.join(found)} with {bits}-bit factors" for bits, found in sorted(ratios.items())
    )


def load_policy(path: Path) -> Policy:
    """Read a policy from YAML or JSON. Raises `StrategyError`."""
    import yaml  # type: ignore[import-untyped]

    try:
        return Policy.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise StrategyError(f"cannot read the policy {path} ({reason}); give a YAML file of rules") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise StrategyError(f"the policy {path} is malformed at {place}: {first['msg']}") from error
