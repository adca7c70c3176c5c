"""One prompt under two models: how their logits over it differ, and what each says next.

What lives here: prompts. Whole texts are measured in `divergence.py`. Letters: T tokens of the prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from profiler.model.layers import LoadedModel

NEW_TOKENS = 48
NGRAM = 4


@dataclass(frozen=True, slots=True)
class SamplePair:
    """The same prompt under both models: its greedy continuations, the mean cosine and the mean squared difference of
    the logits over its tokens, and the share of 4-grams in each continuation that had been there before."""

    prompt: str
    reference: str
    compressed: str
    logits_cosine: float
    logits_mse: float
    reference_repetition: float
    compressed_repetition: float


@torch.inference_mode()
def sample_pair(original: LoadedModel, compressed: LoadedModel, prompt: str) -> SamplePair:
    tokens_1T = prompt_tokens(original, prompt)
    reference_TV, compressed_TV = (
        loaded.model(tokens_1T.to(loaded.device), use_cache=False).logits[0].float().to(original.device)
        for loaded in (original, compressed)
    )
    drawn = [continuation(loaded, tokens_1T) for loaded in (original, compressed)]
    texts = [str(original.tokenizer.decode(tokens_n, skip_special_tokens=True)) for tokens_n in drawn]
    return SamplePair(
        prompt,
        texts[0],
        texts[1],
        F.cosine_similarity(reference_TV, compressed_TV, dim=-1).mean().item(),
        F.mse_loss(reference_TV, compressed_TV).item(),
        repeated_share(drawn[0].tolist()),
        repeated_share(drawn[1].tolist()),
    )


def prompt_tokens(loaded: LoadedModel, prompt: str) -> Tensor:
    """int64 (1, T): as the tokenizer starts a text, then the end of the prompt, as much as leaves room in the window
    for what follows."""
    found = loaded.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    start = torch.tensor([loaded.text_start], dtype=found.dtype)
    room = max(1, loaded.window - NEW_TOKENS - len(loaded.text_start))
    return torch.cat((start, found[:, -room:]), dim=1)


def continuation(loaded: LoadedModel, tokens_1T: Tensor) -> Tensor:
    """int64 (n,): what the model says next, greedily; up to `NEW_TOKENS`."""
    ids_1T = tokens_1T.to(loaded.device)
    assert callable(loaded.model.generate)  # which the class of every causal LM has, not `PreTrainedModel`
    output_1T: Tensor = loaded.model.generate(
        ids_1T,
        attention_mask=torch.ones_like(ids_1T),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    return output_1T[0, ids_1T.shape[1] :]


def repeated_share(tokens: Sequence[int], n: int = NGRAM) -> float:
    """1 − distinct ÷ all n-grams; 0 where there is none (Welleck et al., seq-rep-n, arXiv 1908.04319)."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
