"""What the report of a profile holds, as the page reads it."""

from __future__ import annotations

from collections.abc import Sequence
from operator import not_
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from allocator.storage import Heads


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelSummary(_Record):
    """The model before compression; `original_bytes` is every tensor byte of its checkpoint."""

    id: str
    weights_sha256: str
    layer_count: int = Field(ge=1)
    compressible_weights: int = Field(ge=1)
    original_bytes: int = Field(ge=1)


class BlockFidelity(_Record):
    """KL in nats/token when this block alone is compressed, with its interval where known."""

    block: int = Field(ge=0)
    kl_nats: float
    kl_low: float | None = None
    kl_high: float | None = None


class CurveFit(_Record):
    """Parameters of E(b, r) = c·2^(-βb)·(1+r/r₀)^(-δ)·(1-r/n)^η, fitted in log space."""

    c: float
    beta: float
    r0: float
    delta: float
    eta: float
    n: int = Field(ge=1)
    r_squared: float


class MeasuredError(_Record):
    """Relative squared output error of one option, as measured."""

    bits: int = Field(ge=0)
    rank: int = Field(ge=0)
    group_size: int = Field(ge=0)
    factor_bits: int = Field(ge=0)
    heads: Heads = 1
    rotated: bool = Field(default=False, exclude_if=not_)
    error: float


class FittedError(_Record):
    """Relative squared output error on the fitted curve; `bits` may be fractional."""

    bits: float = Field(ge=0)
    rank: int = Field(ge=0)
    group_size: int = Field(ge=1)
    error: float


class ErrorCurve(_Record):
    """The error model of one layer beside the measurements it was fitted to."""

    layer: str
    block: int = Field(ge=0)
    projection: str
    fit: CurveFit
    measured: Sequence[MeasuredError] = Field(min_length=1)
    fitted: Sequence[FittedError]


class OptimalPoint(_Record):
    """An optimal plan of the whole model; `kl_nats` is predicted, nats/token."""

    total_bytes: int = Field(ge=0)
    bits_per_weight: float = Field(ge=0)
    kl_nats: float


class UniformPoint(_Record):
    """One setting for every layer; `kl_nats` is predicted, nats/token."""

    label: str
    bits_per_weight: float = Field(ge=0)
    total_bytes: int = Field(ge=0)
    kl_nats: float


class MeasuredPoint(_Record):
    """A compressed checkpoint; `kl_nats` is measured on held-out text, nats/token."""

    label: str
    kind: Literal["plan", "uniform"]
    bits_per_weight: float = Field(ge=0)
    total_bytes: int = Field(ge=0)
    kl_nats: float


class Frontier(_Record):
    """Loss against size: optimal plans, uniform settings and what was measured."""

    optimal: Sequence[OptimalPoint] = Field(min_length=1)
    uniform: Sequence[UniformPoint]
    measured: Sequence[MeasuredPoint]


class PlannedLayer(_Record):
    """The option chosen for one layer; `error` is relative squared, `cost` predicted KL in nats/token."""

    name: str
    block: int = Field(ge=0)
    projection: str
    bits: int = Field(ge=0)
    rank: int = Field(ge=0)
    group_size: int = Field(ge=0)
    factor_bits: int = Field(ge=0)
    heads: Heads = 1
    rotated: bool = Field(default=False, exclude_if=not_)
    total_bytes: int = Field(ge=0)
    error: float
    cost: float


class PlanSummary(_Record):
    """A plan, its certificate, what its profile warns of and what it measured near this size; KL in nats/token.

    `gap` is relative to `predicted_kl`."""

    label: str
    budget_text: str
    total_bytes: int = Field(ge=0)
    bits_per_weight: float = Field(ge=0)
    predicted_kl: float
    lower_bound: float
    gap: float
    shadow_price_nats_per_mib: float
    warnings: Sequence[str] = Field(default=(), exclude_if=not_)
    checked: str = Field(default="", exclude_if=not_)
    layers: Sequence[PlannedLayer] = Field(min_length=1)


class EvaluationRow(_Record):
    """One compressed checkpoint on one text, against the original on the same windows."""

    text: str
    name: str
    kind: Literal["plan", "uniform"]
    bits_per_weight: float = Field(ge=0)
    tensor_bytes: int = Field(ge=1)
    predicted_kl: float | None
    kl_nats: float
    perplexity: float
    reference_perplexity: float
    logits_cosine: float
    top1_agreement: float
    tokens_per_second: float


class Sample(_Record):
    """One prompt continued by the original and by the compressed model."""

    prompt: str
    reference: str
    compressed: str


class Report(_Record):
    """Everything the page shows. The first `plan` among `evaluations` gives the headline figures."""

    schema_version: Literal[1] = 1
    bitrank_version: str
    model: ModelSummary
    fidelity_label: str
    fidelity_source: Literal["measured", "predicted"] = "predicted"
    fidelity: Sequence[BlockFidelity] = Field(min_length=1)
    curves: Sequence[ErrorCurve] = Field(min_length=1)
    frontier: Frontier
    plans: Sequence[PlanSummary] = Field(min_length=1)
    evaluations: Sequence[EvaluationRow] = ()
    samples: Sequence[Sample] = ()
