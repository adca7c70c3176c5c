"""How far a compressed model is from its original: KL divergence first, then what people also ask for.

What lives here: measuring on given token windows, and decoding speed. Loading is in `layers.py`, prompts are in
`prompts.py`. KL is the truth the plans are judged by: perplexity can improve while KL worsens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from profiler.model.layers import LoadedModel, check_finite
from profiler.model.weight_patching import Continuation
from profiler.statistics.calibration import Progress, silent
from profiler.statistics.moments import BlockInputs

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


@dataclass(frozen=True, slots=True)
class Reference:
    """The original model's logits, and which positions of a window count.

    logits: for the windows (N, T) that start at an index, of each window in turn those of all scored positions, in
    pieces (`COMPARED`, V). Position t predicts token t + 1; scored are those from `first_scored` on that predict a
    token of the window (`LoadedModel.first_scored`).
    """

    first_scored: int
    logits: Callable[[int, Tensor], Iterator[Iterable[Tensor]]]

    def scored(self, logits_TV: Tensor) -> Tensor:
        return logits_TV[self.first_scored : -1]

    def targets(self, tokens_T: Tensor) -> Tensor:
        """The tokens that the scored positions predict."""
        return tokens_T[self.first_scored + 1 :]


def live_logits(loaded: LoadedModel) -> Reference:
    """Logits computed when asked for. Asking raises `ModelError` where they are NaN or infinite."""

    def compute(first: int, batch_NT: Tensor) -> Iterator[Iterable[Tensor]]:
        logits_NTV = loaded.model(batch_NT.to(loaded.device), use_cache=False).logits.float()
        check_finite(loaded.model, logits_NTV)
        for logits_TV in logits_NTV:
            yield logits_TV[loaded.first_scored : -1].split(COMPARED)

    return Reference(loaded.first_scored, compute)


@torch.inference_mode()
def stored_logits(loaded: LoadedModel, tokens_NT: Tensor, path: Path) -> Reference:
    """Logits of the model as it is now, for when its layers, its embedding or its head are about to change.

    What leaves the last block is kept in a file, and what comes after it is run again, with the embedding and head of
    now: a vocabulary of 262,144 has logits 400 times as large as the hidden states that they come from. Raises
    `ModelError` where logits are NaN or infinite.
    """
    hidden = final_hidden_states(loaded, tokens_NT, path)
    continuation, depth = Continuation.of(loaded), len(loaded.block_names)
    modules = [m for m in (loaded.model.get_input_embeddings(), loaded.model.get_output_embeddings()) if m]
    weights = [module._parameters["weight"] for module in modules]

    @torch.inference_mode()
    def compute(first: int, batch_NT: Tensor) -> Iterator[Iterable[Tensor]]:
        changed = [module._parameters["weight"] for module in modules]
        for offset in range(len(batch_NT)):
            window_1T = batch_NT[offset : offset + 1]
            hidden_1Td = hidden.read(first + offset, 1, loaded.device)
            try:
                _put_weights(modules, weights)
                logits_TV = continuation.logits(depth, hidden_1Td, window_1T)[0]
            finally:
                _put_weights(modules, changed)
            yield logits_TV[loaded.first_scored : -1].split(COMPARED)

    return Reference(loaded.first_scored, compute)


def _put_weights(modules: Sequence[nn.Module], weights: Sequence[nn.Parameter | None]) -> None:
    for module, weight in zip(modules, weights, strict=True):
        module._parameters["weight"] = weight


def final_hidden_states(loaded: LoadedModel, tokens_NT: Tensor, path: Path) -> BlockInputs:
    """What leaves the last block, for every window. Raises `ModelError` where the logits are NaN or infinite."""
    seen: list[Tensor] = []

    def note(module: nn.Module, arguments: object, output: Tensor | tuple[Tensor, ...]) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])

    path.unlink(missing_ok=True)
    kept: BlockInputs | None = None
    handle = loaded.blocks[-1].register_forward_hook(note)
    try:
        for first in range(0, len(tokens_NT), BATCH):
            logits_NTV = loaded.model(
                tokens_NT[first : first + BATCH].to(loaded.device), use_cache=False
            ).logits
            check_finite(loaded.model, logits_NTV)
            hidden_NTd = seen.pop()
            kept = kept or BlockInputs(path, (*tokens_NT.shape, hidden_NTd.shape[-1]))
            kept.write(first, hidden_NTd)
    finally:
        handle.remove()
    assert kept is not None
    return kept


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
            _compare(reference.scored(logits_TV), window, reference.targets(tokens_T))
            for logits_TV, window, tokens_T in zip(
                logits_NTV, reference.logits(first, batch_NT), batch_NT, strict=True
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
        tokens=len(tokens_NT) * len(reference.targets(tokens_NT[0])),
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
def window_divergences(logits_NTV: Tensor, reference: Reference, first: int, tokens_NT: Tensor) -> Tensor:
    """(N,): KL(reference ‖ logits) in nats/token of the windows from `first` on, over the positions that `measure`
    counts."""
    means = []
    for q_TV, window in zip(logits_NTV, reference.logits(first, tokens_NT), strict=True):
        pieces = zip(window, reference.scored(q_TV).split(COMPARED), strict=True)
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
