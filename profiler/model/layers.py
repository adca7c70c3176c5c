"""A loaded model and its layers: which matrices can be compressed, in which block, under which name.

What lives here: loading (safetensors only, no remote code), whole or block by block, and finding blocks and layers.
Files are checked in `checkpoint.py`; when a block is in memory is for `offload.py`; statistics are in
`calibration.py`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import compressor.plugin  # noqa: F401  registers the checkpoint format
from compressor.nn.experts import unstack_experts
from compressor.nn.linear import weight_of
from profiler.model.checkpoint import CheckpointTensors, ModelError, ModelRef, check_device
from profiler.model.offload import Offload

logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)

BATCH_LOGITS = {"cpu": 2**22, "cuda": 2**30}
"""Logits of one batch, in numbers; a batch is one window at least."""
BATCH_WINDOWS = {"cpu": 4, "cuda": 16}
"""Windows of one batch at most; on a GPU, every batch has every block brought there."""


START_SAMPLE = "a"
"""A text whose tokens show what a tokenizer adds before it."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One compressible matrix. rows and columns are of W in y = Wx, whichever way the module stores it."""

    name: str
    block: int
    projection: str
    rows: int
    columns: int
    transposed: bool

    @property
    def weights(self) -> int:
        return self.rows * self.columns


