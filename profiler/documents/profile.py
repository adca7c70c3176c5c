"""The profile: one model measured once, from which every budget is planned.

What lives here: the files of a profile directory, and reading one as a `Menu`. Making one is in `run.py`.

    profile.json           schema version, digests, settings, versions, layers with sensitivity and fit, probes, gain
    measurements.parquet   one row per layer and option: the relative squared output error, its interval if predicted
    calibration.safetensors  the token windows, so that a plan is carried out on what it was measured on
    token_weights.safetensors  what each of their tokens weighs in the Hessian of each layer; earlier profiles have none
    tables.json            prices of the embedding and the output head, a companion; earlier profiles have none
    .work/                 while unfinished: statistics and finished layers
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from pydantic import BaseModel, ConfigDict, ValidationError

from allocator.errors import BitrankError
from allocator.measured_outcome import Verdict, verdict
from allocator.plan import Plan, PlanModel
from allocator.planner import Planner
from allocator.problem import LayerMenu, Menu
from allocator.storage import KEEP, Option, layer_bytes
from profiler.documents.sidecar import TableRecord, TablesDocument
from profiler.prediction.calibration_factor import Gain, Probe
from profiler.prediction.class_calibration import option_class
from profiler.prediction.error_model import ErrorModel
from profiler.prediction.measurement import GridSettings, Measurement

if TYPE_CHECKING:
    from torch import Tensor

    from profiler.statistics.moments import TokenWeights

SCHEMA_VERSION = 1
TOKEN_WEIGHTS = "token_weights.safetensors"
COLUMNS = ("layer", *(field.name for field in fields(Option)), "error", "half_width")
LATER_COLUMNS = {"heads": 1, "rotated": False, "half_width": 0.0}
"""Columns that a table may lack, and what they then hold."""


class ProfileError(BitrankError):
    """A profile directory cannot be used; the message says why and what to do."""


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CalibrationRecord(Frozen):
    source: str
    sha256: str
    windows: int
    probe_windows: int
    window_tokens: int
    seed: int
    text_start: tuple[int, ...] = ()
    """The tokens that every window starts with, as the tokenizer starts a text."""


class LayerRecord(Frozen):
    """What the profile knows of one layer, beside its measurements."""

    block: int
    projection: str
    rows: int
    columns: int
    original_bytes: int
    signal: float
    sensitivity: float
    tokens: int
    fit: ErrorModel
    leave_one_out: float | None = None
    correction: float = 1.0
    """What the self-check multiplies the layer's price by (`self_check.py`)."""


class MeasuredPlan(Frozen):
    """A whole plan that was measured: `predicted_kl` before any gain, both in nats/token."""

    total_bytes: int
    predicted_kl: float
    measured_kl: float
    standard_error: float


class Agreement(Frozen):
    """How the measured plans agree with predictions in which they had no part.

    median_log_ratio is of |log(predicted / measured)|, `before` under the gain of the uniform probes; misordered is
    the share of pairs of plans whose order is predicted wrongly; coverage, that of plans inside the interval.
    """

    spearman: float
    misordered: float
    median_log_ratio: float
    median_log_ratio_before: float
    coverage: float


class PartProbe(Frozen):
    """A class of matrices, or a block, alone at 3 bits: predicted KL before any gain, and measured, in nats/token."""

    kind: Literal["class", "block"]
    name: str
    predicted_kl: float
    measured_kl: float
    standard_error: float


class CheckedPlan(Frozen):
    """An optimal plan measured when the profile was made, beside uniform at the same bytes; KL in nats/token.

    predicted_kl is before any gain. uniform_kl is log-interpolated in bytes, difference what the plan's KL exceeds it
    by, with the bootstrap error of that.
    """

    total_bytes: int
    bits_per_weight: float
    predicted_kl: float
    measured_kl: float
    standard_error: float
    uniform_kl: float | None
    difference: float | None
    difference_error: float | None

    @property
    def verdict(self) -> Verdict:
        return verdict(self.difference, self.difference_error)


class SelfCheck(Frozen):
    """What a profile found when it checked itself on `windows` windows; agree: one gain fits all of its plans."""

    windows: int
    parts: tuple[PartProbe, ...]
    plans: tuple[CheckedPlan, ...]
    agree: bool


