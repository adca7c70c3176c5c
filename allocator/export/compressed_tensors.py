"""The `quantization_config` of compressed-tensors, which vLLM and transformers read from config.json.

What lives here: the configuration. The checkpoint that goes with it is written by `compressor/export.py`. Grids are
asymmetric, group-wise and packed; compressed-tensors packs 3, 5 and 6 bits without padding from version 0.18 on.

Two layouts of zero points, since no reader takes both. vLLM wants them packed, under the strategy `group`; transformers
(5.23, with compressed-tensors 0.20) expects them unpacked while it loads and stops. Under the strategy `block`, with
blocks of one row and `group_size` columns, they are int8 everywhere, which transformers loads and vLLM does not know.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from allocator.export.limits import refuse_tables
from allocator.export.patterns import by_scheme, merged, unquantized
from allocator.plan import Plan

METHOD = "compressed-tensors"
FORMAT = "pack-quantized"
Schemes = Mapping[tuple[int, int], Sequence[str]]
"""Layer names by (bits, group size)."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How the weights of a group of layers are described, whether their zero points are packed, and who reads that."""

    strategy: str
    packs_zero_points: bool
    reader: str

    def weights(self, bits: int, group_size: int) -> dict[str, Any]:
        size = (
            {"block_structure": [1, group_size]} if self.strategy == "block" else {"group_size": group_size}
        )
        grid = {"num_bits": bits, "type": "int", "symmetric": False, "dynamic": False}
        return grid | {"strategy": self.strategy} | size


GROUPED = Layout("group", packs_zero_points=True, reader="vLLM")
BLOCKED = Layout("block", packs_zero_points=False, reader="stock transformers")


def layout_of(plan: Plan) -> Layout:
    """What the runtime reads that the plan was made for; transformers where it names none."""
    return GROUPED if plan.target in ("vllm", "llm-compressor") else BLOCKED


def config(plan: Plan) -> str:
    """The configuration of a plan as it stands, as JSON. What its ranks add is the adapter's (`peft.py`).

    Raises `ExportError` for compressed tables.
    """
    refuse_tables(plan, "compressed-tensors")
    schemes = by_scheme(plan)
    quantized = {name for names in schemes.values() for name in names}
    rest = [name for name in plan.layers if name not in quantized]
    return json.dumps(quantization_config(schemes, rest, plan.kept, layout_of(plan)), indent=2) + "\n"


def quantization_config(
    schemes: Schemes, rest: Iterable[str], kept: Mapping[str, int], layout: Layout
) -> dict[str, Any]:
    """rest: layers stored dense; kept: bytes of all other tensors."""
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {
            name: group | {"format": FORMAT, "input_activations": None, "output_activations": None}
            for name, group in config_groups(schemes, layout).items()
        },
        "ignore": [f"re:{pattern}$" for pattern in unquantized(rest, kept)],
        "kv_cache_scheme": None,
    }


def config_groups(schemes: Schemes, layout: Layout) -> dict[str, dict[str, Any]]:
    """One group per (bits, group size), in the order given."""
    return {
        f"group_{index}": {
            "targets": [f"re:{pattern}$" for pattern in merged(names)],
            "weights": layout.weights(bits, group_size),
        }
        for index, ((bits, group_size), names) in enumerate(schemes.items())
    }
