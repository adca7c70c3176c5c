"""Exports: what each tool reads says exactly what the plan says, or is refused with advice."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from fnmatch import fnmatchcase
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from allocator.errors import ExportError, FormatError
from allocator.export.formats import FORMATS, format_named
from allocator.export.ggml import TYPES
from allocator.export.llama_quantize import gguf_name
from allocator.export.pattern_overrides import pattern_overrides
from allocator.export.patterns import merged
from allocator.plan import Plan, PlanBudget, PlanLayer, PlanModel
from allocator.storage import KEEP, Option

PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
NAMES = [f"model.layers.{block}.{projection}" for block in range(12) for projection in PROJECTIONS]
KEPT = {
    "model.embed_tokens.weight": 9,
    "model.layers.0.input_layernorm.weight": 9,
    "model.layers.0.self_attn.q_proj.bias": 9,
    "model.layers.3.mlp.router.weight": 9,
}
PLAIN = [Option(bits, 0, size, 0) for bits in (2, 3, 4, 8) for size in (32, 64)]
RANKED = [Option(3, 8, 64, 4), Option(2, 32, 64, 8), Option(0, 16, 0, 4)]
HEADED = Option(0, 32, 0, 4, heads=3)


def plan_of(options: Mapping[str, Option], target: str | None = None) -> Plan:
    layers = {
        name: PlanLayer(**asdict(option), bytes=1, error=0.0, cost=0.0) for name, option in options.items()
    }
    return Plan(
        schema_version=1, model=PlanModel(id="m", revision=None, weights_sha256="w"), profile_sha256="p",
        budget=PlanBudget(text="3bpw", bytes=1), total_bytes=1, predicted_kl=0.0, predicted_kl_interval=(0.0, 0.0),
        lower_bound=0.0, gap=0.0, shadow_price=0.0, strategy="optimal", target=target, layers=layers, kept=KEPT,
    )  # fmt: skip


def plans(*options: Option) -> st.SearchStrategy[dict[str, Option]]:
    """Options for every layer: by projection and by block, with single exceptions, as real plans have them."""
    choice = st.sampled_from([*options, KEEP])
    by_projection = st.fixed_dictionaries({p: choice for p in PROJECTIONS})
    by_block = st.dictionaries(st.integers(0, 11), choice, max_size=4)
    single = st.dictionaries(st.sampled_from(NAMES), choice, max_size=6)

    def options_of(
        parts: tuple[dict[str, Option], dict[int, Option], dict[str, Option]],
    ) -> dict[str, Option]:
        projections, blocks, singles = parts
        found = {}
        for name in NAMES:
            block, projection = name.split(".", 3)[2:]
            found[name] = singles.get(name, blocks.get(int(block), projections[projection]))
        return found

    return st.tuples(by_projection, by_block, single).map(options_of)


def text(name: str, options: Mapping[str, Option], target: str | None = None) -> str:
    return format_named(name).write(plan_of(options, target))


def quantized(options: Mapping[str, Option]) -> dict[str, tuple[int, int]]:
    return {name: (o.bits, o.group_size) for name, o in options.items() if 0 < o.bits < 16}


def expanded(groups: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(bits, group size) by layer, as compressed-tensors matches targets: `re:`, from the start of the name."""
    found: dict[str, tuple[int, int]] = {}
    for group in groups.values():
        weights = group["weights"]
        size = weights.get("group_size") or weights["block_structure"][1]
        for target in group["targets"]:
            matched = [name for name in NAMES if re.match(target.removeprefix("re:"), name)]
            assert matched
            assert not found.keys() & set(matched)
            found |= dict.fromkeys(matched, (weights["num_bits"], size))
    return found


# Patterns


@given(st.lists(st.sampled_from([*NAMES, "lm_head", "model.layers.1.x.1.y", "a-b.0.c"]), unique=True))
def test_merged_patterns_match_these_names_and_no_other(names: list[str]) -> None:
    patterns = [re.compile(pattern) for pattern in merged(names)]
    others = [*NAMES, "lm_head", "model.layers.1.x.1.y", "a-b.0.c", "model.layers.10.x.1.y", "aXb.0.c"]
    assert {name for name in others if any(p.fullmatch(name) for p in patterns)} == set(names)


def test_blocks_and_projections_that_agree_are_one_pattern() -> None:
    names = [f"model.layers.{b}.{p}" for p in ("mlp.up_proj", "mlp.gate_proj") for b in (0, 2)]
    assert merged(names) == [r"model\.layers\.(0|2)\.(mlp\.up_proj|mlp\.gate_proj)"]


# pattern_overrides


