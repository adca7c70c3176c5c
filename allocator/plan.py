"""The plan: what every layer gets, what it will cost, and the proof. Read and written as plan.json.

What lives here: the schema, its bytes, what a budget comes to, and a plan with another choice. Making plans of a menu
is in `planner.py`, solving in `knapsack.py`; carrying the plan out is the compressor's.
"""

from __future__ import annotations

from operator import not_
from os import PathLike
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from allocator.atomic import write_atomically
from allocator.budget import Budget
from allocator.constraints.rules import Constraints, relief, smallest_constrained_bytes
from allocator.errors import BudgetAboveOriginalError, InfeasibleError, PlanError
from allocator.measured_outcome import Verification
from allocator.problem import Integers, LayerMenu, Menu, Solution, TableRole
from allocator.solver.knapsack import solve
from allocator.storage import Heads, Option

SCHEMA_VERSION = 1
MIB = 2**20
Count = Annotated[int, Field(ge=0)]


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PlanModel(Frozen):
    """Which model the plan is for; `weights_sha256` is what binds, the id is for people."""

    id: str
    revision: str | None
    weights_sha256: str


class PlanBudget(Frozen):
    """The budget as written, and as bytes of the whole checkpoint."""

    text: str
    bytes: int


class PlanLayer(Frozen):
    """One layer's option, its bytes, its relative squared output error and its predicted KL (nats/token).

    `heads` is in the file only where every head has factors of its own.
    """

    bits: Count
    rank: Count
    group_size: Count
    factor_bits: Count
    heads: Heads = 1
    bytes: Count
    error: float
    cost: float
    rotated: bool = Field(default=False, exclude_if=not_)

    @model_validator(mode="after")
    def _heads_are_of_pure_low_rank(self) -> PlanLayer:
        if self.heads > 1 and self.bits:
            raise ValueError(f"{self.heads} heads go with 0 bits, not {self.bits}")
        return self

    @property
    def option(self) -> Option:
        return Option(self.bits, self.rank, self.group_size, self.factor_bits, self.heads, self.rotated)


class PlanCacheGroup(Frozen):
    """The keys or values of one layer: bits of the coefficients (16: as they are), the rank of every chunk of every
    key-value head, bytes and predicted KL (nats/token). All ranks full at 16 bits: stored plainly, without bases."""

    bits: Count
    ranks: tuple[tuple[Count, ...], ...]
    bytes: Count
    cost: float


class PlanCache(Frozen):
    """The key-value cache of `batch` sequences of `context` tokens, by `LAYER.k` and `LAYER.v`.

    total_bytes counts bases and coefficients, plain_bytes is the cache as it is; bases_sha256 is of the profile's
    `kvcache.safetensors`.
    """

    context: Count
    batch: Count
    chunk_size: Count
    bases_sha256: str
    total_bytes: Count
    plain_bytes: Count
    predicted_kl: float
    groups: dict[str, PlanCacheGroup]


class Plan(Frozen):
    """A decided allocation. `total_bytes` is, to the byte, what the compressed checkpoint's tensors take.

    With a `cache`, the budget holds both and predicted_kl is of both. `tables` says which of the layers are the
    embedding and the output head, where the plan decides on them. `warnings`: what to know of the profile it was made
    from, one sentence each; `checked`: what that profile measured of a plan near this size, in one sentence.

    predicted_kl and its 90 % interval are in nats/token; lower_bound and gap certify that no other choice from the
    same options is predicted to lose less than `predicted_kl − gap`; shadow_price is in nats per MiB.
    """

    schema_version: int
    model: PlanModel
    profile_sha256: str
    budget: PlanBudget
    total_bytes: int
    predicted_kl: float
    predicted_kl_interval: tuple[float, float]
    lower_bound: float
    gap: float
    shadow_price: float
    strategy: str
    target: str | None
    layers: dict[str, PlanLayer]
    kept: dict[str, int]
    verification: Verification | None = None
    cache: PlanCache | None = Field(default=None, exclude_if=lambda cache: cache is None)
    tables: dict[str, TableRole] = Field(default={}, exclude_if=lambda tables: not tables)
    warnings: tuple[str, ...] = Field(default=(), exclude_if=not_)
    checked: str = Field(default="", exclude_if=not_)

    @property
    def compressible_bytes(self) -> int:
        return sum(layer.bytes for layer in self.layers.values())

    def document(self) -> bytes:
        """plan.json."""
        return (self.model_dump_json(indent=1) + "\n").encode()

    def save(self, path: str | PathLike[str]) -> None:
        """Write plan.json."""
        write_atomically(Path(path), self.document())


