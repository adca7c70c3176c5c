"""How far a compressed model is from its original: KL divergence first, then what people also ask for.

What lives here: measuring on given token windows, generation side by side, decoding speed. Loading is in
`layers.py`. KL is the truth the plans are judged by: perplexity can improve while KL worsens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from profiler.calibration import Progress, silent
from profiler.layers import LoadedModel

BATCH = 1
COMPARED = 128
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


Reference = Callable[[int, Tensor], Tensor]
"""The original model's logits (N, T, V) for the windows that start at an index."""


def live_logits(reference: nn.Module) -> Reference:
    """Logits computed when asked for."""
    device = next(reference.parameters()).device
    return lambda first, batch_NT: reference(batch_NT.to(device), use_cache=False).logits.float()


@torch.inference_mode()
def stored_logits(reference: nn.Module, tokens_NT: Tensor, path: Path) -> Reference:
    """Logits computed now and kept in a file, for when the model itself is about to change."""
    live = live_logits(reference)
    with path.open("wb") as file:
        for first in range(0, len(tokens_NT), BATCH):
            logits_NTV = live(first, tokens_NT[first : first + BATCH])
            file.write(logits_NTV.cpu().contiguous().numpy().data)
    per_window = logits_NTV[0].numel()

    def read(first: int, batch_NT: Tensor) -> Tensor:
        logits = np.fromfile(path, np.float32, len(batch_NT) * per_window, offset=4 * first * per_window)
        return torch.from_numpy(logits).view(*batch_NT.shape, -1)

    return read


@torch.inference_mode()
def compare(model: nn.Module, reference: Reference, tokens_NT: Tensor, progress: Progress = silent) -> Tensor:
    """Of every window (N, 5) float64: KL, loss, reference loss, cosine, agreement, each a mean over its tokens."""
    device = next(model.parameters()).device
    rows = []
    for first in range(0, len(tokens_NT), BATCH):
        batch_NT = tokens_NT[first : first + BATCH].to(device)
        reference_NTV = reference(first, batch_NT).to(device)
        logits_NTV = model(batch_NT, use_cache=False).logits.float()
        rows += [
            _compare(q_TV[:-1], p_TV[:-1], target_T[1:])
            for q_TV, p_TV, target_T in zip(logits_NTV, reference_NTV, batch_NT, strict=True)
        ]
        progress("measuring", min(first + BATCH, len(tokens_NT)), len(tokens_NT))
    return torch.stack(rows).double().cpu()


def measure(
    model: nn.Module, reference: Reference, tokens_NT: Tensor, progress: Progress = silent
) -> Fidelity:
    """Compare a model with its reference on the same windows, int64 (N, T)."""
    window_N5 = compare(model, reference, tokens_NT, progress)
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


def _compare(logits_TV: Tensor, reference_TV: Tensor, target_T: Tensor) -> Tensor:
    """Of one window (5,): KL, loss, reference loss, cosine, agreement, each a mean over its tokens."""
    pieces = zip(*(t.split(COMPARED) for t in (logits_TV, reference_TV, target_T)), strict=True)
    return torch.cat([_compared(*piece) for piece in pieces]).mean(dim=0)


def _compared(logits_TV: Tensor, reference_TV: Tensor, target_T: Tensor) -> Tensor:
    """The same of every token (T, 5)."""
    log_q, log_p = logits_TV.log_softmax(-1), reference_TV.log_softmax(-1)
    nll = -log_q.gather(-1, target_T[:, None])[:, 0]
    reference_nll = -log_p.gather(-1, target_T[:, None])[:, 0]
    kl = (log_p.exp() * log_p.sub_(log_q)).sum(-1)
    cosine = F.cosine_similarity(logits_TV, reference_TV, dim=-1)
    same = (logits_TV.argmax(-1) == reference_TV.argmax(-1)).float()
    return torch.stack([kl, nll, reference_nll, cosine, same], dim=-1)


@torch.inference_mode()
def generate(loaded: LoadedModel, prompt: str, new_tokens: int = 48) -> str:
    """Greedy continuation of `prompt`."""
    ids = loaded.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"].to(
        loaded.device
    )
    ids = ids[:, -max(1, loaded.window - new_tokens) :]
    output = loaded.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
    )
    return str(loaded.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


@torch.inference_mode()
def tokens_per_second(loaded: LoadedModel, new_tokens: int = 24) -> float:
    """Decoding speed at batch 1, after one step of warm-up."""
    ids = torch.zeros(1, 8, dtype=torch.int64, device=loaded.device)
    output = loaded.model(ids, use_cache=True)
    started = time.perf_counter()
    for _ in range(new_tokens):
        token = output.logits[:, -1:].argmax(-1)
        output = loaded.model(token, past_key_values=output.past_key_values, use_cache=True)
    output.logits.sum().item()
    return new_tokens / (time.perf_counter() - started)
