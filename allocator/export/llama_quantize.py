"""The command that has llama.cpp's llama-quantize give every tensor the type of its planned bits.

`--tensor-type PATTERN=TYPE` takes a regular expression, searched for in the GGUF tensor's name in lower case. Some
versions follow the first match and some the last, so at most one pattern matches a tensor here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from allocator.errors import ExportError
from allocator.export.ggml import TYPES
from allocator.export.limits import refuse_widths
from allocator.export.patterns import NUMBERED, merged
from allocator.plan import Plan
from allocator.storage import KEEP_BITS

GGUF_NAMES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "qkv_proj": "attn_qkv",
    "query_key_value": "attn_qkv",
    "c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "attention.dense": "attn_output",
    "self_attn.dense": "attn_output",
    "self_attention.dense": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "gate_up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "fc1": "ffn_up",
    "fc2": "ffn_down",
    "dense_h_to_4h": "ffn_up",
    "dense_4h_to_h": "ffn_down",
}
"""GGUF's name of a projection, by the end of the name in transformers."""
WIDTHS = tuple(bits for bits in TYPES if bits != KEEP_BITS)


def command(plan: Plan) -> str:
    """A shell command with comments. Raises `ExportError` for bits without a type and names GGUF does not know."""
    refuse_widths(plan, "llama.cpp", WIDTHS, "plan again with --target llama.cpp")
    arguments = [f"--tensor-type '{pattern}={name}'" for name, pattern in tensor_types(plan)]
    lines = [
        "llama-quantize",
        " ".join(f"{option} {TYPES[bits].name}" for option, bits in table_bits(plan).items()),
        *arguments,
        "model-bf16.gguf model.gguf Q4_K_M",
    ]
    return "\n".join([*_comments(plan), " \\\n  ".join(lines), ""])


def table_bits(plan: Plan) -> dict[str, int]:
    """Bits by the option that sets them; llama.cpp takes a tied table for both."""
    bits = {role: plan.layers[name].bits for name, role in plan.tables.items()}
    tied = bits.get("tied", KEEP_BITS)
    return {
        "--token-embedding-type": bits.get("embedding", tied),
        "--output-tensor-type": bits.get("head", tied),
    }


def tensor_types(plan: Plan) -> Iterator[tuple[str, str]]:
    """(type, pattern) pairs, whose patterns no two of which match one tensor."""
    names: dict[int, list[str]] = {}
    for name, layer in plan.layers.items():
        if name not in plan.tables:
            names.setdefault(layer.bits, []).append(gguf_name(name))
    for bits, members in sorted(names.items()):
        for pattern in merged(members):
            yield TYPES[bits].name, rf"^{pattern}\.weight$"


def gguf_name(name: str) -> str:
    """`blk.3.ffn_up` for `model.layers.3.mlp.up_proj`. Raises `ExportError` where there is no such name."""
    match = NUMBERED.fullmatch(name)
    if match is not None and not re.search(r"\bexperts?\b", match["tail"]):
        parts = match["tail"].split(".")
        known = next(
            (GGUF_NAMES[end] for end in (".".join(parts[-2:]), parts[-1]) if end in GGUF_NAMES), None
        )
        if known is not None:
            return f"blk.{match['block']}.{known}"
    raise ExportError(
        f"no GGUF name is known for {name}: llama.cpp stacks experts, and names other layers its own way; choose"
        " another format"
    )


def _comments(plan: Plan) -> Iterator[str]:
    yield f"# {plan.model.id} at {plan.budget.text}: {len(plan.layers)} tensors, the rest stays at 16 bits."
    yield "# First: python convert_hf_to_gguf.py MODEL --outtype bf16 --outfile model-bf16.gguf"
    yield "# An importance matrix (llama-imatrix, then --imatrix FILE here) makes 2 and 3 bits better."
    if plan.target != "llama.cpp":
        yield "# Planned without --target llama.cpp: sizes are not llama.cpp's, and a row that 256 does not divide gets"
        yield "# another type from it."
    ranked = [layer.rank for layer in plan.layers.values() if layer.rank]
    if ranked:
        yield f"# The plan also buys rank (up to {max(ranked)}, {len(ranked)} layers), and llama-quantize makes no L·R."
        yield "# To add it:"
        yield "#   bitrank compress PLAN -o small"
        yield "#   bitrank export PLAN --format compressed-tensors --checkpoint small -o served"
        yield "#   python convert_lora_to_gguf.py served/adapter --base MODEL --outfile adapter.gguf"
        yield "#   llama-server -m model.gguf --lora adapter.gguf"
        yield "# L·R was fitted beside other codes than llama-quantize chooses: measure with and without it, or plan"
        yield "# with --target llama.cpp, which buys no rank."