Source = Callable[[str], Tensor]
"""A stored tensor by its name in the model, in the dtype it is stored in."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A causal LM in float32, evaluation mode, gradients off; `storage_dtype` is the checkpoint's own.

    `text_start` is what the tokenizer puts before a text: usually one `<bos>`, or nothing.
    `offload` is None where the whole model is in memory. Where it is not, a block is read when it is called and
    dropped afterwards, so `model(…)` works either way; a block's weights are to be had through `weight`.
    """

    ref: ModelRef
    model: PreTrainedModel
    tokenizer: Any
    storage_dtype: torch.dtype
    block_names: tuple[str, ...]
    layers: tuple[Layer, ...]
    source: Source
    offload: Offload | None = None
    text_start: tuple[int, ...] = ()

    @property
    def device(self) -> torch.device:
        return weight_of(self.model.get_input_embeddings()).device

    @property
    def blocks(self) -> list[nn.Module]:
        return [self.model.get_submodule(name) for name in self.block_names]

    @property
    def window(self) -> int:
        """Tokens per calibration window: 512, or the model's context if that is shorter."""
        context = getattr(self.model.config, "max_position_embeddings", None) or 512
        return min(512, int(context))

    @property
    def vocabulary(self) -> int:
        """Tokens that the model knows."""
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def first_scored(self) -> int:
        """The first position of a window whose logits count: they predict a token of the text, not of its start."""
        return max(0, len(self.text_start) - 1)

    @property
    def stays_in_memory(self) -> bool:
        """Whether blocks are still there after they are called."""
        return self.offload is None or self.offload.is_resident

    @property
    def windows_per_batch(self) -> int:
        """Windows run at once: `BATCH_WINDOWS`, or as many as keep a batch's logits within `BATCH_LOGITS`."""
        kind = "cuda" if self.device.type == "cuda" else "cpu"
        return max(1, min(BATCH_WINDOWS[kind], BATCH_LOGITS[kind] // (self.window * self.vocabulary)))

    def layers_of(self, block: int) -> list[Layer]:
        return [layer for layer in self.layers if layer.block == block]

    def stored_weight(self, layer: Layer) -> Tensor:
        """The weight as the checkpoint stores it, transposed or not."""
        return self.source(f"{layer.name}.weight").to(self.storage_dtype)

    def weight(self, layer: Layer) -> Tensor:
        """W (O, I) in float32."""
        held = self.offload.held if self.offload else {}
        stored = held.get(f"{layer.name}.weight")
        weight = (self.stored_weight(layer).to(self.device) if stored is None else stored).float()
        return weight.T.contiguous() if layer.transposed else weight

    def kept_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every stored tensor that belongs to no layer's weight, tied weights once, in the storage dtype."""
        tied = set(self.model.all_tied_weights_keys)
        compressible = {f"{layer.name}.weight" for layer in self.layers}
        for name, tensor in self.model.state_dict().items():
            if name in tied or name in compressible:
                continue
            stored = self.source(name) if tensor.is_meta else tensor
            yield name, stored.to(self.storage_dtype) if stored.is_floating_point() else stored

    def replacing(self, weight: Callable[[Layer], Tensor | None]) -> AbstractContextManager[None]:
        """While open, every layer computes with `weight(layer)` (O, I) instead of its own; with its own where that is
        None."""
        if self.offload is None:
            raise ValueError("only a model that is read block by block can have its weights replaced")
        layer_of = {f"{layer.name}.weight": layer for layer in self.layers}

        def replaced(name: str) -> Tensor | None:
            layer = layer_of.get(name)
            w_OI = None if layer is None else weight(layer)
            return w_OI.T if w_OI is not None and layer is not None and layer.transposed else w_OI

        return self.offload.replacing(replaced)


def load_model(ref: ModelRef, device: str = "cpu") -> LoadedModel:
    """Load a whole causal LM. Raises `ModelError` for unknown architectures and weights that do not fit the config."""
    check_device(device)
    model = _from_pretrained(ref)
    storage_dtype = model.dtype
    unstack_experts(model)
    model.to(device=device, dtype=torch.float32)  # type: ignore[call-arg]  # wrapped without self
    model.eval().requires_grad_(False)
    block_names = find_blocks(model)
    layers = find_layers(model, block_names)
    state, tokenizer = model.state_dict(), load_tokenizer(ref)
    start = text_start(ref, tokenizer, model)
    return LoadedModel(
        ref, model, tokenizer, storage_dtype, block_names, layers, state.__getitem__, text_start=start
    )


def open_model(ref: ModelRef, device: str = "cpu", reads_text: bool = True) -> LoadedModel:
    """Load a causal LM of which one block is in memory at a time, read from the memory-mapped checkpoint.

    reads_text: whether the tokenizer is needed, which takes seconds to load where the vocabulary is large.

    Where transformers has to convert what is stored (names or layouts of another version, stacks of experts), the
    weights are first read whole, and kept in the checkpoint's own dtype. Raises as `load_model` does.
    """
    check_device(device)
    direct = _skeleton(ref)
    model, source, storage_dtype = direct or _converted(ref)
    block_names = find_blocks(model)
    layers = find_layers(model, block_names)

    def read(name: str) -> Tensor:
        tensor = source(name)
        return tensor.to(storage_dtype) if tensor.is_floating_point() else tensor

    offload = Offload(model, block_names, read, torch.device(device))
    model = model.eval().requires_grad_(False)
    tokenizer = load_tokenizer(ref) if reads_text else None
    start = text_start(ref, tokenizer, model) if reads_text else ()
    return LoadedModel(ref, model, tokenizer, storage_dtype, block_names, layers, source, offload, start)


def _skeleton(ref: ModelRef) -> tuple[PreTrainedModel, Source, torch.dtype] | None:
    """The model without weights and where each is stored; None where the stored names or shapes are not its own."""
    try:
        config = AutoConfig.from_pretrained(ref.path, trust_remote_code=False)
        stored = CheckpointTensors(ref)
        dtype = config.dtype or next(
            t.dtype for t in map(stored.__getitem__, stored) if t.is_floating_point()
        )
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        model.tie_weights()
    except Exception:  # `load_model`'s way in says what is wrong
        return None
    name_of: dict[str, str] = {}
    for name, tensor in model.state_dict().items():
        known = [n for n in (name, name.removeprefix(f"{model.base_model_prefix}.")) if n in stored.shapes]
        if known and stored.shapes[known[0]] == tuple(tensor.shape):
            name_of[name] = known[0]
        elif name not in model.all_tied_weights_keys:
            return None
    return model, lambda name: stored[name_of[name]], dtype


def _converted(ref: ModelRef) -> tuple[PreTrainedModel, Source, torch.dtype]:
    """The model as transformers loads it; its own weights are the source."""
    model = _from_pretrained(ref)
    unstack_experts(model)
    return model, dict(model.state_dict()).__getitem__, model.dtype


def _from_pretrained(ref: ModelRef) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(ref.path, trust_remote_code=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(  # a pair, which its annotation does not know
            ref.path,
            config=config,
            dtype="auto",
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises whatever a configuration trips over
        reason = " ".join(str(error).split()).split(". ")[0][:240]
        raise ModelError(
            f"{ref.id} cannot be loaded as a causal language model ({reason});"
            " give one that the installed transformers knows without custom code"
        ) from error
    model: PreTrainedModel
    model, found = loaded
    check_weights(ref, sorted(found["missing_keys"]), sorted(found["mismatched_keys"]))
    return model


def check_weights(ref: ModelRef, missing: list[str], mismatched: list[Any]) -> None:
    """Raise `ModelError` when weights are absent or misshapen: transformers would fill them with random numbers.

    mismatched: (name, stored shape, shape by the configuration).
    """
    if missing:
        raise ModelError(
            f"{ref.id} lacks {len(missing)} weights that its config.json asks for, the first {missing[0]};"
            " copy the model again"
        )
    if mismatched:
        name, stored, expected = mismatched[0]
        raise ModelError(
            f"weight {name} of {ref.id} has shape {tuple(stored)}, config.json asks for {tuple(expected)};"
            " copy the model again"
        )


def check_finite(model: PreTrainedModel, tensor: Tensor, what: str = "logits") -> None:
    """Raise `ModelError` when a model's logits, or whatever `what` names, hold a NaN or an infinity."""
    if not torch.isfinite(torch.stack(tensor.aminmax())).all():  # without a copy of the tensor
        dtype = str(model.dtype).removeprefix("torch.")
        raise ModelError(
            f"the {what} of {model.name_or_path or type(model).__name__} are NaN or infinite in {dtype};"
            " its weights overflow, so copy or train the model again"
        )


def load_tokenizer(ref: ModelRef) -> Any | None:
    """The model's tokenizer, or None where the directory has none (then calibration must be sampled)."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(ref.path, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError, AttributeError):
        return None
    # transformers makes up one of special tokens alone for some directories that have none
    return tokenizer if len(tokenizer) > len(tokenizer.added_tokens_decoder) else None


def read_text(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text alone; none where the tokenizer refuses it (of words alone, without one for the unknown)."""
    try:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    except Exception:  # tokenizers raises nothing more particular
        return []


def _readable(tokenizer: Any) -> str:
    """A text that the tokenizer knows: `START_SAMPLE`, or else one of its own tokens."""
    own = (tokenizer.decode([k]) for k in range(len(tokenizer)) if k not in tokenizer.added_tokens_decoder)
    return next((text for text in chain([START_SAMPLE], own) if read_text(tokenizer, text)), "")


def text_start(ref: ModelRef, tokenizer: Any | None, model: PreTrainedModel) -> tuple[int, ...]:
    """The tokens that the tokenizer puts before a text; without a tokenizer, the configuration's `<bos>`.

    Many models work badly without them (attention sinks, Xiao et al., arXiv 2309.17453). Raises `ModelError` where
    the model has no embedding for them.
    """
    config = model.config.get_text_config()
    if tokenizer is None:
        start = (config.bos_token_id,) if isinstance(config.bos_token_id, int) else ()
        return start if all(0 <= token < config.vocab_size for token in start) else ()
    sample = _readable(tokenizer)
    plain, whole = read_text(tokenizer, sample), list(tokenizer(sample)["input_ids"])
    places = [k for k in range(len(whole)) if whole[k : k + len(plain)] == plain]
    start = tuple(whole[: places[0]]) if places else ()
    if any(not 0 <= token < config.vocab_size for token in start):
        raise ModelError(
            f"the tokenizer of {ref.id} starts every text with token {max(start)}, but the model knows"
            f" {config.vocab_size}; copy the model's own tokenizer beside it"
        )
    return start


def find_blocks(model: nn.Module) -> tuple[str, ...]:
    """Names of the transformer blocks: the members of the largest list of like modules."""
    best: tuple[int, tuple[str, ...]] = (0, ())
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len({type(child) for child in module}) != 1:
            continue
        size = sum(parameter.numel() for parameter in module.parameters())
        if size > best[0]:
            best = (size, tuple(f"{name}.{index}" for index in range(len(module))))
    if not best[1]:
        raise ModelError(
            f"no list of transformer blocks in {type(model).__name__}; its layout is not supported"
        )
    return best[1]


def find_layers(model: nn.Module, block_names: tuple[str, ...]) -> tuple[Layer, ...]:
    """Every linear layer of every block; refuses a block that hides weights in stacks of three dimensions."""
    layers = []
    for block, block_name in enumerate(block_names):
        for name, module in model.get_submodule(block_name).named_modules():
            full_name = f"{block_name}.{name}"
            if isinstance(module, nn.Linear | Conv1D):
                transposed = isinstance(module, Conv1D)
                rows, columns = module.weight.T.shape if transposed else module.weight.shape
                projection = re.sub(r"^(self_attn|attn\.attention|attn|attention|mlp)\.", "", name)
                layers.append(Layer(full_name, block, projection, rows, columns, transposed))
                continue
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.dim() > 2:
                    raise ModelError(
                        f"{full_name}.{key} is a stack of matrices of shape {tuple(parameter.shape)} that bitrank"
                        " cannot take apart; this architecture is not supported"
                    )
    return tuple(layers)
