"""Everything of a low-rank key-value cache but its contents, and the file that a checkpoint carries it in.

What lives here: how every layer keeps its keys and values, and `kv_cache.bases`. The cache is `cache.py`.

The file has a tensor `LAYER.k|v.HEAD.CHUNK` (c, r) for every basis that has a rank, and in its metadata, as JSON under
`kv_cache`, the version, the chunk size and every group's bits and ranks.

Letters as in `cache.py`, and C chunks of a head.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from allocator.plan import PlanCache
from compressor.kvcache.cache import (
    Bases,
    LowRankCache,
    LowRankLayer,
    Plain,
    Projected,
    Rotary,
    Rounded,
    Side,
    Unrounded,
)
from compressor.kvcache.ranks import KINDS, CacheError, CoefficientBits, Ranks, stored_plainly
from compressor.metadata import with_metadata
from compressor.nn.linear import weight_of

FILE = "kv_cache.bases"
"""A safetensors file under another suffix: what reads every `*.safetensors` of a folder takes them for weights."""
VERSION = 1
DTYPE = torch.bfloat16
"""Of bases and unrounded coefficients in a file: what a plan counts, two bytes a number."""


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """How every layer keeps its keys and its values."""

    sides: tuple[tuple[Side, Side], ...]
    rotary: Rotary | None

    def empty(self) -> LowRankCache:
        """A cache to give to a model as `past_key_values`; every text needs one of its own."""
        return LowRankCache([LowRankLayer(keys, values, self.rotary) for keys, values in self.sides])


def side_of(vector_HCcc: Tensor, rank_HC: Ranks, bits: CoefficientBits, dtype: torch.dtype) -> Side:
    """Chunks projected on their leading vectors, given in columns; full ranks that are not rounded need no bases."""
    if stored_plainly(rank_HC, bits, vector_HCcc.shape[-1]):
        return Plain(dtype)
    bases = bases_of(vector_HCcc, rank_HC, dtype)
    return Projected(bases, codec_of(bases, bits, dtype))


def bases_of(vector_HCcc: Tensor, rank_HC: Ranks, dtype: torch.dtype) -> Bases:
    pairs = zip(vector_HCcc.flatten(0, 1), rank_HC.ravel().tolist(), strict=True)
    blocks = tuple(vector_cc[:, :rank].to(dtype).contiguous() for vector_cc, rank in pairs)
    return Bases(blocks, len(vector_HCcc))


def codec_of(bases: Bases, bits: CoefficientBits, dtype: torch.dtype) -> Unrounded | Rounded:
    return Unrounded(dtype) if bits == 16 else Rounded(tuple(filter(None, bases.ranks)), bits)


def layout_file(planned: PlanCache, vector_LKHCcc: Tensor) -> bytes:
    """`kv_cache.bases` of a planned cache, the vectors those it was planned with."""
    tensors = {}
    for name, group in planned.groups.items():
        layer, kind = name.split(".")
        vector_HCcc = vector_LKHCcc[int(layer), KINDS.index(kind)]
        if stored_plainly(np.array(group.ranks), group.bits, planned.chunk_size):
            continue
        for head, chunk in np.ndindex(*np.shape(group.ranks)):
            basis_cr = vector_HCcc[head, chunk, :, : group.ranks[head][chunk]]
            if basis_cr.numel():
                tensors[f"{name}.{head}.{chunk}"] = basis_cr.to(DTYPE).cpu().contiguous()
    groups = {name: {"bits": group.bits, "ranks": group.ranks} for name, group in planned.groups.items()}
    document = {"version": VERSION, "chunk_size": planned.chunk_size, "groups": groups}
    return with_metadata(save(tensors), {"format": "pt", "kv_cache": json.dumps(document)})


def load_layout(folder: Path, model: PreTrainedModel) -> CacheLayout:
    """The cache that a checkpoint was planned with, for the model loaded from it.

    Raises `CacheError` where the folder has none, and where it is damaged, newer than this code or of another model.
    """
    path = folder / FILE
    if not path.exists():
        raise CacheError(f"{folder} has no {FILE}; plan with --context and compress again")
    try:
        with safe_open(path, framework="pt", device=str(model.device)) as file:
            document = json.loads(file.metadata()["kv_cache"])
            if document["version"] > VERSION:
                raise CacheError(
                    f"{path} has version {document['version']}, this code reads up to {VERSION}; upgrade bitrank"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
            found = [
                _side(name, group, document["chunk_size"], tensors)
                for name, group in document["groups"].items()
            ]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, CacheError):
            raise
        raise CacheError(f"{path} is damaged ({error}); compress the plan again") from error
    sides = tuple(zip(found[::2], found[1::2], strict=True))
    layers = model.config.get_text_config().num_hidden_layers
    if len(sides) != layers:
        raise CacheError(
            f"{path} is of a model of {len(sides)} layers, this one has {layers}; compress the plan again"
        )
    return CacheLayout(sides, rotary_of(model))


def _bits(bits: int) -> CoefficientBits:
    if bits not in (4, 8, 16):
        raise CacheError(f"coefficients of {bits} bits are unknown; use 4, 8 or 16")
    return bits  # type: ignore[return-value]


def _side(name: str, group: Mapping[str, object], chunk_size: int, tensors: Mapping[str, Tensor]) -> Side:
    ranks, bits = np.array(group["ranks"], dtype=np.int64), _bits(int(str(group["bits"])))
    if stored_plainly(ranks, bits, chunk_size):
        return Plain(DTYPE)
    nothing_c0 = torch.empty(chunk_size, 0, dtype=DTYPE)
    blocks = tuple(
        tensors.get(f"{name}.{head}.{chunk}", nothing_c0) for head, chunk in np.ndindex(*ranks.shape)
    )
    if [block_cr.shape[1] for block_cr in blocks] != ranks.ravel().tolist():
        raise CacheError(f"the bases of {name} have other ranks than it says; compress the plan again")
    bases = Bases(blocks, len(ranks))
    return Projected(bases, codec_of(bases, bits, DTYPE))


def rotary_of(model: PreTrainedModel) -> Rotary | None:
    """Angles by position, or None for a model whose keys are not rotated.

    Raises `CacheError` where angles depend on the length of the text, or where neighbours are turned together and not
    halves: keys could not be rotated again as they were.
    """
    found = [module for module in model.modules() if hasattr(module, "inv_freq")]
    if not found:
        return None
    name = model.name_or_path or type(model).__name__
    module: Callable[..., tuple[Tensor, Tensor]] = found[0]
    kind = getattr(module, "rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise CacheError(f"{name} turns keys by angles that change with the length ({kind}); not supported")
    device = weight_of(model.get_input_embeddings()).device

    @lru_cache(maxsize=1)  # every layer asks for the same
    def angles(tokens: int) -> tuple[Tensor, Tensor]:
        position_1T = torch.arange(tokens, device=device)[None]
        cosine_1Tn, sine_1Tn = module(torch.zeros(1, device=device), position_1T)
        return cosine_1Tn[0], sine_1Tn[0]

    first, second = angles(2)[0].chunk(2, dim=-1)
    if not torch.equal(first, second):
        raise CacheError(f"{name} turns neighbouring numbers of a key together; only halves are supported")
    return angles
