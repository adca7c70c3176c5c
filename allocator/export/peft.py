"""The adapter_config.json of PEFT: the plan's L·R as one LoRA adapter that transformers, vLLM and llama.cpp read alike.

They disagree on what scales an adapter whose ranks differ: PEFT and llama.cpp take lora_alpha over each layer's rank,
vLLM over the one `r` of the file. So every layer is padded to one rank with zeros, which change nothing, and
lora_alpha equals it: the scale is 1 everywhere, and there is no rank_pattern and no alpha_pattern to misread.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from allocator.errors import ExportError
from allocator.plan import Plan


def config(plan: Plan) -> str:
    """JSON; pure low rank is no part of the adapter. Raises `ExportError` when the plan buys no rank beside bits."""
    ranks = {name: layer.rank for name, layer in plan.layers.items() if layer.rank and layer.bits}
    if not ranks:
        raise ExportError(
            "the plan buys no rank beside bits, so it has no adapter; serve the compressed-tensors checkpoint alone"
        )
    return json.dumps(adapter_config(ranks, plan.model.id), indent=2) + "\n"


def adapter_config(ranks: Mapping[str, int], base_model: str) -> dict[str, Any]:
    """ranks by layer, each above 0; base_model is where PEFT looks for the quantized model."""
    rank = max(ranks.values())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "target_modules": list(ranks),
    }