def load_plan(path: Path) -> Plan:
    """Read plan.json; raises `PlanError` with one sentence when it is missing, malformed or newer than this code."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(
            f"cannot read the plan {path} ({error}); give a file that `bitrank plan` wrote"
        ) from error
    try:
        version = _Version.model_validate_json(text).schema_version
        if version > SCHEMA_VERSION:
            raise PlanError(
                f"{path} has plan schema {version}, this version reads up to {SCHEMA_VERSION}; upgrade bitrank"
            )
        return Plan.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or "the document"
        raise PlanError(
            f"{path} is not a bitrank plan ({where}: {problem['msg']}); give a file that `bitrank plan` wrote"
        ) from error


class _Version(BaseModel):
    """What every schema version has in common."""

    schema_version: int


def budget_bytes(menu: Menu, budget: Budget, constraints: Constraints | None = None) -> int:
    """Bytes of the whole checkpoint; raises when the budget cannot be met or asks for nothing."""
    total = budget.total_bytes(menu.original_bytes, menu.kept_bytes, menu.compressible_weights)
    smallest = menu.smallest_bytes if constraints is None else smallest_constrained_bytes(menu, constraints)
    if total < smallest:
        advice = "raise the budget" if constraints is None else relief(menu, constraints, smallest)
        raise InfeasibleError(
            f"budget {budget.text} is {total:,} bytes, but the smallest feasible plan takes {smallest:,} bytes"
            f" ({describe_bytes(menu, smallest)}); {advice}",
            smallest,
        )
    if total > menu.original_bytes:
        raise BudgetAboveOriginalError(
            f"budget {budget.text} is {total:,} bytes, more than the original checkpoint's {menu.original_bytes:,};"
            " nothing needs compressing, lower the budget"
        )
    return total


def describe_bytes(menu: Menu, total: int) -> str:
    """`total` in the other units a budget can be written in, rounded up so that it stays feasible."""
    weights_bits = 8 * (total - menu.kept_bytes) / menu.compressible_weights
    share = 100 * total / menu.original_bytes
    return f"{_up(total / MIB)}MiB, {_up(share)}% or {_up(weights_bits)}bpw"


def _up(value: float) -> str:
    return f"{int(value * 100) / 100 + 0.01:.2f}"


def optimal_choice(menu: Menu, total_bytes: int) -> Solution:
    """The solved allocation for a whole-checkpoint size."""
    return solve(menu.problem(total_bytes))


def plan_layer(layer: LayerMenu, index: int) -> PlanLayer:
    """What a plan says of a layer that takes the option `index` of its menu."""
    option = layer.options[index]
    return PlanLayer(
        bits=option.bits,
        rank=option.rank,
        group_size=option.group_size,
        factor_bits=option.factor_bits,
        heads=option.heads,
        bytes=int(layer.total_bytes[index]),
        error=float(layer.error[index]),
        cost=float(layer.cost[index]),
        rotated=option.rotated,
    )


def with_choice(plan: Plan, menu: Menu, choice: Integers, interval_factors: tuple[float, float]) -> Plan:
    """The plan with another choice at the same budget; the certificate of the optimum stays beside it."""
    layers = {
        layer.name: plan_layer(layer, index)
        for layer, index in zip(menu.layers, choice.tolist(), strict=True)
    }
    predicted_kl = sum(layer.cost for layer in layers.values())
    return plan.model_copy(
        update={
            "layers": layers,
            "total_bytes": plan.total_bytes
            - plan.compressible_bytes
            + sum(layer.bytes for layer in layers.values()),
            "predicted_kl": predicted_kl,
            "predicted_kl_interval": (predicted_kl * interval_factors[0], predicted_kl * interval_factors[1]),
            "gap": max(0.0, predicted_kl - plan.lower_bound),
        }
    )
