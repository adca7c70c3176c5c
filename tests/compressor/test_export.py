"""The export: stock transformers and peft, without this product, compute what the compressed checkpoint computes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel, Qwen2Config

import compressor.plugin  # noqa: F401  registers the format of the compressed checkpoint
from allocator.plan import Plan, PlanBudget, PlanLayer, PlanModel
from allocator.storage import KEEP, Option, layer_bytes
from compressor.checkpoint_writer import BlockWork, LayerWork, WorkError, compress
from compressor.export import export

pytest.importorskip("compressed_tensors", reason="needs the extra `export`")
pytest.importorskip("peft", reason="needs the extra `export`")

MIXED = (
    Option(2, 8, 64, 4),
    Option(3, 0, 32, 0),
    Option(4, 5, 128, 8),
    Option(8, 3, 64, 16),
    KEEP,
    Option(5, 0, 64, 0),
    Option(6, 1, 32, 4),
)
"""One option a projection, shifted by one from block to block."""
STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[3])).eval()
if sys.argv[4]:
    from peft import PeftModel
    model(**model.dummy_inputs)  # the first call unpacks the weights, which peft looks for
    model = PeftModel.from_pretrained(model, sys.argv[4]).eval()
assert not any(name.startswith(("compressor", "allocator")) for name in sys.modules)
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2])).logits.float(), sys.argv[5])
"""


