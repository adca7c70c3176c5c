"""The HTML report of a demonstration run: its data as pydantic models, and the one file that shows them.

The file opens offline: the template, the vendored scripts, `charts.js` and `charts.css` of `api/web/` are
inlined, and the data lie in a JSON block that the page reads as text. Measuring, planning and drawing live
elsewhere.
"""

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from itertools import pairwise
from math import exp, log
from operator import not_
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from allocator.atomic import write_atomically
from allocator.storage import Heads

WEB = files("api") / "web"
SCRIPTS = ("vendor/d3.min.js", "vendor/plot.umd.min.js", "charts.js")


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


@dataclass(frozen=True)
class Headline:
    """One figure at the top of the page, with the words that say what it is."""

    value: str
    name: str
    detail: str


def headlines(report: Report) -> tuple[Headline, ...]:
    """The figures at the top of the page; one that was not measured is left out."""
    plan = next((row for row in report.evaluations if row.kind == "plan"), None)
    if plan is None:
        return ()
    return tuple(
        filter(None, (_size(report, plan), _loss(plan), _against_uniform(report, plan), _prediction(plan)))
    )


def _size(report: Report, plan: EvaluationRow) -> Headline:
    before, after = report.model.original_bytes, plan.tensor_bytes
    detail = (
        f"{before / 2**20:.2f} MiB to {after / 2**20:.2f} MiB, {plan.bits_per_weight:.2f} bits per weight"
    )
    return Headline(f"{before / after:.2f}×", "smaller", detail)


def _loss(plan: EvaluationRow) -> Headline:
    detail = f"measured on {plan.text}; perplexity {plan.reference_perplexity:.2f} to {plan.perplexity:.2f}"
    return Headline(f"{plan.kl_nats:.3g}", "nats/token of KL", detail)


def _against_uniform(report: Report, plan: EvaluationRow) -> Headline | None:
    uniform_kl = uniform_kl_at(plan, report.evaluations)
    if uniform_kl is None:
        return None
    change = plan.kl_nats / uniform_kl - 1
    detail = f"measured; uniform at the same bytes loses {uniform_kl:.3g} nats/token"
    return Headline(
        f"{abs(change):.0%}", "less loss than uniform" if change <= 0 else "more loss than uniform", detail
    )


def _prediction(plan: EvaluationRow) -> Headline | None:
    if plan.predicted_kl is None or plan.kl_nats <= 0:
        return None
    detail = f"{plan.predicted_kl:.3g} nats/token predicted before any weight was compressed"
    return Headline(f"{plan.predicted_kl / plan.kl_nats:.2f}", "predicted ÷ measured", detail)


def uniform_kl_at(plan: EvaluationRow, evaluations: Sequence[EvaluationRow]) -> float | None:
    """Measured KL (nats/token) of uniform compression at the bytes of `plan` and on its text.

    Log-linear between the two nearest sizes; None where the sizes measured do not enclose the plan's.
    """
    uniform = sorted(
        (row.tensor_bytes, row.kl_nats)
        for row in evaluations
        if row.kind == "uniform" and row.text == plan.text and row.kl_nats > 0
    )
    for tensor_bytes, kl_nats in uniform:
        if tensor_bytes == plan.tensor_bytes:
            return kl_nats
    for (small, high_kl), (large, low_kl) in pairwise(uniform):
        if small < plan.tensor_bytes < large:
            share = (plan.tensor_bytes - small) / (large - small)
            return exp((1 - share) * log(high_kl) + share * log(low_kl))
    return None


def render_report(report: Report) -> str:
    """The whole page as one HTML document; the same report gives the same text."""
    data = {"headlines": [asdict(h) for h in headlines(report)], "report": report.model_dump()}
    return render_page("report.html", f"bitrank report: {report.model.id}", SCRIPTS, data)


def render_page(template_name: str, title: str, script_names: Sequence[str], data: object) -> str:
    """A template of `api/web/` with the style, these scripts and the data put into it."""
    template = (WEB / template_name).read_text(encoding="utf-8")
    scripts = [_script_source((WEB / name).read_text(encoding="utf-8")) for name in script_names]
    own = re.findall(r"<script>(.*?)</script>", template, re.DOTALL)
    parts = {
        "style": (WEB / "charts.css").read_text(encoding="utf-8").rstrip(),
        "title": html.escape(title),
        "script_hashes": " ".join(_content_hash(source) for source in [*scripts, *own]),
        "scripts": "\n".join(f"<script>{source}</script>" for source in scripts),
        "licences": html.escape(_licences()),
        "data": _json_block(data),
    }
    return re.sub(r"\{\{ (\w+) \}\}", lambda match: parts[match[1]], template)


def write_report(path: Path, report: Report) -> None:
    """Write the page to `path`, whole or not at all: a temporary name beside it, fsync, rename.

    Raises OSError, in one sentence, when the file cannot be written; an earlier report then stays as it was.
    """
    try:
        write_atomically(path, render_report(report).encode("utf-8"))
    except OSError as error:
        reason = error.strerror or "unknown reason"
        raise OSError(
            f"cannot write the report {path} ({reason}): choose a file in a writable folder"
        ) from error


def _script_source(source: str) -> str:
    """JavaScript that cannot end its element early: in strings and regular expressions \\x3C is <."""
    return re.sub(r"<(?=/script|!--)", r"\\x3C", source, flags=re.IGNORECASE)


def _content_hash(source: str) -> str:
    digest = hashlib.sha256(source.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def _json_block(value: object) -> str:
    """ASCII JSON without <, > and &, so that no text in it can be taken for markup or for a line end."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")


def _licences() -> str:
    notices = sorted(file.name for file in (WEB / "vendor").iterdir() if file.name.endswith(".LICENSE"))
    return "\n\n".join(
        f"{name.removesuffix('.LICENSE')}\n\n{(WEB / 'vendor' / name).read_text(encoding='utf-8').strip()}"
        for name in notices
    )