@settings(max_examples=300)
@given(plans(*PLAIN, *RANKED))
def test_expanding_pattern_overrides_gives_back_the_plan(options: dict[str, Option]) -> None:
    found = yaml.safe_load(text("pattern-overrides", options))["pattern_overrides"]
    told: dict[str, dict[str, int]] = {name: {} for name in options}
    for pattern, values in found.items():
        for name in told:
            if fnmatchcase(name, pattern):
                told[name] |= values
    assert {name: Option(**values) for name, values in told.items()} == options


@given(st.dictionaries(st.text("ab.*[1?", min_size=1, max_size=8), st.sampled_from(PLAIN), min_size=1))
def test_names_that_look_like_patterns_are_expanded_too(options: dict[str, Option]) -> None:
    told: dict[str, dict[str, int]] = {name: {} for name in options}
    for pattern, values in pattern_overrides(options).items():
        for name in told:
            if fnmatchcase(name, pattern):
                told[name] |= values
    assert {name: Option(**values) for name, values in told.items()} == options


def test_a_block_that_differs_in_rank_alone_is_one_override_of_the_rank() -> None:
    options = dict.fromkeys(NAMES, Option(3, 64, 64, 4))
    options |= {name: Option(3, 256, 64, 4) for name in NAMES if ".layers.7." in name}
    assert pattern_overrides(options) == {
        "*": {"bits": 3, "rank": 64, "group_size": 64, "factor_bits": 4},
        "model.layers.7.*": {"rank": 256},
    }
    assert "  model.layers.7.*: {rank: 256}\n" in text("pattern-overrides", options)


def test_a_projection_that_agrees_is_merged_over_all_blocks_and_single_layers_come_last() -> None:
    options = dict.fromkeys(NAMES, Option(3, 0, 64, 0))
    options |= {name: Option(4, 0, 64, 0) for name in NAMES if name.endswith("down_proj")}
    options["model.layers.5.self_attn.q_proj"] = Option(8, 0, 32, 0)
    assert list(pattern_overrides(options).items())[1:] == [
        ("model.layers.*.mlp.down_proj", {"bits": 4}),
        ("model.layers.5.self_attn.q_proj", {"bits": 8, "group_size": 32}),
    ]


# llm-compressor and compressed-tensors


@given(plans(*PLAIN))
def test_the_llm_compressor_recipe_targets_every_layer_as_planned(options: dict[str, Option]) -> None:
    recipe = yaml.safe_load(text("llm-compressor", options))
    modifier = recipe["default_stage"]["default_modifiers"]["GPTQModifier"]
    assert expanded(modifier["config_groups"]) == quantized(options)
    assert {group["weights"]["strategy"] for group in modifier["config_groups"].values()} <= {"group"}
    for name, option in options.items():
        ignored = any(re.match(pattern.removeprefix("re:"), name) for pattern in modifier["ignore"])
        assert ignored == (option == KEEP)


@given(plans(*PLAIN, *RANKED), st.sampled_from([None, "vllm"]))
def test_the_compressed_tensors_configuration_targets_every_layer_as_planned(
    options: dict[str, Option], target: str | None
) -> None:
    config = json.loads(text("compressed-tensors", options, target))
    assert expanded(config["config_groups"]) == quantized(options)
    strategies = {group["weights"]["strategy"] for group in config["config_groups"].values()}
    assert strategies <= {"group" if target else "block"}


def test_linear_layers_outside_the_plan_are_ignored_and_nothing_else() -> None:
    """vLLM refuses a linear layer that it finds neither among the targets nor ignored."""
    options = dict.fromkeys(NAMES, PLAIN[0]) | {NAMES[0]: KEEP}
    ignored = json.loads(text("compressed-tensors", options))["ignore"]
    assert ignored == [
        "re:lm_head$",
        r"re:model\.layers\.0\.self_attn\.q_proj$",
        r"re:model\.layers\.3\.mlp\.router$",
    ]


@pytest.mark.parametrize("target", [None, "vllm"])
def test_compressed_tensors_itself_reads_the_configuration(target: str | None) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization", reason="needs the extra `export`")
    options = {name: PLAIN[i % len(PLAIN)] for i, name in enumerate(NAMES)}
    config = json.loads(text("compressed-tensors", options, target))
    read = quantization.QuantizationConfig.model_validate(config)
    assert len(read.config_groups) == len(PLAIN)
    recipe = yaml.safe_load(text("llm-compressor", options))
    for group in recipe["default_stage"]["default_modifiers"]["GPTQModifier"]["config_groups"].values():
        assert not quantization.QuantizationScheme.model_validate(group).weights.symmetric


# GPTQModel


