"""The worker: carries a plan out to the byte, resumes, and leaves nothing half-written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from allocator.plan import Plan, PlanBudget, PlanLayer, PlanModel
from allocator.storage import KEEP, KEEP_BITS, Option, layer_bytes
from compressor.checkpoint_writer import BlockWork, LayerWork, WorkError, compress

MakeTensor = Callable[..., Tensor]
ROWS, COLUMNS, BLOCKS = 24, 70, 3
OPTIONS = [
    Option(3, 0, 32, 0),
    Option(2, 4, 64, 8),
    Option(0, 5, 0, 4),
    KEEP,
    Option(4, 2, 32, 16),
    Option(0, 5, 0, 8, heads=3),
]


class Source:
    """A model of three blocks with two layers each, which share an input; counts the blocks it handed over."""

    def __init__(self, folder: Path, normal: MakeTensor, correlated: MakeTensor) -> None:
        self.folder, self.opened = folder, 0
        self.weights = {f"blocks.{i // 2}.{i % 2}": normal(ROWS, COLUMNS, seed=i) for i in range(6)}
        self.hessians = [correlated(COLUMNS, seed=i) for i in range(BLOCKS)]
        self.kept = {"embedding": normal(50, 8).bfloat16(), "norm": torch.ones(8).bfloat16()}
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "llama"}')
        (folder / "tokenizer.json").write_text("{}")
        (folder / "model.safetensors.index.json").write_text("{}")

    def blocks(self) -> list[BlockWork]:
        return [BlockWork(index, lambda index=index: self._open(index)) for index in range(BLOCKS)]

    def _open(self, index: int) -> list[LayerWork]:
        self.opened += 1
        return [
            LayerWork(name, weight_OI, self.hessians[index], weight_OI.bfloat16())
            for name, weight_OI in self.weights.items()
            if name.startswith(f"blocks.{index}.")
        ]

    def plan(self, options: list[Option] = OPTIONS) -> Plan:
        layers = {
            name: PlanLayer(
                **asdict(option),
                bytes=layer_bytes(ROWS, COLUMNS, option, 2 * ROWS * COLUMNS),
                error=0.0,
                cost=0.0,
            )
            for name, option in zip(self.weights, options, strict=True)
        }
        kept = {name: t.numel() * t.element_size() for name, t in self.kept.items()}
        total = sum(kept.values()) + sum(layer.bytes for layer in layers.values())
        return Plan(
            schema_version=1,
            model=PlanModel(id="m", revision=None, weights_sha256="w"),
            profile_sha256="p",
            budget=PlanBudget(text=f"{total}B", bytes=total),
            total_bytes=total,
            predicted_kl=0.0,
            predicted_kl_interval=(0.0, 0.0),
            lower_bound=0.0,
            gap=0.0,
            shadow_price=0.0,
            strategy="optimal",
            target=None,
            layers=layers,
            kept=kept,
        )

    def compress(self, output: Path, plan: Plan | None = None, stop_after: int = BLOCKS) -> None:
        def progress(stage: str, done: int, total: int) -> None:
            if done > stop_after:
                raise KeyboardInterrupt

        chosen = plan or self.plan()
        compress(chosen, self.blocks(), self.kept, self.folder, output, progress, BLOCKS)


@pytest.fixture
def source(tmp_path: Path, normal: MakeTensor, correlated: MakeTensor) -> Source:
    return Source(tmp_path / "source", normal, correlated)


def tensors(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def digests(folder: Path) -> dict[str, str]:
    return {file.name: sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_tensor_bytes_are_the_plan_s(source: Source, tmp_path: Path) -> None:
    source.compress(tmp_path / "out")
    sizes = {name: t.numel() * t.element_size() for name, t in tensors(tmp_path / "out").items()}
    assert sum(sizes.values()) == source.plan().total_bytes
    for name, layer in source.plan().layers.items():
        assert sum(size for key, size in sizes.items() if key.startswith(f"{name}.")) == layer.bytes


def test_kept_layers_and_tensors_are_copied_bit_for_bit(source: Source, tmp_path: Path) -> None:
    source.compress(tmp_path / "out")
    written = tensors(tmp_path / "out")
    for name, tensor in source.kept.items():
        assert torch.equal(written[name], tensor)
    for name, layer in source.plan().layers.items():
        if layer.bits == KEEP_BITS:
            assert torch.equal(written[f"{name}.weight"], source.weights[name].bfloat16())


def test_there_is_one_shard_per_block_and_one_of_kept_tensors_and_an_index_of_all(
    source: Source, tmp_path: Path
) -> None:
    source.compress(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors")) == [
        f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)
    ]
    assert set(index["weight_map"]) == set(tensors(tmp_path / "out"))
    assert index["metadata"]["total_size"] == source.plan().total_bytes
    assert index["weight_map"]["embedding"] == "model-00001-of-00004.safetensors"
    assert index["weight_map"]["blocks.2.0.weight"] == "model-00004-of-00004.safetensors"


def test_configuration_names_every_compressed_layer_and_the_tokenizer_comes_along(
    source: Source, tmp_path: Path
) -> None:
    source.compress(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["quantization_config"]["quant_method"] == "bitrank"
    layers = config["quantization_config"]["layers"]
    compressed = {name for name, layer in source.plan().layers.items() if layer.bits != KEEP_BITS}
    assert set(layers) == compressed
    assert layers["blocks.0.1"] == {"bits": 2, "rank": 4, "group_size": 64, "factor_bits": 8}
    assert layers["blocks.2.1"] == {"bits": 0, "rank": 5, "group_size": 0, "factor_bits": 8, "heads": 3}
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_an_interrupted_run_leaves_no_output_and_resumes_to_the_same_files(
    source: Source, tmp_path: Path
) -> None:
    source.compress(tmp_path / "whole")
    source.opened = 0
    with pytest.raises(KeyboardInterrupt):
        source.compress(tmp_path / "out", stop_after=1)
    assert not (tmp_path / "out").exists()
    assert source.opened == 2
    source.compress(tmp_path / "out")
    assert source.opened == 3, "finished blocks are not done again"
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert not list(tmp_path.glob("*.partial"))


def test_blocks_finished_for_another_plan_are_done_again(source: Source, tmp_path: Path) -> None:
    other = source.plan([Option(4, 0, 32, 0)] * 6)
    source.compress(tmp_path / "whole", other)
    with pytest.raises(KeyboardInterrupt):
        source.compress(tmp_path / "out", stop_after=2)
    source.compress(tmp_path / "out", other)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_damaged_shard_is_written_again(source: Source, tmp_path: Path) -> None:
    source.compress(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        source.compress(tmp_path / "out", stop_after=1)
    shard = tmp_path / "out.partial" / "model-00002-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:40])
    source.compress(tmp_path / "out")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_what_was_whole_but_not_yet_renamed_when_its_process_died_does_not_come_along(
    source: Source, tmp_path: Path
) -> None:
    source.compress(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        source.compress(tmp_path / "out", stop_after=1)
    shard = tmp_path / "out.partial" / "model-00002-of-00004.safetensors"
    shard.rename(shard.with_name(f".{shard.name}.4711.tmp"))
    source.compress(tmp_path / "out")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_two_runs_write_the_same_bytes(source: Source, tmp_path: Path) -> None:
    source.compress(tmp_path / "first")
    source.compress(tmp_path / "second")
    assert digests(tmp_path / "first") == digests(tmp_path / "second")


def test_every_shard_carries_the_digest_of_its_plan(source: Source, tmp_path: Path) -> None:
    source.compress(tmp_path / "out")
    expected = sha256(source.plan().model_dump_json().encode()).hexdigest()
    for file in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            assert shard.metadata()["plan_sha256"] == expected


def test_a_full_disk_leaves_nothing_half_written(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        source.compress(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "out.partial").iterdir()) == []


def test_an_occupied_output_is_refused_untouched(source: Source, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    with pytest.raises(WorkError, match="already exists and is not empty"):
        source.compress(tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    assert source.opened == 0


def test_an_empty_output_directory_is_used(source: Source, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    source.compress(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()


def test_other_kept_tensors_than_the_plan_s_are_refused(source: Source, tmp_path: Path) -> None:
    source.kept["norm"] = torch.ones(9).bfloat16()
    plan = source.plan().model_copy(update={"kept": {"embedding": 800, "norm": 16}})
    with pytest.raises(WorkError, match="uncompressed tensors differ from the plan's"):
        source.compress(tmp_path / "out", plan)
    assert not (tmp_path / "out.partial").exists()


def test_a_layer_of_other_bytes_than_the_plan_s_is_refused_by_name(source: Source, tmp_path: Path) -> None:
    source.weights["blocks.0.0"] = source.weights["blocks.0.0"][:20]
    with pytest.raises(WorkError, match=r"blocks\.0\.0 takes .* bytes but the plan says"):
        source.compress(tmp_path / "out")
    assert not (tmp_path / "out").exists()