class ProfileDocument(Frozen):
    """profile.json. `plans` and their `agreement` are there once `bitrank calibrate` measured some.

    check is None where the grid lacks what the check measures, and in profiles of earlier versions. unweighted: layers
    that tokens reached but that have no gradient.
    """

    schema_version: int
    model: PlanModel
    architecture: str
    storage_dtype: str
    calibration: CalibrationRecord
    grid: GridSettings
    rounds: int
    versions: dict[str, str]
    measurements_sha256: str
    layers: dict[str, LayerRecord]
    kept: dict[str, int]
    probes: tuple[Probe, ...]
    gain: Gain
    plans: tuple[MeasuredPlan, ...] = ()
    agreement: Agreement | None = None
    check: SelfCheck | None = None
    unweighted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Profile:
    """A finished profile, as read from its directory. `tables`: those that the menu offers beside the layers."""

    path: Path
    sha256: str
    document: ProfileDocument
    measurements: dict[str, tuple[Measurement, ...]]
    tables: dict[str, TableRecord] = field(default_factory=dict)

    @cached_property
    def with_tables(self) -> Profile:
        """The same profile, its embedding and output head on the menu. Raises `ProfileError` and `CompanionError`."""
        found = TablesDocument.beside(self.path, self.document.model.weights_sha256)
        if found is None:
            raise ProfileError(
                f"profile {self.path} has no measured tables; profile it again (the same command, into the same"
                " directory, measures them alone)"
            )
        if not found.tables:
            raise ProfileError(
                f"{self.document.architecture} has no embedding or output head of a plain kind;"
                " plan without --embeddings"
            )
        return replace(self, tables=found.tables)

    def offered(self, embeddings: bool) -> Profile:
        """The profile whose menu has embedding and output head where they are asked for."""
        return self.with_tables if embeddings else self

    def offering(self, plan: Plan) -> Profile:
        """The profile whose menu has what the plan decides on."""
        return self.offered(bool(plan.tables))

    @cached_property
    def menu(self) -> Menu:
        """Every option measured or predicted and keeping the layer, with calibrated costs (nats/token)."""
        layers = [*self._layer_menus(), *(table_menu(name, table) for name, table in self.tables.items())]
        offered = {f"{name}.weight" for name in self.tables}
        return Menu(tuple(layers), {k: size for k, size in self.document.kept.items() if k not in offered})

    def _layer_menus(self) -> Iterator[LayerMenu]:
        for name, record in self.document.layers.items():
            measured = self.measurements[name]
            options = (*(m.option for m in measured), KEEP)
            sizes = [layer_bytes(record.rows, record.columns, o, record.original_bytes) for o in options]
            error = np.array([*(m.error for m in measured), 0.0])
            total_bytes = np.array(sizes, dtype=np.int64)
            yield LayerMenu(
                name,
                record.rows,
                record.columns,
                record.original_bytes,
                options,
                total_bytes,
                error,
                error * np.array([self.price(name, o.bits) for o in options]),
            )

    @cached_property
    def planner(self) -> Planner:
        return Planner(self.menu, self.document.model, self.sha256, self.interval_factors)

    def sensitivity(self, name: str) -> float:
        """Nats of KL per token that a unit of a layer's error costs, calibrated by the probes."""
        record = self.document.layers[name]
        return record.sensitivity * record.correction * self.document.gain.mean

    def price(self, name: str, bits: float) -> float:
        """`sensitivity`, with the gain of the layer's class at these bits."""
        of_class = option_class(self.document.layers[name].projection, bits)
        return self.sensitivity(name) * self.document.gain.classes.get(of_class, 1.0)

    @property
    def interval_factors(self) -> tuple[float, float]:
        """The 90 % prediction interval's ends as multiples of a prediction."""
        gain = self.document.gain
        return gain.low / gain.mean, gain.high / gain.mean

    @property
    def warnings(self) -> tuple[str, ...]:
        """What whoever plans from this profile should know, one sentence each."""
        return tuple(self._warnings())

    @property
    def warnings_once_verified(self) -> tuple[str, ...]:
        """What remains of `warnings` for a plan that was measured beside uniform."""
        check = set(self._warnings_of_check())
        return tuple(warning for warning in self.warnings if warning not in check)

    def _warnings(self) -> Iterator[str]:
        if not (self.path / TOKEN_WEIGHTS).exists():
            yield (
                "this profile was made by an earlier version, which prices with the means of gradients and activations"
                " apart; on many models that is wrong by factors, so profile the model again"
            )
            return
        yield from self._warnings_of_check()
        if self.document.check is not None and self.document.unweighted:
            yield (
                f"{len(self.document.unweighted)} matrices, the first {self.document.unweighted[0]}, have no gradient"
                " of their own, so that their share of the loss is not known"
            )

    def _warnings_of_check(self) -> Iterator[str]:
        check, gain = self.document.check, self.document.gain
        if check is None or not check.plans:
            yield (
                "this profile could not check itself, because its grid lacks 2, 3 and 4 bits at group 64 or nothing"
                " that was measured lost anything; verify its plans with --verify"
            )
            return
        for plan in check.plans:
            if plan.verdict == "worse" and self.document.agreement is None:
                yield (
                    f"when the profile checked itself, its plan of {plan.bits_per_weight:.2f} bits per weight lost"
                    f" {plan.measured_kl:.4f} nats/token and uniform {plan.uniform_kl:.4f};"
                    " run `bitrank calibrate`, or verify every plan with --verify"
                )
        if not check.agree and self.document.agreement is None:
            usable = [plan for plan in check.plans if plan.predicted_kl > 0]
            ratios = [plan.measured_kl / plan.predicted_kl / gain.mean for plan in usable]
            yield (
                f"when the profile checked itself, its plans lost {min(ratios):.2f} to {max(ratios):.2f} times what was"
                " predicted, more than the interval covers; run `bitrank calibrate`, or verify every plan with"
                " --verify"
            )

    def described_check(self, total_bytes: int) -> str:
        """What the self-check measured of its plan nearest to a size, in one sentence; empty where there is none."""
        check = self.document.check
        if check is None or not check.plans:
            return ""
        plan = min(check.plans, key=lambda plan: abs(math.log(plan.total_bytes / max(1, total_bytes))))
        uniform = "" if plan.uniform_kl is None else f", uniform at the same bytes {plan.uniform_kl:.4f}"
        return (
            f"when the profile was made, its plan of {plan.bits_per_weight:.2f} bits per weight lost"
            f" {plan.measured_kl:.4f} ± {plan.standard_error:.4f} nats/token on held-back windows of its calibration"
            f" text (predicted {plan.predicted_kl * self.document.gain.mean:.4f}){uniform};"
            " on text of another kind a plan can lose more than twice as much"
        )

    def calibration(self) -> tuple[Tensor, TokenWeights | None]:
        """The windows the statistics are over, and what their tokens weigh; `None` in a profile that has no weights."""
        return self.calibration_tokens(), self.token_weights()

    def token_weights(self) -> TokenWeights | None:
        """What every token of `calibration_tokens` weighs in the Hessian of every layer."""
        from profiler.statistics.moments import TokenWeights

        file = self.path / TOKEN_WEIGHTS
        return TokenWeights.load(file) if file.exists() else None

    def calibration_tokens(self) -> Tensor:
        """int64 (N, T): the windows the statistics are over, without those held back for probes."""
        return self._tokens()[: self.document.calibration.windows]

    def probe_tokens(self) -> Tensor:
        """int64 (N, T): the windows held back from the statistics."""
        return self._tokens()[self.document.calibration.windows :]

    def _tokens(self) -> Tensor:
        from safetensors.torch import load_file

        return load_file(self.path / "calibration.safetensors")["tokens"].long()


