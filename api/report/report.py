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
from pathlib import Path

from allocator.atomic import write_atomically
from api.schemas.report import EvaluationRow, Report

WEB = files("api") / "web"
SCRIPTS = ("vendor/d3.min.js", "vendor/plot.umd.min.js", "charts.js")


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
