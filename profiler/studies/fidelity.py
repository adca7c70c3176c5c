"""Fidelity: what every block contributes to the model, and how much of it a probe compression destroys.

What lives here: measuring the blocks one after another. Hidden states are compared in `hidden_states.py`; intervals,
tiers and the test for a U shape are in `estimate.py`, `tiers.py` and `ushape.py`; the document is in `sidecar.py`.

Four measures per block, each a mean over windows:

    probe_kl            KL (nats/token) of the model when this block alone is compressed at the probe setting
    block_influence     1 − cosine of the block's input and output, token by token (Men et al., ShortGPT,
                        arXiv 2403.03853): 0 for a block that does nothing
    collision_margin    ‖h̃ − h‖ over the distance from h to the nearest output of another token, h̃ the output of the
                        compressed block: at ½ the two may be taken for each other
    embedding_recovery  how often the block's output is nearer, by cosine, to the input embedding of its own token than
                        to those of k random tokens

Letters: N windows, T tokens of a window, d hidden size, B blocks, R resamples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from allocator.plan import PlanModel
from allocator.storage import Option
from compressor.lowrank.decompose import decompose
from compressor.lowrank.hessian import Curvature
from profiler.documents.sidecar import BlockFidelity, FidelityDocument
from profiler.evaluation.divergence import BATCH, Reference, stored_logits, window_divergences
from profiler.execution.block_pipeline import first_inputs
from profiler.model.layers import LoadedModel, check_finite
from profiler.model.weight_patching import Continuation, Weights, substituted
from profiler.statistics.calibration import Progress, check_known, check_windows, silent
from profiler.statistics.estimate import CONFIDENCE, RESAMPLES, SEED, estimate, resampled_means
from profiler.statistics.moments import BlockCalls, BlockInputs, TokenWeights, block_calls, input_moments
from profiler.statistics.ushape import u_shape
from profiler.studies.hidden_states import NEGATIVES, Negatives, Pool, influence
from profiler.studies.tiers import outliers, tiers

PROBE = Option(3, 0, 64, 0)
MEASURES = ("probe_kl", "block_influence", "collision_margin", "embedding_recovery")
ON_LOG_SCALE = ("probe_kl", "collision_margin")
"""Measures whose ratios matter: outliers and shapes are looked for in their logarithms."""


Measured = dict[str, NDArray[np.float64]]
"""Every measure there is, by name, float64 (N, B)."""


@dataclass(frozen=True, slots=True)
class _Windows:
    """What every block is measured against."""

    loaded: LoadedModel
    tokens_NT: Tensor
    reference: Reference
    calls: BlockCalls
    continuation: Continuation
    negatives: Negatives

    def run(self, index: int, hidden_NTd: Tensor) -> Tensor:
        return self.calls[len(hidden_NTd)][index](self.loaded.blocks[index], hidden_NTd)


def check_measurable(loaded: LoadedModel, tokens_NT: Tensor) -> None:
    """Raise `CalibrationError` for windows int64 (N, T) that say nothing: one token, or none that the model knows."""
    check_windows(tokens_NT)
    check_known(loaded, tokens_NT.flatten(), "the text to measure on")


@torch.no_grad()
def measure_blocks(
    loaded: LoadedModel,
    tokens_NT: Tensor,
    compressed: Iterable[Weights],
    folder: Path,
    progress: Progress = silent,
) -> Measured:
    """Measure every block on windows int64 (N, T), two at least. The model is left as it was.

    compressed: the weights of each block's layers at the probe setting, block by block. folder: where hidden states
    and logits lie meanwhile. Raises `ModelError` where the model's numbers overflow, `CalibrationError` for a text
    that is one token.
    """
    check_measurable(loaded, tokens_NT)
    windows = _Windows(
        loaded,
        tokens_NT,
        stored_logits(loaded, tokens_NT, folder / "reference.f32"),
        block_calls(loaded, tokens_NT),
        Continuation.of(loaded),
        Negatives.drawn(loaded, tokens_NT, SEED),
    )
    current = first_inputs(loaded, tokens_NT, folder / "hidden-0.f32")
    columns: dict[str, list[Tensor]] = {}
    for index, weights in enumerate(compressed):
        following = BlockInputs(folder / f"hidden-{(index + 1) % 2}.f32", current.shape)
        found = _measure_block(windows, index, weights, current, following)
        for name, value_N in found.items():
            columns.setdefault(name, []).append(value_N.double().cpu())
        current = following
        progress("measuring blocks", index + 1, len(loaded.block_names))
    return {name: torch.stack(values, dim=1).numpy() for name, values in columns.items()}


def _measure_block(
    windows: _Windows, index: int, weights: Weights, current: BlockInputs, following: BlockInputs
) -> dict[str, Tensor]:
    """Every measure of one block (N,); writes its outputs to `following`."""
    batch, device = windows.loaded.windows_per_batch, windows.loaded.device
    found: dict[str, list[Tensor]] = {name: [] for name in MEASURES}
    pool = Pool(windows.tokens_NT)
    for first, input_NTd in current.batches(batch, device):
        output_NTd = windows.run(index, input_NTd)
        check_finite(windows.loaded.model, output_NTd, f"outputs of block {index}")
        following.write(first, output_NTd)
        pool.add(first, output_NTd)
        found["block_influence"].append(influence(input_NTd, output_NTd))
        if windows.negatives.fits(output_NTd.shape[-1]):
            found["embedding_recovery"].append(windows.negatives.recovery(first, output_NTd))
    with substituted(windows.loaded, weights):
        for (first, input_NTd), (_, output_NTd) in zip(
            current.batches(batch, device), following.batches(batch, device), strict=True
        ):
            changed_NTd = windows.run(index, input_NTd)
            found["collision_margin"].append(pool.margin(first, output_NTd, changed_NTd))
            found["probe_kl"].append(_divergences(windows, index, first, changed_NTd))
    return {name: torch.cat(parts) for name, parts in found.items() if parts}


def _divergences(windows: _Windows, index: int, first: int, changed_NTd: Tensor) -> Tensor:
    """KL (N,) in nats/token of the windows from `first` on, with these outputs of one block."""
    parts = []
    for offset in range(0, len(changed_NTd), BATCH):
        hidden_NTd = changed_NTd[offset : offset + BATCH]
        at = first + offset
        tokens_NT = windows.tokens_NT[at : at + len(hidden_NTd)]
        logits_NTV = windows.continuation.logits(index + 1, hidden_NTd, tokens_NT)
        check_finite(windows.loaded.model, logits_NTV, f"logits with block {index} compressed")
        parts.append(window_divergences(logits_NTV, windows.reference, at, tokens_NT))
    return torch.cat(parts)


@torch.no_grad()
def compressed_blocks(
    loaded: LoadedModel,
    tokens_NT: Tensor,
    token_weights: TokenWeights | None,
    folder: Path,
    option: Option = PROBE,
) -> Iterator[Weights]:
    """Every block's layers compressed at `option` under the calibration windows int64 (N, T), block by block.

    token_weights: of these windows, `None` for even ones. folder: where hidden states lie meanwhile.
    """
    calls = block_calls(loaded, tokens_NT)
    current = first_inputs(loaded, tokens_NT, folder / "calibration-0.f32")
    for index in range(len(loaded.block_names)):
        following = BlockInputs(folder / f"calibration-{(index + 1) % 2}.f32", current.shape)
        weights = {}
        for moment in input_moments(loaded, index, calls, current, token_weights, following):
            curvature = Curvature.of(moment.hessian_II)
            ((_, found),) = decompose([loaded.weight(moment.layer)], curvature, [option])
            weights[moment.layer] = found.dense()
        yield weights
        current = following


def fidelity_document(
    model: PlanModel,
    measured: Measured,
    calibration: str,
    text: str,
    window_tokens: int,
    option: Option = PROBE,
) -> FidelityDocument:
    """Estimates, tiers, outliers and shapes of what `measure_blocks` found."""
    estimates = {name: [estimate(value_N) for value_N in value_NB.T] for name, value_NB in measured.items()}
    scaled = {name: scale(name, value_NB.mean(axis=0)) for name, value_NB in measured.items()}
    strange = {name: outliers(value_B) for name, value_B in scaled.items()}
    windows, count = measured["probe_kl"].shape
    recovery = estimates.get("embedding_recovery", [None] * count)
    tier_B = tiers(estimates["probe_kl"])
    blocks = [
        BlockFidelity(
            block=block,
            tier=tier_B[block],
            outlier_in=tuple(name for name in measured if block in strange[name]),
            probe_kl=estimates["probe_kl"][block],
            block_influence=estimates["block_influence"][block],
            collision_margin=estimates["collision_margin"][block],
            embedding_recovery=recovery[block],
        )
        for block in range(count)
    ]
    return FidelityDocument(
        model=model,
        option=option,
        calibration=calibration,
        text=text,
        windows=windows,
        window_tokens=window_tokens,
        negatives=NEGATIVES,
        confidence=CONFIDENCE,
        resamples=RESAMPLES,
        seed=SEED,
        blocks=tuple(blocks),
        shapes=tuple(
            u_shape(name, scaled[name], noise(name, value_NB)) for name, value_NB in measured.items()
        ),
    )


def scale(name: str, value: NDArray[np.float64]) -> NDArray[np.float64]:
    """A measure as outliers and shapes look at it: the logarithm where ratios matter."""
    if name not in ON_LOG_SCALE:
        return value
    return np.asarray(np.log(np.maximum(value, np.finfo(np.float32).tiny)))


def noise(name: str, value_NB: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64 (R, B): how far resamples of the windows lie from the mean over all of them."""
    resampled_RB = np.stack([scale(name, resampled_means(value_N)) for value_N in value_NB.T], axis=1)
    return np.asarray(resampled_RB - scale(name, value_NB.mean(axis=0)))
