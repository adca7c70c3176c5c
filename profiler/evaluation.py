"""How far a compressed model is from its original: KL divergence first, then what people also ask for.

What lives here: measuring on given token windows, and decoding speed. Loading is in `layers.py`, prompts are in
`prompts.py`. KL is the truth the plans are judged by: perplexity can improve while KL worsens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from profiler.calibration import Progress, silent
from profiler.layers import LoadedModel, check_finite

BATCH = 1
COMPARED = 32
"""Tokens compared at once; a comparison holds several copies of their logits."""


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Means over every predicted token: KL(original ‖ compressed) in nats, perplexity of the text under both,
    cosine of the logit vectors, and how often both would pick the same next token."""

    kl_nats: float
    kl_standard_error: float
    perplexity: float
    reference_perplexity: float
    logits_cosine: float
    top1_agreement: float
    tokens: int


EmptyCache = Callable[[], Cache]
Reference = Callable[[int, Tensor], Iterator[Iterable[Tensor]]]
"""The original model's logits for the windows (N, T) that start at an index: of each window in turn all positions but
the last, in pieces (`COMPARED`, V)."""


def live_logits(reference: PreTrainedModel) -> Reference:
    """Logits computed when asked for. Asking raises `ModelError` where they are NaN or infinite."""
    device = next(reference.parameters()).device

    def compute(first: int, batch_NT: Tensor) -> Iterator[Iterable[Tensor]]:
        logits_NTV = reference(batch_NT.to(device), use_cache=False).logits.float()
        check_finite(reference, logits_NTV)
        for logits_TV in logits_NTV:
            yield logits_TV[:-1].split(COMPARED)

    return compute


@torch.inference_mode()
def stored_logits(reference: PreTrainedModel, tokens_NT: Tensor, path: Path) -> Reference:
    """Logits computed now and kept in a file, for when the model itself is about to change."""
    live, sizes, vocabulary = live_logits(reference), list[int](), 0
    with path.open("wb") as file:
        for first in range(0, len(tokens_NT), BATCH):
            for window in live(first, tokens_NT[first : first + BATCH]):
                sizes.clear()
                for piece_tV in window:
                    vocabulary = piece_tV.shape[1]
                    sizes.append(file.write(piece_tV.cpu().contiguous().numpy().data))

    def pieces(window: int) -> Iterator[Tensor]:
        offset = window * sum(sizes)
        for size in sizes:
            logits = np.fromfile(path, np.float32, size // 4, offset=offset)
            yield torch.from_numpy(logits).view(-1, vocabulary)
            offset += size

    def read(first: int, batch_NT: Tensor) -> Iterator[Iterable[Tensor]]:
        return map(pieces, range(first, first + len(batch_NT)))

    return read


@torch.inference_mode()
def compare(
    model: nn.Module,
    reference: Reference,
    tokens_NT: Tensor,
    progress: Progress = silent,
    batch: int = BATCH,
    cache: EmptyCache | None = None,
) -> Tensor:
    """Of every window (N, 5) float64: KL, loss, reference loss, cosine, agreement, each a mean over its tokens.

    batch: windows run at once; their logits are held twice. cache: what the model reads its own keys and values from.
    """
    device = next(model.parameters()).device
    rows = []
    for first in range(0, len(tokens_NT), batch):
        batch_NT = tokens_NT[first : first + batch].to(device)
        past = cache() if cache else None
        logits_NTV = model(batch_NT, past_key_values=past, use_cache=past is not None).logits.float()
        rows += [
            _compare(logits_TV[:-1], window, tokens_T[1:])
            for logits_TV, window, tokens_T in zip(
                logits_NTV, reference(first, batch_NT), batch_NT, strict=True
            )
        ]
        progress("measuring", min(first + batch, len(tokens_NT)), len(tokens_NT))
    return torch.stack(rows).double().cpu()


def measure(
    model: nn.Module,
    reference: Reference,
    tokens_NT: Tensor,
    progress: Progress = silent,
    cache: EmptyCache | None = None,
) -> Fidelity:
    """Compare a model with its reference on the same windows, int64 (N, T)."""
    window_N5 = compare(model, reference, tokens_NT, progress, cache=cache)
    kl, nll, reference_nll, cosine, agreement = window_N5.mean(dim=0).tolist()
    spread = window_N5[:, 0].std().item() / len(window_N5) ** 0.5 if len(window_N5) > 1 else float("nan")
    return Fidelity(
        kl_nats=kl,
        kl_standard_error=spread,
        perplexity=float(torch.tensor(nll).exp()),
        reference_perplexity=float(torch.tensor(reference_nll).exp()),
        logits_cosine=cosine,
        top1_agreement=agreement,
        tokens=tokens_NT.numel() - len(tokens_NT),
    )


def _compare(logits_TV: Tensor, reference: Iterable[Tensor], target_T: Tensor) -> Tensor:
    """Of one window (5,): KL, loss, reference loss, cosine, agreement, each a mean over its tokens."""
    pieces = zip(logits_TV.split(COMPARED), reference, target_T.split(COMPARED), strict=True)
    return torch.cat([_compared(q_tV, p_tV.to(q_tV), target_t) for q_tV, p_tV, target_t in pieces]).mean(0)


def _compared(logits_TV: Tensor, reference_TV: Tensor, target_T: Tensor) -> Tensor:
    """The same of every token (T, 5)."""
    log_q, log_p = logits_TV.log_softmax(-1), reference_TV.log_softmax(-1)
    nll = -log_q.gather(-1, target_T[:, None])[:, 0]
    reference_nll = -log_p.gather(-1, target_T[:, None])[:, 0]
    kl = divergence(log_p, log_q)
    cosine = F.cosine_similarity(logits_TV, reference_TV, dim=-1)
    same = (logits_TV.argmax(-1) == reference_TV.argmax(-1)).float()
    return torch.stack([kl, nll, reference_nll, cosine, same], dim=-1)


def divergence(log_p_TV: Tensor, log_q_TV: Tensor) -> Tensor:
    """KL(p ‖ q) in nats at every position (T,). Overwrites log p."""
    return (log_p_TV.exp() * log_p_TV.sub_(log_q_TV)).sum(-1)


@torch.inference_mode()
def window_divergences(logits_NTV: Tensor, reference: Iterable[Iterable[Tensor]]) -> Tensor:
    """(N,): KL(reference ‖ logits) in nats/token of every window, over the positions that `measure` counts."""
    means = []
    for q_TV, window in zip(logits_NTV, reference, strict=True):
        pieces = zip(window, q_TV[:-1].split(COMPARED), strict=True)
        found = [divergence(p_tV.to(q_tV).log_softmax(-1), q_tV.log_softmax(-1)) for p_tV, q_tV in pieces]
        means.append(torch.cat(found).mean())
    return torch.stack(means)


@torch.inference_mode()
def tokens_per_second(loaded: LoadedModel, new_tokens: int = 24, cache: EmptyCache | None = None) -> float:
    """Decoding speed at batch 1, after one step of warm-up."""
    ids = torch.zeros(1, 8, dtype=torch.int64, device=loaded.device)
    output = loaded.model(ids, past_key_values=cache() if cache else None, use_cache=True)
    started = time.perf_counter()
    for _ in range(new_tokens):
        token = output.logits[:, -1:].argmax(-1)
        output = loaded.model(token, past_key_values=output.past_key_values, use_cache=True)
    output.logits.sum().item()
    return new_tokens / (time.perf_counter() - started)