def table_menu(name: str, table: TableRecord) -> LayerMenu:
    """The options of a table; its costs are measured in nats and take no gain."""
    options = (*(m.option for m in table.measurements), KEEP)
    sizes = [layer_bytes(table.rows, table.columns, o, table.original_bytes) for o in options]
    return LayerMenu(
        name,
        table.rows,
        table.columns,
        table.original_bytes,
        options,
        np.array(sizes, dtype=np.int64),
        np.array([*(m.error for m in table.measurements), 0.0]),
        np.array([*(m.kl_nats for m in table.measurements), 0.0]),
        table.role,
    )


def load_profile(path: Path) -> Profile:
    """Read a profile directory; raises `ProfileError` when it is missing, unfinished, damaged or newer."""
    file = path / "profile.json"
    if not file.exists():
        hint = "it is unfinished, run the same command again to resume" if (path / ".work").exists() else ""
        raise ProfileError(
            f"{path} is not a profile directory; {hint or 'give one that `bitrank profile` wrote'}"
        )
    data = file.read_bytes()
    try:
        version = json.loads(data)["schema_version"]
        if version > SCHEMA_VERSION:
            raise ProfileError(
                f"{path} has profile schema {version}, this version reads up to {SCHEMA_VERSION}; upgrade bitrank"
            )
        document = ProfileDocument.model_validate_json(data)
        table = (path / "measurements.parquet").read_bytes()
        if hashlib.sha256(table).hexdigest() != document.measurements_sha256:
            raise ProfileError(
                f"{path}/measurements.parquet does not match profile.json; profile the model again"
            )
        # `read_table` would import pyarrow.dataset and pandas, for half a second.
        rows = parquet.ParquetFile(BytesIO(table)).read().to_pydict()
    except (ValueError, KeyError, TypeError, OSError, pa.ArrowException) as error:
        if isinstance(error, ProfileError):
            raise
        reason = str(error.errors()[0]["msg"]) if isinstance(error, ValidationError) else str(error)
        raise ProfileError(f"{path} is damaged ({reason}); profile the model again") from error
    measurements: dict[str, list[Measurement]] = {}
    for column, value in LATER_COLUMNS.items():
        rows.setdefault(column, [value] * len(rows["layer"]))
    for layer, *option, relative_error, half_width in zip(*(rows[c] for c in COLUMNS), strict=True):
        measurements.setdefault(layer, []).append(Measurement(Option(*option), relative_error, half_width))
    return Profile(
        path, hashlib.sha256(data).hexdigest(), document, {k: tuple(v) for k, v in measurements.items()}
    )
