"""Why a plan is as it is, and what differs between two plans.

What lives here: the marginal reading of an optimal plan. At the shadow price λ (nats per MiB) every layer holds the
option that minimises cost + λ·size, up to the last break of the knapsack: the next better option saves less per MiB
than λ, the next worse one loses more.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from allocator.plan import MIB, Plan, PlanLayer
from api.problems import ProblemError
from api.schemas.documents import (
    Alternative,
    DiffAnswer,
    ExplanationAnswer,
    LayerChange,
    LayerExplanation,
    OptionAnswer,
)

if TYPE_CHECKING:
    from allocator.problem import LayerMenu, Menu


def explain(plan_id: str, plan: Plan, menu: Menu, pattern: str) -> ExplanationAnswer:
    """Every layer whose name matches a glob. Raises `ProblemError` (unknown-layer) when none does."""
    layers = [layer for layer in menu.layers if fnmatchcase(layer.name, pattern)]
    if not layers:
        raise ProblemError(
            "unknown-layer", f"no layer matches {pattern!r}; names look like {menu.layers[0].name!r}"
        )
    return ExplanationAnswer(
        plan=plan_id,
        shadow_price=plan.shadow_price,
        layers=[_explain_layer(layer, plan.layers[layer.name], plan.shadow_price) for layer in layers],
    )


def _explain_layer(layer: LayerMenu, chosen: PlanLayer, shadow_price: float) -> LayerExplanation:
    moves = [
        Alternative(
            option=_option(layer, index),
            bytes_change=int(layer.total_bytes[index]) - chosen.bytes,
            kl_change=float(layer.cost[index]) - chosen.cost,
            nats_per_mib=_rate(layer, index, chosen),
        )
        for index in range(len(layer.options))
    ]
    better = max(
        (move for move in moves if move.bytes_change > 0 and move.kl_change < 0),
        key=lambda move: move.nats_per_mib,
        default=None,
    )
    worse = min(
        (move for move in moves if move.bytes_change < 0), key=lambda move: move.nats_per_mib, default=None
    )
    return LayerExplanation(
        layer=layer.name,
        chosen=option_of(chosen),
        better=better,
        worse=worse,
        sentence=_sentence(chosen, better, worse, shadow_price),
    )


def _rate(layer: LayerMenu, index: int, chosen: PlanLayer) -> float:
    """Nats of KL per MiB between two options of a layer."""
    bytes_change = int(layer.total_bytes[index]) - chosen.bytes
    return (chosen.cost - float(layer.cost[index])) / bytes_change * MIB if bytes_change else 0.0


def _sentence(
    chosen: PlanLayer, better: Alternative | None, worse: Alternative | None, shadow_price: float
) -> str:
    parts = [f"A MiB is worth {shadow_price:.4g} nats per token in this plan."]
    if better is not None:
        parts.append(
            f"Going up to {_name(better.option)} would save {better.nats_per_mib:.4g} nats per MiB here."
        )
    if worse is not None:
        parts.append(f"Going down to {_name(worse.option)} would lose {worse.nats_per_mib:.4g} nats per MiB.")
    return f"The layer has {_name(option_of(chosen))}. " + " ".join(parts)


def _name(option: OptionAnswer) -> str:
    if option.bits == 16:
        return "its original weights"
    if option.bits == 0:
        return f"rank {option.rank}" + (f" in each of {option.heads} heads" if option.heads > 1 else "")
    rank = f" and rank {option.rank}" if option.rank else ""
    rotated = ", rotated" if option.rotated else ""
    return f"{option.bits} bits in groups of {option.group_size}{rank}{rotated}"


def _option(layer: LayerMenu, index: int) -> OptionAnswer:
    option = layer.options[index]
    return OptionAnswer(
        bits=option.bits,
        rank=option.rank,
        group_size=option.group_size,
        factor_bits=option.factor_bits,
        heads=option.heads,
        rotated=option.rotated,
        total_bytes=int(layer.total_bytes[index]),
        error=float(layer.error[index]),
        kl_nats=float(layer.cost[index]),
    )


def option_of(layer: PlanLayer) -> OptionAnswer:
    fields = layer.model_dump(exclude={"bytes", "cost"})
    return OptionAnswer(**fields, total_bytes=layer.bytes, kl_nats=layer.cost)


def difference(before_id: str, before: Plan, after_id: str, after: Plan) -> DiffAnswer:
    """From one plan to another of the same layers. Raises `ProblemError` (unusable) for other models."""
    if before.layers.keys() != after.layers.keys():
        raise ProblemError(
            "unusable", "the two plans are for models with different layers; compare two of one model"
        )
    changed = [
        LayerChange(
            layer=name,
            before=option_of(old),
            after=option_of(new),
            bytes_change=new.bytes - old.bytes,
            kl_change=new.cost - old.cost,
        )
        for (name, old), new in zip(
            before.layers.items(), (after.layers[name] for name in before.layers), strict=True
        )
        if old != new
    ]
    return DiffAnswer(
        before=before_id,
        after=after_id,
        bytes_change=after.total_bytes - before.total_bytes,
        kl_change=after.predicted_kl - before.predicted_kl,
        unchanged_layers=len(before.layers) - len(changed),
        changed=changed,
    )
