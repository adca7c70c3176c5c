"""Jobs as they are submitted, stored and read: requests of every kind, the record, its events, a page of records."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from allocator.targets import TargetName

Kind = Literal["profile", "plan", "batch", "compression", "evaluation"]
State = Literal["queued", "running", "done", "failed", "cancelled"]
UNFINISHED: tuple[State, ...] = ("queued", "running")


class JobProgress(BaseModel):
    """How far a job is. `eta_seconds` is for the stage it is in, null until there is a rate to go by."""

    model_config = ConfigDict(frozen=True)

    stage: str = "waiting"
    done: int = 0
    total: int = 0
    eta_seconds: float | None = None


class JobRecord(BaseModel):
    """One job. `result` of a running batch holds the items finished so far; `error` is a problem document."""

    model_config = ConfigDict(frozen=True)

    id: str
    kind: Kind
    state: State
    request: dict[str, Any]
    result: dict[str, Any] | None
    error: dict[str, Any] | None
    progress: JobProgress
    owner: str | None
    created_at: datetime
    updated_at: datetime

    @property
    def is_finished(self) -> bool:
        return self.state not in UNFINISHED


class JobEvent(BaseModel):
    """Something that happened to a job; `sequence` counts from 1 and never goes back.

    Kinds: `queued`, `running`, `progress` (a `JobProgress`), `block` (a block swept: `measured` names its layers),
    `item` (an item of a batch), `retry`, and `done`, `failed` or `cancelled` at the end.
    """

    model_config = ConfigDict(frozen=True)

    job_id: str
    sequence: int
    kind: str
    data: dict[str, Any]
    created_at: datetime


class Page(BaseModel):
    """Jobs, newest first; `next_cursor` is null on the last page."""

    model_config = ConfigDict(frozen=True)

    jobs: list[JobRecord]
    next_cursor: str | None


class Request(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ProfileOptions(Request):
    """How to measure; a value left out is the product's own. Ranks null picks them by the model's width."""

    tokens: Annotated[int, Field(ge=3, le=10_000_000)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    bits: Annotated[tuple[int, ...], Field(min_length=1, max_length=16)] | None = None
    ranks: Annotated[tuple[int, ...], Field(min_length=1, max_length=32)] | None = None
    group_sizes: Annotated[tuple[int, ...], Field(min_length=1, max_length=8)] | None = None
    factor_bits: Annotated[tuple[int, ...], Field(min_length=1, max_length=3)] | None = None
    adaptive: bool = False
    rotations: bool = False
    head_ratios: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(max_length=32)] = ()


class ProfileJob(Request):
    """Measure a model. `directory` is for the command line alone: it overrides the catalogue's place of `model`."""

    model: str
    directory: str | None = None
    settings: ProfileOptions = ProfileOptions()


class PlanJob(ProfileJob):
    """Profile the model if that is not done yet, then plan; `verify` measures the plan beside uniform, `embeddings`
    plans embedding and output head too."""

    budget: str | None = None
    strategy: str = "optimal"
    constraints: dict[str, Any] | None = None
    target: TargetName | None = None
    verify: bool = False
    embeddings: bool = False


class BatchEntry(ProfileJob):
    """One model under several budgets."""

    budgets: Annotated[tuple[str, ...], Field(min_length=1, max_length=1_000)]
    strategy: str = "optimal"
    constraints: dict[str, Any] | None = None
    target: TargetName | None = None
    embeddings: bool = False


class BatchJob(Request):
    """Every model under each of its budgets; an item is one budget of one entry, numbered through."""

    jobs: Annotated[tuple[BatchEntry, ...], Field(min_length=1, max_length=1_000)]

    @property
    def item_count(self) -> int:
        return sum(len(entry.budgets) for entry in self.jobs)


class CompressionJob(Request):
    """Carry a stored plan out into `<data_dir>/checkpoints/<plan>/`."""

    plan: str


class EvaluationJob(Request):
    """Measure a plan's checkpoint (made first where it is missing) against the original, on sampled text."""

    plan: str
    tokens: Annotated[int, Field(ge=1, le=10_000_000)] = 32_768


JobRequest = ProfileJob | PlanJob | BatchJob | CompressionJob | EvaluationJob
REQUESTS: dict[Kind, type[JobRequest]] = {
    "profile": ProfileJob,
    "plan": PlanJob,
    "batch": BatchJob,
    "compression": CompressionJob,
    "evaluation": EvaluationJob,
}