def small(config: type = Qwen2Config) -> PreTrainedModel:
    """Two blocks with attention biases; 160 columns hold no whole number of groups of 64 or 128."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "vocab_size": 96, "max_position_embeddings": 32}
    made = AutoModelForCausalLM.from_config(
        config(
            hidden_size=128,
            intermediate_size=160,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
            tie_word_embeddings=True,
            **sizes,
        )
    )
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return made.bfloat16().eval()


class Compressed:
    """A small model, a plan of given options, and the checkpoint made from it."""

    def __init__(
        self,
        folder: Path,
        model: PreTrainedModel,
        options: Callable[[int, int], Option],
        hessian: Callable[..., Tensor],
    ) -> None:
        self.folder, self.source, self.checkpoint = folder, folder / "source", folder / "checkpoint"
        model.save_pretrained(self.source)
        linears = {
            name: module.weight.detach()
            for name, module in model.named_modules()
            if ".layers." in name and isinstance(module, torch.nn.Linear)
        }
        layers, works = {}, {0: [], 1: []}  # type: ignore[var-annotated]
        for name, stored in linears.items():
            block = int(name.split(".")[2])
            option = options(block, len(works[block]))
            rows, columns = stored.shape
            size = layer_bytes(rows, columns, option, stored.numel() * stored.element_size())
            layers[name] = PlanLayer(
                **asdict(option), bytes=size, error=0.0, cost=0.0
            )  # fmt: skip
            works[block].append(LayerWork(name, stored.float(), hessian(columns), stored))
        kept = {
            name: tensor
            for name, tensor in model.state_dict().items()
            if name.removesuffix(".weight") not in linears and name != "lm_head.weight"
        }
        kept_bytes = {name: tensor.numel() * tensor.element_size() for name, tensor in kept.items()}
        total = sum(kept_bytes.values()) + sum(layer.bytes for layer in layers.values())
        self.plan = Plan(
            schema_version=1, model=PlanModel(id="small", revision=None, weights_sha256="w"),
            profile_sha256="p", budget=PlanBudget(text=f"{total}B", bytes=total), total_bytes=total,
            predicted_kl=0.0, predicted_kl_interval=(0.0, 0.0), lower_bound=0.0, gap=0.0, shadow_price=0.0,
            strategy="optimal", target=None, layers=layers, kept=kept_bytes,
        )  # fmt: skip
        blocks = [BlockWork(index, lambda index=index: works[index]) for index in works]
        compress(self.plan, blocks, kept, self.source, self.checkpoint, lambda *_: None, len(blocks))

    def export(self, name: str = "served") -> tuple[Path, Path | None]:
        adapter = export(self.plan, self.checkpoint, self.folder / name, lambda *_: None)
        return self.folder / name, adapter

    def native_logits(self, tokens: Tensor, dtype: str) -> Tensor:
        model = AutoModelForCausalLM.from_pretrained(self.checkpoint, dtype=getattr(torch, dtype)).eval()
        with torch.no_grad():
            logits: Tensor = model(tokens).logits.float()
        return logits

    def stock_logits(self, tokens: Tensor, dtype: str, base: Path, adapter: Path | None) -> Tensor:
        """Logits in a process of its own, which has never heard of this product."""
        torch.save(tokens, self.folder / "tokens.pt")
        arguments = [base, self.folder / "tokens.pt", dtype, adapter or "", self.folder / "logits.pt"]
        process = subprocess.run(
            [sys.executable, "-c", STOCK, *map(str, arguments)],
            cwd=self.folder, env={"PYTHONPATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            capture_output=True, text=True,
        )  # fmt: skip
        assert process.returncode == 0, process.stderr
        loaded: Tensor = torch.load(self.folder / "logits.pt")
        return loaded


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, correlated: Callable[..., Tensor]) -> Compressed:
    """Every width, every width of factor, ranks 0 to 8, a kept layer, groups that do not divide."""
    folder = tmp_path_factory.mktemp("mixed")
    return Compressed(folder, small(), lambda block, i: MIXED[(block + i) % len(MIXED)], correlated)


def plain(option: Option) -> Option:
    return Option(option.bits, 0, option.group_size, 0)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


def tensors(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def test_stock_transformers_and_peft_compute_the_native_logits(mixed: Compressed, tokens: Tensor) -> None:
    base, adapter = mixed.export()
    native = mixed.native_logits(tokens, "float32")
    stock = mixed.stock_logits(tokens, "float32", base, adapter)
    assert native.abs().max() > 1
    assert (native - stock).abs().max() < 1e-4


def test_without_ranks_the_logits_are_the_native_ones_bit_for_bit_in_bfloat16(
    tmp_path: Path, correlated: Callable[..., Tensor], tokens: Tensor
) -> None:
    """Of a model without biases: the native layer rounds before it adds them."""
    options = [plain(option) for option in MIXED]
    made = Compressed(tmp_path, small(LlamaConfig), lambda block, i: options[(block + i) % 7], correlated)
    base, adapter = made.export()
    assert adapter is None
    assert not (base / "adapter").exists()
    stock = made.stock_logits(tokens, "bfloat16", base, None)
    assert torch.equal(stock, made.native_logits(tokens, "bfloat16"))


def test_pure_low_rank_becomes_its_dense_product(
    tmp_path: Path, correlated: Callable[..., Tensor], tokens: Tensor
) -> None:
    options = (Option(0, 20, 0, 8), Option(4, 0, 32, 0), Option(0, 10, 0, 8, heads=2))
    made = Compressed(tmp_path, small(), lambda block, i: options[(block + i) % 3], correlated)
    base, adapter = made.export()
    assert adapter is None
    native, stock = (
        made.native_logits(tokens, "float32"),
        made.stock_logits(tokens, "float32", base, adapter),
    )
    assert (native - stock).square().mean() < 1e-4 * native.square().mean()


def test_a_plan_for_vllm_packs_its_zero_points(
    tmp_path: Path, correlated: Callable[..., Tensor], tokens: Tensor
) -> None:
    """compressed-tensors itself, which vLLM shares the format with, decodes the weights that the native layer has."""
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_name

    options = (Option(4, 0, 64, 0), Option(8, 0, 32, 0), KEEP)
    made = Compressed(tmp_path, small(LlamaConfig), lambda block, i: options[(block + i) % 3], correlated)
    made.plan = made.plan.model_copy(update={"target": "vllm"})
    for file in made.checkpoint.glob("*.safetensors"):
        rebind(file, made.plan)
    base, _ = made.export()
    document = json.loads((base / "config.json").read_text())["quantization_config"]
    groups = QuantizationConfig.model_validate(document).config_groups
    native = AutoModelForCausalLM.from_pretrained(made.checkpoint, dtype=torch.float32)
    stored = tensors(base)
    for name, layer in made.plan.layers.items():
        if layer.bits == 16:
            assert any(match_name(name, ignored) for ignored in document["ignore"])
            continue
        (scheme,) = [g for g in groups.values() if any(match_name(name, t) for t in g.targets)]
        parts = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
        own = {part: stored[f"{name}.{part}"] for part in parts}
        own["weight_scale"] = own["weight_scale"].float()
        assert own["weight_zero_point"].dtype == torch.int32
        assert (scheme.weights.num_bits, scheme.weights.group_size) in ((4, 64), (8, 32), (4, 32))
        expected = native.get_submodule(name).dense_weight()
        assert torch.equal(PackedQuantizationCompressor.decompress(own, scheme)["weight"], expected)


def rebind(shard: Path, plan: Plan) -> None:
    """Mark a shard as made from `plan`."""
    from safetensors.torch import save

    from compressor.checkpoint_writer import plan_digest
    from compressor.metadata import with_metadata

    metadata = {"format": "pt", "plan_sha256": plan_digest(plan)}
    shard.write_bytes(with_metadata(save(load_file(shard)), metadata))


def test_the_adapter_has_one_rank_and_a_scale_of_one(mixed: Compressed) -> None:
    """What PEFT, vLLM and llama.cpp agree on: lora_alpha equals every layer's rank, and nothing overrides it."""
    base, adapter = mixed.export("one-rank")
    assert adapter == base / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == 8
    assert not {"rank_pattern", "alpha_pattern"} & config.keys()
    factors = load_file(adapter / "adapter_model.safetensors")
    ranked = {name: layer.rank for name, layer in mixed.plan.layers.items() if layer.rank}
    assert set(config["target_modules"]) == set(ranked)
    for name, rank in ranked.items():
        left_Or = factors[f"base_model.model.{name}.lora_B.weight"]
        right_rI = factors[f"base_model.model.{name}.lora_A.weight"]
        assert left_Or.shape[1] == right_rI.shape[0] == 8
        assert not left_Or[:, rank:].any()
        assert not right_rI[rank:].any()
        assert left_Or[:, :rank].any(dim=0).all()
        assert (left_Or.dtype == torch.bfloat16) == (mixed.plan.layers[name].factor_bits == 16)


