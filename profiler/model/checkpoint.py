"""A model on disk: where it is, whether it is whole, what its weights hash to. Loading it is in `layers.py`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from allocator.errors import BitrankError

if TYPE_CHECKING:
    from torch import Tensor

DEMO = "demo"
DEMO_PATH = Path(__file__).parents[1] / "demo"


class ModelError(BitrankError):
    """The model cannot be used; the message says what is wrong with it and what to do."""


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A model id as the user wrote it and the directory that holds it."""

    id: str
    path: Path
    revision: str | None = None


def find_model(model: str) -> ModelRef:
    """Resolve `demo`, a directory, or a hub id (downloading its safetensors, never pickles or code)."""
    if model == DEMO:
        return ModelRef(DEMO, DEMO_PATH)
    path = Path(model)
    if path.is_dir():
        ref = ModelRef(model, path)
        check_files(ref)
        return ref
    if path.is_absolute() or model.startswith(".") or model.count("/") > 1 or path.exists():
        raise ModelError(
            f"no model directory at {model}; give a directory with config.json, a hub id, or 'demo'"
        )
    return _download(model)


def _download(model: str) -> ModelRef:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        path = Path(snapshot_download(model, allow_patterns=["*.safetensors", "*.json", "tokenizer.model"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).split("\n")[0]
        raise ModelError(
            f"{model!r} is neither a directory nor a hub model that can be fetched ({reason}); check the spelling"
        ) from error
    ref = ModelRef(model, path, revision=path.name)
    check_files(ref)
    return ref


def weight_files(ref: ModelRef) -> list[Path]:
    """The safetensors shards of a checkpoint, in name order."""
    index = ref.path / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{index} is not a readable shard index; copy the model again") from error
        return [ref.path / name for name in names]
    return sorted(ref.path.glob("*.safetensors"))


def check_files(ref: ModelRef) -> None:
    """Raise `ModelError` unless config and every shard are there and whole."""
    from safetensors import SafetensorError, safe_open

    config = ref.path / "config.json"
    if not config.exists():
        raise ModelError(f"{ref.path} has no config.json; give the directory of a transformers model")
    try:
        whole = isinstance(json.loads(config.read_text()), dict)
    except ValueError:
        whole = False
    if not whole:
        raise ModelError(f"{config} does not hold a JSON object; copy the model again")
    files = weight_files(ref)
    if not files:
        if list(ref.path.glob("*.bin")) + list(ref.path.glob("*.pt")) + list(ref.path.glob("*.pth")):
            raise ModelError(
                f"{ref.path} holds only pickled weights, which can run code when loaded; "
                "convert them to safetensors first"
            )
        raise ModelError(f"{ref.path} has no .safetensors weights; copy or download the model again")
    for file in files:
        if not file.exists():
            raise ModelError(
                f"shard {file.name} named by the index is missing from {ref.path}; copy the model again"
            )
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} is truncated or corrupt ({error}); copy the model again") from error


def check_uncompressed(ref: ModelRef) -> None:
    """Raise `ModelError` when the checkpoint is quantized already: its weights are not there to measure."""
    config = json.loads((ref.path / "config.json").read_text())
    if found := config.get("quantization_config"):
        raise ModelError(
            f"{ref.id} is already compressed ({found.get('quant_method', 'unknown method')});"
            " profile the model it was made from"
        )


def check_device(device: str) -> None:
    """Raise `ModelError` when tensors cannot be put on `device` here."""
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ModelError(f"device {device!r} cannot be used ({reason}); try --device cpu") from error


class CheckpointTensors:
    """Names and shapes of every stored tensor; values only when asked for, from the memory-mapped file."""

    def __init__(self, ref: ModelRef) -> None:
        from safetensors import safe_open

        self._file: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in weight_files(ref):
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118  safe_open is not a mapping
                    self._file[name] = file
                    self.shapes[name] = tuple(shard.get_slice(name).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self._file[name], framework="pt") as shard:
            tensor: Tensor = shard.get_tensor(name)
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._file))


def weights_sha256(ref: ModelRef) -> str:
    """Digest of names, dtypes, shapes and values, the same however the checkpoint is sharded.

    Raises `ModelError` naming the first tensor that holds a NaN or an infinity.
    """
    import torch

    digest, tensors = hashlib.sha256(), CheckpointTensors(ref)
    for name in tensors:
        tensor = tensors[name]
        # A sum is finite where all numbers are, and takes a tenth of the time; of huge ones it may not be.
        is_sure = not tensor.is_floating_point() or tensor.sum(dtype=torch.float64).isfinite()
        if not is_sure and not torch.isfinite(tensor).all():
            raise ModelError(
                f"weight {name} of {ref.id} has NaN or infinite entries; copy or train the model again"
            )
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tensor_bytes(path: Path) -> int:
    """Bytes of every tensor in a checkpoint's safetensors files."""
    tensors = CheckpointTensors(ModelRef(str(path), path))
    return sum(tensors[name].nbytes for name in tensors)