@given(plans(*PLAIN))
def test_the_gptqmodel_configuration_gives_every_layer_what_is_planned(options: dict[str, Option]) -> None:
    if not quantized(options):
        with pytest.raises(ExportError, match="quantizes no layer"):
            text("gptqmodel", options)
        return
    config = json.loads(text("gptqmodel", options))
    assert (config["sym"], config["checkpoint_format"]) == (False, "gptq_v2")
    for name, option in options.items():
        matched = [key for key in config["dynamic"] if re.match(key[2:], name)]
        assert len(matched) <= 1
        if option == KEEP:
            assert matched[0].startswith("-:")
            continue
        own = config | config["dynamic"][matched[0]] if matched else config
        assert (own["bits"], own["group_size"]) == (option.bits, option.group_size)


# llama-quantize


@given(plans(*PLAIN))
def test_one_tensor_type_argument_matches_every_tensor(options: dict[str, Option]) -> None:
    gguf = {"q_proj": "attn_q", "k_proj": "attn_k", "o_proj": "attn_output", "gate_proj": "ffn_gate"}
    types = {2: "q2_K", 3: "q3_K", 4: "q4_K", 8: "q8_0", 16: "bf16"}
    lines = [line for line in text("llama-quantize", options).splitlines() if not line.startswith("#")]
    words = shlex.split(" ".join(line.removesuffix("\\") for line in lines))
    rules = [words[i + 1].split("=") for i, word in enumerate(words) if word == "--tensor-type"]
    assert words[0] == "llama-quantize"
    for name, option in options.items():
        block, _, projection = name.split(".")[2:]
        tensor = f"blk.{block}.{gguf.get(projection, 'ffn_down')}.weight"
        assert [kind for pattern, kind in rules if re.search(pattern, tensor)] == [types[option.bits]]
    assert not [pattern for pattern, _ in rules if pattern != pattern.lower()]


def test_ranks_come_with_the_way_to_a_gguf_adapter() -> None:
    options = dict.fromkeys(NAMES, PLAIN[0]) | {NAMES[3]: RANKED[0]}
    found = text("llama-quantize", options)
    for words in (
        "rank (up to 8, 1 layers)",
        "convert_lora_to_gguf.py",
        "--lora adapter.gguf",
        "--target llama.cpp",
    ):
        assert words in found
    assert "lora" not in text("llama-quantize", dict.fromkeys(NAMES, PLAIN[0]))


@pytest.mark.parametrize(
    "name", ["lm_head", "model.layers.0.mlp.experts.3.up_proj", "model.layers.0.mixer.in_proj", "up_proj"]
)
def test_a_layer_without_a_gguf_name_is_refused(name: str) -> None:
    with pytest.raises(ExportError, match=f"no GGUF name is known for {name}.*choose another format"):
        text("llama-quantize", {name: PLAIN[0]})


@pytest.mark.parametrize(
    ("architecture", "block", "projections"),
    [
        (
            "LLAMA",
            "model.layers.1",
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        ),
        ("QWEN2", "model.layers.1", ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")),
        ("PHI3", "model.layers.1", ("self_attn.qkv_proj", "mlp.gate_up_proj")),
        ("PHI2", "model.layers.1", ("self_attn.dense", "mlp.fc1", "mlp.fc2")),
        ("GPT2", "transformer.h.1", ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
        (
            "GPTNEOX",
            "gpt_neox.layers.1",
            ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h"),
        ),
        ("FALCON", "transformer.h.1", ("self_attention.query_key_value", "self_attention.dense")),
    ],
)
def test_names_are_those_of_llama_cpp_itself(
    architecture: str, block: str, projections: tuple[str, ...]
) -> None:
    gguf = pytest.importorskip("gguf", reason="llama.cpp's own package")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture], 2)
    for projection in projections:
        assert gguf_name(f"{block}.{projection}") == names.get_name(f"{block}.{projection}")


def test_types_are_those_of_llama_cpp_itself() -> None:
    gguf = pytest.importorskip("gguf", reason="llama.cpp's own package")
    for kind in TYPES.values():
        size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.name.upper()]]
        assert size == (kind.block, kind.block_bytes)


# PEFT


def test_the_adapter_configuration_names_the_ranked_layers_and_one_rank() -> None:
    options = dict.fromkeys(NAMES, PLAIN[0]) | {NAMES[3]: RANKED[0], NAMES[9]: RANKED[1]}
    config = json.loads(text("peft", options))
    assert config["target_modules"] == [NAMES[3], NAMES[9]]
    assert config["r"] == config["lora_alpha"] == 32
    assert not {"rank_pattern", "alpha_pattern"} & config.keys()


