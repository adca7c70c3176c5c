"""`bitrank demo`: the whole road on the embedded model, and the report that shows it.

What lives here: which budgets, texts and checkpoints the demo looks at, and filling in the report. The steps are
those of `usecases.py`; drawing is in `report.py`.
"""

from __future__ import annotations

import pydoc_data.topics
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from allocator.plan import Plan
from api.report.report import write_report
from api.schemas import report as page
from api.services import usecases
from api.services.blocks import block_losses

if TYPE_CHECKING:
    from api.schemas.documents import FidelityAnswer
    from api.services.usecases import Evaluation
    from profiler.documents.profile import Profile
    from profiler.statistics.calibration import Progress

UNIFORM_BITS = (2, 3, 4)
"""Uniform checkpoints measured beside the plan; the plan gets the bytes of the middle one."""
SMALL_BUDGET, LARGE_BUDGET = "2.6bpw", "4.3bpw"
EVALUATION_TOKENS = 12_288
PROMPTS = ("The meaning of life", "## Summary\n\nThis RFC proposes", "It was a cold morning when")


def run_demo(output: Path, progress: Progress) -> dict[str, Any]:
    """Run the demo into `output`: profile/, plans, checkpoints/ and report.html. Repeated runs reuse the profile."""
    from profiler.sweep.run import ProfileSettings

    profile = usecases.profile_model("demo", output / "profile", ProfileSettings(), progress)
    uniform = {bits: usecases.plan_budget(profile, None, f"uniform:{bits}") for bits in UNIFORM_BITS}
    plans = {
        SMALL_BUDGET: usecases.plan_budget(profile, SMALL_BUDGET),
        "bytes of uniform 3 bits": usecases.plan_budget(profile, f"{uniform[3].total_bytes}B"),
        LARGE_BUDGET: usecases.plan_budget(profile, LARGE_BUDGET),
    }
    for label, plan in plans.items():
        plan.save(output / f"plan-{label.replace(' ', '-')}.json")
    chosen = plans["bytes of uniform 3 bits"]
    evaluations = evaluate_all(profile, chosen, uniform, output / "checkpoints", progress)
    report_path = output / "report.html"
    report = fill_report(profile, plans, evaluations)
    write_report(report_path, report)
    return {
        "profile": str(profile.path),
        "report": str(report_path),
        "evaluations": [row.model_dump() for row in report.evaluations],
    }


def evaluate_all(
    profile: Profile, chosen: Plan, uniform: dict[int, Plan], folder: Path, progress: Progress
) -> list[tuple[str, Plan, Evaluation]]:
    """Compress the plan and the uniform settings, and measure each on both texts."""
    from profiler.model.checkpoint import DEMO_PATH, find_model
    from profiler.model.layers import load_model
    from profiler.statistics.calibration import windows

    original = load_model(find_model("demo"))
    texts = {
        "text of the model's own": (DEMO_PATH / "evaluation.txt").read_text(encoding="utf-8"),
        "Python's documentation": "\n".join(pydoc_data.topics.topics.values()),
    }
    tokens = {name: windows(original, text, EVALUATION_TOKENS, name) for name, text in texts.items()}
    rows: list[tuple[str, Plan, Evaluation]] = []
    for name, plan in (("plan", chosen), *((f"uniform {bits} bits", p) for bits, p in uniform.items())):
        checkpoint = folder / name.replace(" ", "-")
        shutil.rmtree(checkpoint, ignore_errors=True)
        usecases.execute(plan, profile, checkpoint, progress)
        compressed = load_model(find_model(str(checkpoint)))
        for source, tokens_NT in tokens.items():
            prompts = PROMPTS if name == "plan" and not rows else ()
            found = usecases.evaluate_loaded(compressed, original, tokens_NT, source, progress, prompts)
            rows.append((name, plan, found))
    return rows


