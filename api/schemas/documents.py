"""What goes over HTTP: requests and answers as pydantic models. The plan itself is `allocator.plan.Plan`.

What lives here: shapes and bounds only. KL is in nats per token everywhere, errors are relative squared output errors.
"""

from __future__ import annotations

from datetime import datetime
from operator import not_
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from allocator.constraints.rules import Ban, BitsRange, Constraints, Pattern, Pin, QualityFloor
from allocator.storage import Heads
from allocator.targets import TargetName
from api.schemas.report import CurveFit, MeasuredError, OptimalPoint, UniformPoint
from profiler.documents.sidecar import CliffDocument, FidelityDocument, SpectrumDocument

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
MODEL_PATTERN = rf"^{NAME}(/{NAME})?$"

PLAN_ID = r"^[0-9a-f]{32}$"
PROFILE_ID = r"^[0-9a-f]{64}$"

ModelName = Annotated[
    str,
    Field(
        max_length=193,
        pattern=MODEL_PATTERN,
        description="'demo', a name under a model root or a hub id.",
        examples=["demo"],
    ),
]
BudgetText = Annotated[
    str,
    Field(
        min_length=2,
        max_length=64,
        description="Bytes on disk, a share of the original or bits per compressible weight.",
        examples=["3.25bpw", "25%", "700MiB"],
    ),
]
StrategyText = Annotated[
    str,
    Field(
        max_length=64,
        description="optimal, uniform:BITS[:rRANK][:gGROUP][:rotated], progressive[:fall|:rise], or a recipe: ultra.",
        examples=["optimal", "uniform:3", "uniform:3:r64"],
    ),
]
Target = Annotated[
    TargetName, Field(description="The runtime that will serve the model; only what it executes is planned.")
]
Glob = Annotated[str, Field(min_length=1, max_length=200, examples=["*.mlp.*"])]
Bits = Annotated[int, Field(ge=0, le=16)]
Finite = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Request(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Answer(BaseModel):
    model_config = ConfigDict(frozen=True)


class OptionRule(Request):
    """Layers by glob, and options by the values given; a value left out is any value."""

    layers: Glob
    bits: Bits | None = None
    rank: Annotated[int, Field(ge=0, le=65_536)] | None = None
    group_size: Annotated[int, Field(ge=0, le=65_536)] | None = None
    heads: Annotated[int, Field(ge=1, le=65_536)] | None = None
    rotated: bool | None = None

    @property
    def pattern(self) -> Pattern:
        return Pattern(self.bits, self.rank, self.group_size, heads=self.heads, rotated=self.rotated)


class BitsRule(Request):
    """Layers by glob have at least `min_bits` and at most `max_bits`."""

    layers: Glob = "*"
    min_bits: Bits = 0
    max_bits: Bits = 16


class FloorRule(Request):
    """Layers by glob have at most this error, and each at most this predicted KL (nats/token)."""

    layers: Glob = "*"
    max_error: Finite | None = None
    max_kl_nats: Finite | None = None


class PlanConstraints(Request):
    """What the plan must respect besides its budget."""

    pins: tuple[OptionRule, ...] = Field((), max_length=64)
    bans: tuple[OptionRule, ...] = Field((), max_length=64)
    bits: tuple[BitsRule, ...] = Field((), max_length=64)
    floors: tuple[FloorRule, ...] = Field((), max_length=64)
    ties: tuple[tuple[Glob, ...], ...] = Field(
        (), max_length=64, description="Globs whose layers share bits."
    )
    tie_fused: bool = Field(False, description="Layers that runtimes fuse (q/k/v, gate/up) share bits.")

    def rules(self) -> Constraints:
        infinity = float("inf")
        return Constraints(
            ties=self.ties,
            auto_ties=self.tie_fused,
            pins=tuple(Pin(rule.layers, rule.pattern) for rule in self.pins),
            bans=tuple(Ban(rule.layers, rule.pattern) for rule in self.bans),
            bits=tuple(BitsRange(rule.min_bits, rule.max_bits, rule.layers) for rule in self.bits),
            floors=tuple(
                QualityFloor(
                    rule.layers,
                    infinity if rule.max_error is None else rule.max_error,
                    infinity if rule.max_kl_nats is None else rule.max_kl_nats,
                )
                for rule in self.floors
            ),
        )


EMBEDDINGS = "Decide on the input embedding and the output head too: 8, 6, 4 or 16 bits."
Embeddings = Annotated[bool, Field(description=EMBEDDINGS)]


class PlanRequest(Request):
    """A model and a budget. A uniform strategy has a size of its own and needs no budget."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "demo", "budget": "3.25bpw"}]}, frozen=True, extra="forbid"
    )

    model: ModelName
    budget: BudgetText | None = None
    strategy: StrategyText = "optimal"
    constraints: PlanConstraints | None = None
    target: Target | None = None
    verify: Annotated[
        bool, Field(description="Measure the plan beside uniform at the same bytes; always a job.")
    ] = False
    embeddings: Embeddings = False


class ProfileSettingsRequest(Request):
    """How to measure; a value left out is the product's own. Ranks null picks them by the model's width."""

    tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    bits: Annotated[tuple[Literal[2, 3, 4, 5, 6, 8], ...], Field(min_length=1, max_length=6)] | None = None
    ranks: (
        Annotated[tuple[Annotated[int, Field(ge=0, le=4096)], ...], Field(min_length=1, max_length=16)] | None
    ) = None
    group_sizes: Annotated[tuple[Literal[32, 64, 128], ...], Field(min_length=1, max_length=3)] | None = None
    factor_bits: Annotated[tuple[Literal[4, 8, 16], ...], Field(min_length=1, max_length=3)] | None = None
    adaptive: Annotated[
        bool, Field(description="Measure a few options of every layer and predict those that it can.")
    ] = False
    rotations: Annotated[bool, Field(description="Measure options at rank 0 of rotated inputs too.")] = False
    head_ratios: Annotated[
        tuple[Annotated[float, Field(gt=0, le=1)], ...],
        Field(
            max_length=16,
            description="Shares of a head's full rank: low rank alone for every q, k and v head.",
        ),
    ] = ()


class ProfileRequest(Request):
    """A model to measure."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "demo"}]}, frozen=True, extra="forbid"
    )

    model: ModelName
    settings: ProfileSettingsRequest = ProfileSettingsRequest()


