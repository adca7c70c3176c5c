"""The recipe of llm-compressor, which quantizes the original model itself, by GPTQ, as the plan says.

One config group per (bits, group size); targets are `re:` patterns, which it matches from the start of a name.
"""

from __future__ import annotations

from typing import Any

import yaml  # type: ignore[import-untyped]

from allocator.export.compressed_tensors import GROUPED, config_groups
from allocator.export.limits import refuse_ranks, refuse_tables
from allocator.export.patterns import by_scheme, unquantized
from allocator.plan import Plan
from allocator.storage import KEEP_BITS

ADVICE = (
    "carry the plan out with `bitrank compress` and export that as compressed-tensors with an adapter, or plan again"
    " with --target llm-compressor, which buys no rank"
)


def recipe(plan: Plan) -> str:
    """YAML for `oneshot(recipe=…)`. Raises `ExportError` for a plan with ranks or tables."""
    refuse_tables(plan, "llm-compressor")
    refuse_ranks(plan, "llm-compressor", ADVICE)
    kept = [name for name, layer in plan.layers.items() if layer.bits == KEEP_BITS]
    modifier: dict[str, Any] = {
        "config_groups": config_groups(by_scheme(plan), GROUPED),
        "ignore": [f"re:{pattern}$" for pattern in unquantized(kept, plan.kept)],
    }
    document = {"default_stage": {"default_modifiers": {"GPTQModifier": modifier}}}
    text: str = yaml.safe_dump(document, sort_keys=False, width=1_000_000)
    return text
