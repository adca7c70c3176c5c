"""The quality cliff: what a model loses as the rank of one kind of projection falls.

What lives here: cutting the rank of a group of matrices or heads, measuring KL and repetition, naming the cliff.
Energy alone is in `spectrum.py`, the document in `sidecar.py`.

A group is one projection in every block (`q_proj`), cut as a whole, or its heads (`q heads`), each cut on its own; all
other weights stay as they are. The cut is the plain one, the leading singular values, that energy rules are about.

The cliff is where cutting one group costs as much as rounding *every* matrix to the nearest of 4 bits in groups of 64:
there the loss of a 4-bit model would double. It lies on straight lines between the measured cuts; KL is convex there,
so the line is a little early.

Letters: N windows, T tokens, O rows, I columns, r singular values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from allocator.plan import PlanModel
from compressor.quantize.gptq import round_to_nearest
from profiler.documents.sidecar import CliffDocument, Cut, GroupCliff
from profiler.evaluation.divergence import BATCH, Reference, stored_logits, window_divergences
from profiler.evaluation.prompts import NGRAM, repeated_share
from profiler.model.heads import Head, heads_of, kind_of
from profiler.model.layers import Layer, LoadedModel, check_finite
from profiler.model.weight_patching import Weights, substituted
from profiler.statistics.calibration import Progress, check_windows, silent
from profiler.statistics.estimate import CONFIDENCE, Estimate, estimate
from profiler.studies.spectrum import energy_curve, rank_for

RATIOS = (0.95, 0.9, 0.85, 0.8, 0.65, 0.5, 0.35, 0.2)
ENERGY_SHARE = 0.95
REFERENCE_BITS, REFERENCE_GROUP = 4, 64
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 32, 64


@dataclass(frozen=True, slots=True)
class Part:
    """A matrix or head of a group, factored: W = left_Or · right_rI; energy_r as in `spectrum.energy_curve`."""

    layer: Layer
    head: Head | None
    left_Or: Tensor
    right_rI: Tensor
    energy_r: Tensor

    @classmethod
    def of(cls, loaded: LoadedModel, layer: Layer, head: Head | None) -> Part:
        w_OI = loaded.weight(layer)
        left_Or, value_r, right_rI = torch.linalg.svd(head.cut(w_OI) if head else w_OI, full_matrices=False)
        return cls(layer, head, left_Or * value_r, right_rI, energy_curve(head.cut(w_OI) if head else w_OI))

    @property
    def full_rank(self) -> int:
        return len(self.energy_r)

    def put(self, w_OI: Tensor, rank: int) -> None:
        """Overwrite this part of W by its best matrix of a rank."""
        target = self.head.cut(w_OI) if self.head else w_OI
        target.copy_(self.left_Or[:, :rank] @ self.right_rI[:rank])


def groups_of(loaded: LoadedModel) -> dict[str, list[tuple[Layer, Head | None]]]:
    """Every kind of projection by name, experts together, and the heads where a matrix has several, as `q heads`."""
    groups: dict[str, list[tuple[Layer, Head | None]]] = {}
    for layer in loaded.layers:
        groups.setdefault(kind_of(layer.projection), []).append((layer, None))
    for layer in loaded.layers:
        heads = heads_of(loaded, layer)
        for head in heads if len(heads) > 1 else ():
            groups.setdefault(f"{head.role} heads", []).append((layer, head))
    return groups


@torch.no_grad()
def measure_cliff(
    loaded: LoadedModel,
    model: PlanModel,
    tokens_NT: Tensor,
    text: str,
    folder: Path,
    ratios: Sequence[float] = RATIOS,
    progress: Progress = silent,
) -> CliffDocument:
    """Cut every group to every ratio of its full rank and to 95 % of its energy, on windows int64 (N, T), two at least.

    The model is left as it was. folder: where the original's logits lie meanwhile. Raises `ModelError` where the
    model's numbers overflow.
    """
    check_windows(tokens_NT)
    reference = stored_logits(loaded, tokens_NT, folder / "reference.f32")
    rounded = {layer: rounded_weight(loaded.weight(layer)) for layer in loaded.layers}
    with substituted(loaded, rounded):
        threshold = window_kls(loaded, reference, tokens_NT).mean()
    del rounded
    untouched = repetition(loaded, tokens_NT)
    groups, found = groups_of(loaded), []
    for name, members in groups.items():
        parts = [Part.of(loaded, layer, head) for layer, head in members]

        def measured(ranks: list[int], parts: list[Part] = parts) -> Cut:
            return measure_cut(loaded, reference, tokens_NT, parts, ranks)

        whole = Cut(1.0, 1.0, Estimate(0.0, 0.0, 0.0), untouched)
        cuts = [
            measured([math.ceil(ratio * part.full_rank) for part in parts]) for ratio in sorted(ratios)[::-1]
        ]
        by_energy = measured([rank_for(part.energy_r, ENERGY_SHARE) for part in parts])
        found.append(name_cliff(name, parts[0].full_rank, (whole, *cuts), by_energy, float(threshold)))
        progress("cutting ranks", len(found), len(groups))
    return CliffDocument(
        model=model,
        text=text,
        windows=len(tokens_NT),
        window_tokens=tokens_NT.shape[1],
        threshold_kl=float(threshold),
        energy_share=ENERGY_SHARE,
        confidence=CONFIDENCE,
        prompts=min(PROMPTS, len(tokens_NT)),
        new_tokens=continuation_lengths(tokens_NT.shape[1])[1],
        ngram=NGRAM,
        groups=tuple(found),
    )


def rounded_weight(w_OI: Tensor) -> Tensor:
    return round_to_nearest(w_OI, REFERENCE_BITS, REFERENCE_GROUP).dequantize()


def measure_cut(
    loaded: LoadedModel, reference: Reference, tokens_NT: Tensor, parts: Sequence[Part], ranks: Sequence[int]
) -> Cut:
    """Cut every part to its rank, and measure."""
    with substituted(loaded, cut_weights(loaded, parts, ranks)):
        return Cut(
            ratio=float(np.mean([rank / part.full_rank for rank, part in zip(ranks, parts, strict=True)])),
            energy=float(
                np.mean([part.energy_r[r - 1].item() for r, part in zip(ranks, parts, strict=True)])
            ),
            kl=estimate(window_kls(loaded, reference, tokens_NT)),
            repetition=repetition(loaded, tokens_NT),
        )


def cut_weights(loaded: LoadedModel, parts: Sequence[Part], ranks: Sequence[int]) -> Weights:
    """W (O, I) of every layer with its parts cut; parts at full rank stay as they are, to the bit."""
    weights: dict[Layer, Tensor] = {}
    for part, rank in zip(parts, ranks, strict=True):
        if rank < part.full_rank:
            w_OI = weights.setdefault(part.layer, loaded.weight(part.layer).clone())
            part.put(w_OI, rank)
    return weights


def window_kls(loaded: LoadedModel, reference: Reference, tokens_NT: Tensor) -> np.ndarray:
    """float64 (N,): KL (nats/token) of the model as it is now, by window."""
    rows = []
    for first in range(0, len(tokens_NT), BATCH):
        batch_NT = tokens_NT[first : first + BATCH].to(loaded.device)
        logits_NTV = loaded.model(batch_NT, use_cache=False).logits.float()
        check_finite(loaded.model, logits_NTV, "logits at reduced rank")
        rows.append(window_divergences(logits_NTV, reference, first, batch_NT))
    return torch.cat(rows).double().cpu().numpy()


def repetition(loaded: LoadedModel, tokens_NT: Tensor) -> float:
    """The share of n-grams in greedy continuations that occurred before in the same one (Welleck et al., seq-rep-n,
    arXiv 1908.04319), the mean over the first windows as prompts."""
    prompt, new = continuation_lengths(tokens_NT.shape[1])
    drawn_NT = greedy(loaded, tokens_NT[:PROMPTS, :prompt].to(loaded.device), new)
    return float(np.mean([repeated_share(row.tolist()) for row in drawn_NT]))


def continuation_lengths(window: int) -> tuple[int, int]:
    """Tokens of the prompt and of its continuation, within one window."""
    prompt = min(PROMPT_TOKENS, max(1, window // 3))
    return prompt, min(NEW_TOKENS, window - prompt)


def greedy(loaded: LoadedModel, prompt_NT: Tensor, new_tokens: int) -> Tensor:
    """int64 (N, new_tokens): the likeliest continuation, past the end of a text too."""
    drawn, cache, token_NT = [], None, prompt_NT
    for _ in range(new_tokens):
        output = loaded.model(token_NT, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        token_NT = output.logits[:, -1:].argmax(-1)
        drawn.append(token_NT)
    return torch.cat(drawn, dim=1)


def name_cliff(
    group: str, full_rank: int, cuts: tuple[Cut, ...], energy_cut: Cut, threshold_kl: float
) -> GroupCliff:
    """Find where KL reaches the threshold, from the full rank down."""
    position = crossing(cuts, threshold_kl)
    return GroupCliff(
        group=group,
        full_rank=full_rank,
        cuts=cuts,
        energy_cut=energy_cut,
        cliff_ratio=None if position is None else position[0],
        cliff_energy=None if position is None else position[1],
        energy_is_enough=energy_cut.kl.mean < threshold_kl,
    )


def crossing(falling: Sequence[Cut], threshold_kl: float) -> tuple[float, float] | None:
    """(ratio, energy) where KL first reaches the threshold, on straight lines between cuts; None if it never does."""
    for above, below in pairwise(falling):
        if below.kl.mean >= threshold_kl:
            rise = below.kl.mean - above.kl.mean
            share = (threshold_kl - above.kl.mean) / rise if rise > 0 else 1.0
            return (
                above.ratio + share * (below.ratio - above.ratio),
                above.energy + share * (below.energy - above.energy),
            )
    return None
