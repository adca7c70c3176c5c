"""Hidden states compared: with the block's input, with the embedding of their token, with those of other tokens.

What lives here: the three measures of `fidelity.py` that need no logits. Each gives one number per window.

Letters: N windows, T tokens of a window, d hidden size, V vocabulary, k negatives, P pooled states.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.nn.linear import weight_of
from profiler.model.layers import LoadedModel

NEGATIVES = 100
POOL = 2_048
"""States, evenly spaced over all windows, among which the nearest of another token is looked for."""


def influence(input_NTd: Tensor, output_NTd: Tensor) -> Tensor:
    """float64 (N,): 1 − cosine of a block's input and output, the mean over tokens."""
    return 1 - F.cosine_similarity(input_NTd.double(), output_NTd.double(), dim=-1).mean(dim=1)


@dataclass(frozen=True, slots=True)
class Negatives:
    """Input embeddings (V, d), the tokens int64 (N, T) and, of every window, the random tokens int64 (N, k)."""

    embedding_Vd: Tensor
    tokens_NT: Tensor
    negative_Nk: Tensor

    @classmethod
    def drawn(cls, loaded: LoadedModel, tokens_NT: Tensor, seed: int) -> Negatives:
        """At most `NEGATIVES` distinct tokens for every window."""
        embedding_Vd = weight_of(loaded.model.get_input_embeddings())
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randperm(len(embedding_Vd), generator=generator)[:NEGATIVES] for _ in tokens_NT]
        return cls(embedding_Vd, tokens_NT.to(loaded.device), torch.stack(drawn).to(loaded.device))

    def fits(self, width: int) -> bool:
        """Whether hidden states of this width can be compared with the embeddings."""
        return self.embedding_Vd.shape[1] == width

    def recovery(self, first: int, state_NTd: Tensor) -> Tensor:
        """float64 (N,): the share of tokens whose own embedding is nearest by cosine, for windows from `first` on.

        A negative that is the token itself does not count; a tie is a miss.
        """
        rows = slice(first, first + len(state_NTd))
        tokens_NT, negative_Nk = self.tokens_NT[rows], self.negative_Nk[rows]
        state_NTd = F.normalize(state_NTd.float(), dim=-1)
        own_NT = (state_NTd * self._directions(tokens_NT)).sum(-1)
        other_NTk = state_NTd @ self._directions(negative_Nk).mT
        other_NTk.masked_fill_(tokens_NT[..., None] == negative_Nk[:, None], -torch.inf)
        return (own_NT > other_NTk.amax(-1)).double().mean(dim=1)

    def _directions(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.embedding_Vd[tokens].float(), dim=-1)


class Pool:
    """States of one depth, filled batch by batch, and their tokens."""

    def __init__(self, tokens_NT: Tensor) -> None:
        self._tokens_NT = tokens_NT
        count = min(POOL, tokens_NT.numel())
        self._place_P = torch.linspace(0, tokens_NT.numel() - 1, count).round().long()
        self._tokens_P = tokens_NT.flatten()[self._place_P]
        self._parts: list[Tensor] = []

    def add(self, first: int, state_NTd: Tensor) -> None:
        """Take the pooled states among those of the windows from `first` on; in order, every window once."""
        length = self._tokens_NT.shape[1]
        local_P = self._place_P - first * length
        taken_P = local_P[(local_P >= 0) & (local_P < len(state_NTd) * length)]
        self._parts.append(state_NTd.flatten(0, 1)[taken_P.to(state_NTd.device)].double())

    def margin(self, first: int, state_NTd: Tensor, changed_NTd: Tensor) -> Tensor:
        """float64 (N,): ‖h̃ − h‖ over the distance from h to the nearest pooled state of another token.

        The mean over the windows from `first` on; a state that coincides with another token's counts at the
        resolution of float32.
        """
        pool_Pd = torch.cat(self._parts)
        tokens_NT = self._tokens_NT[first : first + len(state_NTd)]
        return torch.stack(
            [
                _margins(h_Td.double(), changed_Td.double(), token_T, pool_Pd, self._tokens_P).mean()
                for h_Td, changed_Td, token_T in zip(state_NTd, changed_NTd, tokens_NT, strict=True)
            ]
        )


def _margins(h_Td: Tensor, changed_Td: Tensor, token_T: Tensor, pool_Pd: Tensor, token_P: Tensor) -> Tensor:
    distance_TP = torch.cdist(h_Td, pool_Pd)
    same_TP = (token_T[:, None] == token_P).to(h_Td.device)
    nearest_T = distance_TP.masked_fill_(same_TP, torch.inf).amin(dim=1)
    resolution_T = torch.finfo(torch.float32).eps * h_Td.norm(dim=1).clamp(
        min=torch.finfo(torch.float32).tiny
    )
    margin_T: Tensor = (changed_Td - h_Td).norm(dim=1) / torch.maximum(nearest_T, resolution_T)
    return margin_T