class BatchEntry(Request):
    """One model under several budgets."""

    model: ModelName
    budgets: Annotated[tuple[BudgetText, ...], Field(min_length=1, max_length=1_000)]
    strategy: StrategyText = "optimal"
    constraints: PlanConstraints | None = None
    target: Target | None = None
    embeddings: Embeddings = False
    settings: ProfileSettingsRequest = ProfileSettingsRequest()


class BatchRequest(Request):
    """Models and budgets; an item is one budget of one model."""

    jobs: Annotated[tuple[BatchEntry, ...], Field(min_length=1, max_length=1_000)]


class CompressionRequest(Request):
    """A plan to carry out."""

    plan: Annotated[str, Field(pattern=PLAN_ID, examples=["0" * 32])]


class EvaluationRequest(Request):
    """A plan whose checkpoint is to be measured, and on how many tokens at most."""

    plan: Annotated[str, Field(pattern=PLAN_ID, examples=["0" * 32])]
    tokens: Annotated[int, Field(ge=1, le=1_000_000)] = 32_768


class EvaluationAnswer(Answer):
    """One measurement. KL in nats/token; `predicted_kl` is the plan's."""

    id: str
    plan_id: str | None
    model: str
    reference: str
    predicted_kl: float | None
    measured_kl: float
    result: dict[str, Any]
    created_at: datetime


class EvaluationList(Answer):
    evaluations: list[EvaluationAnswer]


class Interval(Answer):
    low: float
    high: float


class ProfileSummary(Answer):
    """A profile in a list. `smallest_bytes` is the least budget that can be planned."""

    id: str
    model: str
    weights_sha256: str
    layer_count: int
    original_bytes: int
    smallest_bytes: int
    created_at: datetime


class ProfilePage(Answer):
    """Newest first; `next_cursor` is null on the last page. `models` may be profiled."""

    profiles: list[ProfileSummary]
    next_cursor: str | None
    models: list[str]


