"""Attention of a single new token, for models whose query heads share keys: `attn_implementation="grouped"`.

What lives here: the function and its registration with transformers. More tokens than one go the way of `sdpa`.

Compiled, with a cache of fixed length, transformers copies keys and values for every query head before it calls
PyTorch's kernel. Heads that share a key are rows of one product, which needs no copies and is two launches around a
softmax.

Letters: B sequences, H query heads, K key heads, T tokens, S places of the cache, D numbers of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "grouped"


def grouped_attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BKSD: Tensor,
    value_BKSD: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """(B, T, H, D), as every attention of transformers; probabilities are found in float32.

    mask: True where a place is seen, the same for all heads, (B, 1, T, S). Raises `ValueError` for a model with sinks,
    which `sdpa` would leave out.
    """
    if keywords.get("s_aux") is not None:
        raise ValueError(
            'grouped attention has no attention sinks; load the model with attn_implementation="eager"'
        )
    if not _fits(query_BHTD, mask, keywords):
        return sdpa_attention_forward(
            module, query_BHTD, key_BKSD, value_BKSD, mask, scaling=scaling, **keywords
        )
    grouped_BKGD = query_BHTD.reshape(len(query_BHTD), key_BKSD.shape[1], -1, query_BHTD.shape[-1])
    scaling = query_BHTD.shape[-1] ** -0.5 if scaling is None else scaling
    score_BKGS = (grouped_BKGD @ key_BKSD.mT).float() * scaling
    if mask is not None:
        score_BKGS = score_BKGS.masked_fill(~mask, torch.finfo(torch.float32).min)
    output_BKGD = score_BKGS.softmax(dim=-1).to(value_BKSD.dtype) @ value_BKSD
    return output_BKGD.reshape(len(query_BHTD), 1, query_BHTD.shape[1], -1), None


def _fits(query_BHTD: Tensor, mask: Tensor | None, keywords: dict[str, Any]) -> bool:
    """One token, and nothing asked for that plain products do not do."""
    if query_BHTD.shape[2] > 1 or any(keywords.get(name) for name in ("dropout", "softcap")):
        return False
    if keywords.get("position_bias") is not None or keywords.get("cache") is not None:
        return False
    return mask is None or (mask.dtype == torch.bool and mask.shape[1] == 1)


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