def test_pure_low_rank_is_no_part_of_the_adapter() -> None:
    options = dict.fromkeys(NAMES, PLAIN[0]) | {NAMES[3]: RANKED[0], NAMES[9]: HEADED}
    config = json.loads(text("peft", options))
    assert (config["target_modules"], config["r"]) == ([NAMES[3]], 8)


# Bad input


def test_an_unknown_format_lists_the_known_ones() -> None:
    with pytest.raises(
        FormatError, match="format 'onnx' is unknown; choose from compressed-tensors, gptqmodel"
    ):
        format_named("onnx")


@pytest.mark.parametrize("name", ["llm-compressor", "gptqmodel"])
def test_ranks_in_a_format_that_cannot_carry_them_are_refused_with_advice(name: str) -> None:
    options = dict.fromkeys(NAMES, PLAIN[0]) | {NAMES[3]: RANKED[0]}
    with pytest.raises(ExportError, match=rf"{re.escape(NAMES[3])} \(rank 8\); .*--target {name}"):
        text(name, options)


@pytest.mark.parametrize("name", ["gptqmodel", "llama-quantize"])
def test_bits_that_a_tool_does_not_run_are_refused_with_advice(name: str) -> None:
    bits = 5 if name == "gptqmodel" else 7
    with pytest.raises(ExportError, match=f"gives {re.escape(NAMES[0])} {bits}; plan again with --target"):
        text(name, dict.fromkeys(NAMES, Option(bits, 0, 64, 0)))


@pytest.mark.parametrize("name", FORMATS)
def test_rotated_inputs_are_refused_by_every_format_with_advice(name: str) -> None:
    options = {NAMES[0]: Option(4, 0, 64, 0), NAMES[1]: Option(4, 0, 64, 0, rotated=True)}
    with pytest.raises(
        ExportError, match=rf"1 layers, the first {re.escape(NAMES[1])}.*plan again with --target"
    ):
        text(name, options)


def test_a_rank_of_every_head_is_refused_where_a_tool_would_take_it_for_the_matrix_s() -> None:
    options = dict.fromkeys(NAMES, PLAIN[0]) | {NAMES[3]: HEADED}
    with pytest.raises(ExportError, match=rf"first {re.escape(NAMES[3])}; .*profile without --head-ratios"):
        text("pattern-overrides", options)
    for name in ("gptqmodel", "llm-compressor", "llama-quantize"):
        with pytest.raises(ExportError, match="--target"):
            text(name, options)


def test_a_plan_without_ranks_has_no_adapter() -> None:
    with pytest.raises(ExportError, match="buys no rank.*serve the compressed-tensors checkpoint alone"):
        text("peft", dict.fromkeys(NAMES, PLAIN[0]))


def test_every_format_gives_the_same_bytes_twice() -> None:
    options = {name: PLAIN[i % len(PLAIN)] for i, name in enumerate(NAMES)}
    for name in FORMATS.keys() - {"peft"}:
        assert text(name, options) == text(name, options)


def with_tables(bits: Mapping[str, int]) -> Plan:
    """A plan that decides on tables too; bits by role."""
    names = {"embedding": "model.embed_tokens", "tied": "model.embed_tokens", "head": "lm_head"}
    options = {NAMES[0]: PLAIN[0]} | {names[role]: Option(b, 0, 64, 0) for role, b in bits.items()}
    return plan_of(options).model_copy(update={"tables": {names[role]: role for role in bits}})


@pytest.mark.parametrize(
    ("bits", "embedding", "head"),
    [
        ({"tied": 6}, "q6_K", "q6_K"),
        ({"embedding": 4, "head": 8}, "q4_K", "q8_0"),
        ({"embedding": 4, "head": 16}, "q4_K", "bf16"),
        ({"embedding": 6}, "q6_K", "bf16"),
        ({}, "bf16", "bf16"),
    ],
)
def test_llama_quantize_gives_tables_the_types_of_their_bits(
    bits: dict[str, int], embedding: str, head: str
) -> None:
    command = FORMATS["llama-quantize"].write(with_tables(bits))
    assert f"--token-embedding-type {embedding} --output-tensor-type {head} " in command
    assert "embed_tokens" not in command and "lm_head" not in command


@pytest.mark.parametrize("name", ["compressed-tensors", "gptqmodel", "llm-compressor", "pattern-overrides"])
def test_a_tool_that_keeps_tables_refuses_a_plan_that_compresses_them(name: str) -> None:
    with pytest.raises(ExportError, match=r"model\.embed_tokens 6; plan without --embeddings"):
        format_named(name).write(with_tables({"tied": 6}))
