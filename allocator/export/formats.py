"""Every format a plan can be written in, by name.

What lives here: the table and the one function that reads it; each format is a file of its own beside this one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from allocator.errors import FormatError
from allocator.export import (
    compressed_tensors,
    gptqmodel,
    llama_quantize,
    llm_compressor,
    pattern_overrides,
    peft,
)
from allocator.export.limits import refuse_rotations
from allocator.plan import Plan

FormatName = Literal[
    "compressed-tensors", "gptqmodel", "llama-quantize", "llm-compressor", "pattern-overrides", "peft"
]
JSON, YAML, TEXT = "application/json", "application/yaml", "text/plain"


@dataclass(frozen=True, slots=True)
class Format:
    """How a plan is written for one tool, under which file name it is usually found."""

    media_type: str
    filename: str
    text: Callable[[Plan], str]

    def write(self, plan: Plan) -> str:
        """Raises `ExportError` where the tool cannot carry the plan out."""
        refuse_rotations(plan)
        return self.text(plan)


FORMATS: dict[FormatName, Format] = {
    "compressed-tensors": Format(JSON, "quantization_config.json", compressed_tensors.config),
    "gptqmodel": Format(JSON, "quantize_config.json", gptqmodel.quantize_config),
    "llama-quantize": Format(TEXT, "llama-quantize.sh", llama_quantize.command),
    "llm-compressor": Format(YAML, "recipe.yaml", llm_compressor.recipe),
    "pattern-overrides": Format(YAML, "pattern_overrides.yaml", pattern_overrides.overrides),
    "peft": Format(JSON, "adapter_config.json", peft.config),
}


def format_named(name: str) -> Format:
    """Raises `FormatError` listing the formats there are."""
    for known in get_args(FormatName):
        if name == known:
            return FORMATS[known]
    raise FormatError(f"format {name!r} is unknown; choose from {', '.join(FORMATS)}")