def fill_report(
    profile: Profile, plans: dict[str, Plan], evaluations: Sequence[tuple[str, Plan, Evaluation]]
) -> page.Report:
    menu, losses = profile.menu, block_losses(profile)
    rows = [
        page.EvaluationRow(
            text=found.text,
            name=name,
            kind="plan" if name == "plan" else "uniform",
            bits_per_weight=usecases.bits_per_weight(menu, found.tensor_bytes),
            tensor_bytes=found.tensor_bytes,
            predicted_kl=plan.predicted_kl,
            kl_nats=found.kl_nats,
            perplexity=found.perplexity,
            reference_perplexity=found.reference_perplexity,
            logits_cosine=found.logits_cosine,
            top1_agreement=found.top1_agreement,
            tokens_per_second=found.tokens_per_second,
        )
        for name, plan, found in evaluations
    ]
    first_text = rows[0].text
    measured = [
        page.MeasuredPoint(
            label=row.name,
            kind=row.kind,
            bits_per_weight=row.bits_per_weight,
            total_bytes=row.tensor_bytes,
            kl_nats=row.kl_nats,
        )
        for row in rows
        if row.text == first_text
    ]
    return page.Report(
        bitrank_version=version("bitrank"),
        model=page.ModelSummary(
            id=profile.document.model.id,
            weights_sha256=profile.document.model.weights_sha256,
            layer_count=len(menu.layers),
            compressible_weights=menu.compressible_weights,
            original_bytes=menu.original_bytes,
        ),
        fidelity_label=losses.setting,
        fidelity_source=losses.source,
        fidelity=block_fidelity(losses),
        curves=[error_curve(profile, name) for name in profile.document.layers],
        frontier=page.Frontier(
            optimal=[page.OptimalPoint(**asdict(point)) for point in usecases.frontier_points(profile)],
            uniform=[
                page.UniformPoint(
                    label=point.strategy.replace("uniform:", "") + " bits",
                    bits_per_weight=point.bits_per_weight,
                    total_bytes=point.total_bytes,
                    kl_nats=point.kl_nats,
                )
                for point in usecases.uniform_points(profile)
            ],
            measured=measured,
        ),
        plans=[plan_summary(profile, label, plan) for label, plan in plans.items()],
        evaluations=rows,
        samples=[
            page.Sample(prompt=sample.prompt, reference=sample.reference, compressed=sample.compressed)
            for _, _, found in evaluations
            for sample in found.samples
        ],
    )


def block_fidelity(losses: FidelityAnswer) -> list[page.BlockFidelity]:
    return [
        page.BlockFidelity(
            block=loss.block, kl_nats=loss.kl_nats, kl_low=loss.interval.low, kl_high=loss.interval.high
        )
        for loss in losses.blocks
    ]


def error_curve(profile: Profile, name: str) -> page.ErrorCurve:
    record = profile.document.layers[name]
    measured = [m for m in profile.measurements[name] if not m.half_width]
    fit = record.fit
    ranks = sorted({m.option.rank for m in measured})
    return page.ErrorCurve(
        layer=name,
        block=record.block,
        projection=record.projection,
        fit=page.CurveFit(
            **{key: value for key, value in asdict(fit).items() if key in page.CurveFit.model_fields}
        ),
        measured=[page.MeasuredError(**asdict(m.option), error=m.error) for m in measured],
        fitted=[
            page.FittedError(bits=bits, rank=rank, group_size=64, error=fit.error(bits, rank, 64))
            for rank in ranks
            for bits in np.arange(2, 8.01, 0.5).tolist()
        ],
    )


def plan_summary(profile: Profile, label: str, plan: Plan) -> page.PlanSummary:
    records = profile.document.layers
    return page.PlanSummary(
        label=label,
        budget_text=plan.budget.text,
        total_bytes=plan.total_bytes,
        bits_per_weight=usecases.bits_per_weight(profile.menu, plan.total_bytes),
        predicted_kl=plan.predicted_kl,
        lower_bound=plan.lower_bound,
        gap=plan.gap / plan.predicted_kl if plan.predicted_kl > 0 else 0.0,
        shadow_price_nats_per_mib=plan.shadow_price,
        warnings=plan.warnings,
        checked=plan.checked,
        layers=[
            page.PlannedLayer(
                name=name,
                block=records[name].block,
                projection=records[name].projection,
                total_bytes=layer.bytes,
                **layer.model_dump(exclude={"bytes"}),
            )
            for name, layer in plan.layers.items()
        ],
    )
