"""The transformers plug-in: importing this module lets `from_pretrained` load checkpoints that bitrank wrote.

The checkpoint's config.json carries `quantization_config`: quant_method "bitrank", and for every compressed layer
its (bits, rank, group_size, factor_bits), heads where there are several, and rotated where it is. Where the output
head is tied to a compressed embedding it shares its tensors, as transformers ties weights. Without this import
transformers does not know the method, takes the packed `weight` for a plain one and stops at its shape.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import compressor.nn.attention  # noqa: F401  registers itself
from allocator.constraints.rules import FUSED
from allocator.storage import Option
from compressor.nn.embedding import CompressedEmbedding
from compressor.nn.experts import unstack_experts
from compressor.nn.linear import CompressedLinear, Siblings, matrix_names

METHOD = "bitrank"
FORMAT_VERSION = 2
"""2 where a table is compressed, heads have factors of their own or inputs are rotated, none of which earlier versions
can load; 1 elsewhere."""


@register_quantization_config(METHOD)
class BitrankConfig(QuantizationConfigMixin):
    """Options by layer name, as stored in config.json."""

    def __init__(self, layers: dict[str, Any], format_version: int = FORMAT_VERSION, **unused: Any) -> None:
        if format_version > FORMAT_VERSION:
            raise ValueError(
                f"the checkpoint has bitrank format {format_version}, this version reads up to {FORMAT_VERSION};"
                " upgrade bitrank"
            )
        self.quant_method = METHOD  # type: ignore[assignment]  # the enum has transformers' own methods only
        self.format_version = format_version
        self.layers = layers

    def options(self) -> dict[str, Option]:
        return {name: Option(**option) for name, option in self.layers.items()}


@register_quantizer(METHOD)
class BitrankQuantizer(HfQuantizer):
    """Puts a compressed layer wherever the config names one, before the weights are read."""

    requires_calibration = True
    quantization_config: BitrankConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        replace_layers(model, self.quantization_config.options())
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for layer in model.modules():
            if isinstance(layer, CompressedLinear) and (
                layer.option.rotated or next(layer.parameters()).is_cuda
            ):
                layer.prepare()
        join_siblings(model)
        return model

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def replace_layers(model: nn.Module, options: dict[str, Option]) -> None:
    """Swap the named layers for empty compressed ones, on the device they are on (usually meta).

    Expert stacks come apart even where no expert is named: a checkpoint that bitrank wrote has them apart.
    """
    unstack_experts(model)
    for name, option in options.items():
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Embedding):
            _replace_embedding(model, name, layer, option)
        else:
            _replace_linear(model, name, layer, option)


def join_siblings(model: nn.Module) -> None:
    """Let the layers that the decode kernel serves know of those with the same input, and of those that come next."""
    joined: list[Siblings] = []
    for name, layer in model.named_modules():
        if isinstance(layer, CompressedLinear) and layer.has_kernel and layer.siblings is None:
            joined.append(Siblings(_alike(model.get_submodule(name.rpartition(".")[0]), layer)))
            for sibling in joined[-1].layers:
                sibling.siblings = joined[-1]
    for siblings, following in zip(joined, joined[1:] + joined[:1], strict=True):
        siblings.following = following


def _alike(parent: nn.Module, layer: CompressedLinear) -> list[CompressedLinear]:
    """The compressed layers that read what `layer` reads, itself among them."""
    children = dict(parent.named_children())
    for names in FUSED:
        layers = [children[name] for name in names if name in children]
        found = [each for each in layers if isinstance(each, CompressedLinear) and each.has_kernel]
        if any(each is layer for each in found):
            return [each for each in found if each.option.rotated == layer.option.rotated]
    return [layer]


def _replace_linear(model: nn.Module, name: str, linear: Any, option: Option) -> None:
    rows, columns = linear.weight.T.shape if isinstance(linear, Conv1D) else linear.weight.shape
    with linear.weight.device:
        layer = CompressedLinear(rows, columns, option, bias=linear.bias is not None)
    if layer.bias is not None:
        layer.bias.data = linear.bias.data
    model.set_submodule(name, layer)


def _replace_embedding(model: Any, name: str, embedding: nn.Embedding, option: Option) -> None:
    """Also the heads tied to it: every stored tensor is tied then, not the weight alone."""
    rows, columns = embedding.weight.shape
    with embedding.weight.device:
        layer = CompressedEmbedding(rows, columns, option, embedding.weight.dtype)
    model.set_submodule(name, layer)
    tied = [target for target, source in model.all_tied_weights_keys.items() if source == f"{name}.weight"]
    for head in (target.removesuffix(".weight") for target in tied):
        _replace_linear(model, head, model.get_submodule(head), option)
        model.all_tied_weights_keys |= {f"{head}.{part}": f"{name}.{part}" for part in matrix_names("weight")}
    if tied:
        model.tie_weights(recompute_mapping=False)
