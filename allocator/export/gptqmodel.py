"""The quantize_config.json of GPTQModel, which quantizes the original model itself, by GPTQ, as the plan says.

The most common setting is the base; `dynamic` has the others. A key is a regular expression with the prefix `+:`
(other values) or `-:` (not quantized); GPTQModel takes the first that matches, and here at most one does. Grids with
a zero point need its checkpoint format gptq_v2.
"""

from __future__ import annotations

import json
from typing import Any

from allocator.errors import ExportError
from allocator.export.limits import refuse_ranks, refuse_tables, refuse_widths
from allocator.export.patterns import by_scheme, merged
from allocator.plan import Plan
from allocator.storage import KEEP_BITS

WIDTHS = (2, 3, 4, 8)
"""Bits that GPTQModel's kernels run on every platform."""
ADVICE = "plan again with --target gptqmodel"


def quantize_config(plan: Plan) -> str:
    """JSON. Raises `ExportError` for ranks, tables, other bits than `WIDTHS`, and when nothing is quantized."""
    refuse_tables(plan, "GPTQModel")
    refuse_ranks(plan, "GPTQModel", f"{ADVICE}, which buys no rank")
    refuse_widths(plan, "GPTQModel", WIDTHS, ADVICE)
    schemes = by_scheme(plan)
    if not schemes:
        raise ExportError(
            "the plan quantizes no layer, so there is nothing for GPTQModel to do; lower the budget"
        )
    base = max(schemes, key=lambda scheme: len(schemes[scheme]))
    dynamic: dict[str, dict[str, Any]] = {
        f"+:{pattern}$": {"bits": bits, "group_size": group_size}
        for (bits, group_size), names in schemes.items()
        if (bits, group_size) != base
        for pattern in merged(names)
    }
    kept = [name for name, layer in plan.layers.items() if layer.bits == KEEP_BITS]
    dynamic |= {f"-:{pattern}$": {} for pattern in merged(kept)}
    document = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        "bits": base[0],
        "group_size": base[1],
        "sym": False,
        "desc_act": False,
        "lm_head": False,
        "dynamic": dynamic,
    }
    return json.dumps(document, indent=2) + "\n"