def test_the_base_takes_little_more_than_the_plan_without_its_factors(mixed: Compressed) -> None:
    """Only zero points grow, from the layer's bits to 8 each, and groups that do not divide a row are split."""
    base, _ = mixed.export("sizes")
    sizes = {name: t.numel() * t.element_size() for name, t in tensors(base).items()}
    for name, layer in mixed.plan.layers.items():
        if name.endswith(("down_proj",)) or layer.bits == 16:
            continue
        rows, columns = load_file_shape(base, name)
        alone = layer_bytes(rows, columns, plain(layer.option), 0)
        taken = sum(size for key, size in sizes.items() if key.startswith(f"{name}.weight"))
        assert taken <= alone + rows * -(-columns // layer.group_size) + 16


def load_file_shape(base: Path, name: str) -> tuple[int, int]:
    rows, columns = tensors(base)[f"{name}.weight_shape"].tolist()
    return rows, columns


def test_the_same_checkpoint_gives_the_same_bytes(mixed: Compressed) -> None:
    first, _ = mixed.export("first")
    leftover = mixed.folder / "second.partial"
    leftover.mkdir()
    (leftover / "model-00009-of-00009.safetensors").write_bytes(b"of a killed run")
    second, _ = mixed.export("second")
    assert digests(first) == digests(second)
    assert not leftover.exists()


# Bad input


def test_a_checkpoint_of_another_plan_is_refused(mixed: Compressed) -> None:
    other = mixed.plan.model_copy(update={"strategy": "uniform:3"})
    with pytest.raises(WorkError, match="not made from this plan; give the checkpoint"):
        export(other, mixed.checkpoint, mixed.folder / "other", lambda *_: None)
    assert not (mixed.folder / "other").exists()
    assert not (mixed.folder / "other.partial").exists()


@pytest.mark.parametrize("damage", ["truncate", "remove", "index"])
def test_a_damaged_checkpoint_is_named(mixed: Compressed, tmp_path: Path, damage: str) -> None:
    checkpoint = shutil.copytree(mixed.checkpoint, tmp_path / "checkpoint")
    shard = checkpoint / "model-00002-of-00003.safetensors"
    if damage == "index":
        (checkpoint / "model.safetensors.index.json").write_text("[]")
    elif damage == "remove":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(WorkError, match="index.json" if damage == "index" else "model-00002.*damaged"):
        export(mixed.plan, checkpoint, tmp_path / "out", lambda *_: None)
    assert not (tmp_path / "out").exists()


def test_a_directory_without_a_checkpoint_is_refused(mixed: Compressed, tmp_path: Path) -> None:
    with pytest.raises(WorkError, match="give a directory that `bitrank compress` wrote"):
        export(mixed.plan, tmp_path, tmp_path / "out", lambda *_: None)


def test_an_output_in_use_is_left_alone(mixed: Compressed, tmp_path: Path) -> None:
    (tmp_path / "diary.txt").write_text("mine")
    with pytest.raises(WorkError, match="not empty"):
        export(mixed.plan, mixed.checkpoint, tmp_path, lambda *_: None)
    assert digests(tmp_path).keys() == {"diary.txt"}


def test_layers_that_transformers_does_not_hold_as_linear_ones_are_named(
    mixed: Compressed, tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(mixed.checkpoint, tmp_path / "checkpoint")
    GPT2Config(n_layer=1, n_embd=8, n_head=2).save_pretrained(checkpoint)
    with pytest.raises(WorkError, match="q_proj is no plain linear layer in transformers.*compressor.plugin"):
        export(mixed.plan, checkpoint, tmp_path / "out", lambda *_: None)
    assert not (tmp_path / "out").exists()