class ProfileLayer(Answer):
    """One weight matrix; `sensitivity` is calibrated, nats of KL per unit of error."""

    name: str
    block: int
    projection: str
    rows: int
    columns: int
    original_bytes: int
    sensitivity: float
    option_count: int
    r_squared: float


class TablesAnswer(Answer):
    """What bits per weight count where embedding and output head are decided on too."""

    names: list[str]
    compressible_weights: int
    kept_bytes: int


class ProfileAnswer(ProfileSummary):
    """A profile: what was measured, how, and how well the prediction held where it was checked."""

    architecture: str
    calibration: str
    calibration_tokens: int
    compressible_weights: int
    kept_bytes: int
    gain: float = Field(description="Measured over predicted KL on the probes, already in every prediction.")
    interval_factors: tuple[float, float] = Field(
        description="Ends of the 90 % prediction interval, as factors."
    )
    layers: list[ProfileLayer]
    tables: TablesAnswer | None = Field(
        None, description="What a plan with `embeddings` counts; null where no table was measured."
    )


class PredictedError(Answer):
    """The fitted error at any bits and rank; the interval is the fit's worst ratio on measured points."""

    bits: float
    rank: float
    group_size: int
    error: float
    interval: Interval
    kl_nats: float


class LayerCurve(Answer):
    """E(b, r) of one layer: parameters, what was measured, what is predicted."""

    layer: str
    block: int
    projection: str
    fit: CurveFit
    measured: list[MeasuredError]
    predicted: list[PredictedError]


class CurvesAnswer(Answer):
    profile: str
    curves: list[LayerCurve]


class FrontierAnswer(Answer):
    """Every breakpoint of the budget-loss frontier, smallest first, and the uniform settings measured."""

    profile: str
    optimal: list[OptimalPoint]
    uniform: list[UniformPoint]


class BlockLoss(Answer):
    """KL (nats/token) when this block alone is compressed, with its 90 % interval."""

    block: int
    kl_nats: float
    interval: Interval


class FidelityAnswer(Answer):
    """Where the loss comes from. Without a measurement, losses are predicted and `measured` is null."""

    profile: str
    source: Literal["measured", "predicted"]
    setting: str = Field(description="How each block is compressed alone.", examples=["3 bits, group 64"])
    blocks: list[BlockLoss]
    measured: FidelityDocument | None = Field(
        description="Every measure of every block with its interval, tier and outliers, and tests for a U shape."
    )


class SpectrumAnswer(Answer):
    """Energy by layer and head, and the measured quality cliff where `bitrank cliff` has written it."""

    profile: str
    spectrum: SpectrumDocument
    cliff: CliffDocument | None


class OptionAnswer(Answer):
    bits: int
    rank: int
    group_size: int
    factor_bits: int
    heads: Heads = 1
    rotated: bool = Field(False, exclude_if=not_)
    total_bytes: int
    error: float
    kl_nats: float


class Alternative(Answer):
    """Another option of the layer. `nats_per_mib` is what a MiB saves (or its loss costs) on the way there."""

    option: OptionAnswer
    bytes_change: int
    kl_change: float
    nats_per_mib: float


class LayerExplanation(Answer):
    """Why a layer got its option: at the shadow price, a better one saves less than its bytes are worth."""

    layer: str
    chosen: OptionAnswer
    better: Alternative | None = Field(description="The next larger option worth most; null at the top.")
    worse: Alternative | None = Field(
        description="The next smaller option that costs least; null at the bottom."
    )
    sentence: str


class ExplanationAnswer(Answer):
    plan: str
    shadow_price: float = Field(description="Nats per token that one more MiB would save.")
    layers: list[LayerExplanation]


class LayerChange(Answer):
    layer: str
    before: OptionAnswer
    after: OptionAnswer
    bytes_change: int
    kl_change: float


class DiffAnswer(Answer):
    """From plan `before` to plan `after`; layers that are the same are left out."""

    before: str
    after: str
    bytes_change: int
    kl_change: float
    unchanged_layers: int
    changed: list[LayerChange]


class Health(Answer):
    status: Literal["ok"] = "ok"
