"""Studies of one model: fidelity, spectra, quality cliff, plain cuts. Use-cases like those of `usecases.py`.

What lives here: picking tokens, measuring, and writing the document where it is asked for. A document written into a
profile's directory under its own name (fidelity.json, spectrum.json, cliff.json) is a companion of that profile.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from allocator.plan import PlanModel
    from profiler.documents.sidecar import CliffDocument, FidelityDocument, SpectrumDocument
    from profiler.model.checkpoint import ModelRef
    from profiler.statistics.calibration import Progress

FIDELITY_TOKENS, CLIFF_TOKENS = 40_960, 8_192


def study_fidelity(
    model: str,
    output: Path | None,
    progress: Progress,
    calibration: Sequence[Path] = (),
    text: Path | None = None,
    tokens: int = FIDELITY_TOKENS,
    seed: int = 0,
    device: str = "cpu",
) -> FidelityDocument:
    """Measure every block of a model.

    Calibration windows are those of a profile with the same settings. Measured is on `text`, or on the windows that a
    profile holds back for its probes.
    """
    from allocator.plan import PlanModel
    from profiler.model.checkpoint import find_model
    from profiler.statistics.calibration import text_tokens
    from profiler.studies.fidelity import (
        check_measurable,
        compressed_blocks,
        fidelity_document,
        measure_blocks,
    )
    from profiler.sweep.run import PROBE_SHARE, ProfileSettings, open_run

    ref = find_model(model)
    with _scratch(output) as folder:
        run = open_run(ref, folder, ProfileSettings(tuple(calibration), tokens, seed, device))
        run.work.mkdir()
        if text is not None:
            measured_NT, source = text_tokens(run.loaded, text, tokens // PROBE_SHARE), text.name
            check_measurable(run.loaded, measured_NT)
        else:
            measured_NT, source = run.probe_tokens, f"{run.given[1]}, held back"
        blocks = compressed_blocks(run.loaded, run.fitting_tokens, run.token_weights, folder)
        measured = measure_blocks(run.loaded, measured_NT, blocks, folder, progress)
        document = fidelity_document(
            PlanModel(id=ref.id, revision=ref.revision, weights_sha256=run.weights),
            measured,
            calibration=run.given[1],
            text=source,
            window_tokens=measured_NT.shape[1],
        )
    return document if output is None else document.save(output)


def study_spectrum(
    model: str, output: Path | None, progress: Progress, device: str = "cpu"
) -> SpectrumDocument:
    """The energy of every layer and head."""
    from profiler.model.checkpoint import find_model
    from profiler.model.layers import open_model
    from profiler.studies.spectrum import spectrum_document

    ref = find_model(model)
    document = spectrum_document(open_model(ref, device), _identity(ref), progress)
    return document if output is None else document.save(output)


def study_cliff(
    model: str,
    output: Path | None,
    progress: Progress,
    text: Path | None = None,
    tokens: int = CLIFF_TOKENS,
    ratios: Sequence[float] | None = None,
    device: str = "cpu",
) -> CliffDocument:
    """What every projection and head group loses as its rank falls, on a text or one sampled from the model."""
    from profiler.model.checkpoint import DEMO, DEMO_PATH, find_model
    from profiler.model.layers import load_model
    from profiler.statistics.calibration import sample_tokens, text_tokens
    from profiler.studies.cliff import RATIOS, measure_cliff

    ref = find_model(model)
    identity, loaded = _identity(ref), load_model(ref, device)
    if text is None and model == DEMO:
        text = DEMO_PATH / "evaluation.txt"
    if text is not None:
        tokens_NT, source = text_tokens(loaded, text, tokens), text.name
    else:
        tokens_NT, source = sample_tokens(loaded, tokens, 1, progress), "sampled from the model"
    with _scratch(output) as folder:
        document = measure_cliff(loaded, identity, tokens_NT, source, folder, ratios or RATIOS, progress)
    return document if output is None else document.save(output)


def study_quality(
    model: str,
    output: Path | None,
    progress: Progress,
    ranks: Sequence[int],
    shares: Sequence[float],
    factor_bits: int,
    device: str = "cpu",
) -> dict[str, Any]:
    """Cosine and relative error of every matrix at some ranks, by the weights alone."""
    from allocator.atomic import write_atomically
    from profiler.model.checkpoint import find_model
    from profiler.model.layers import open_model
    from profiler.studies.quality import BANDS, truncations

    ref = find_model(model)
    identity, loaded = _identity(ref), open_model(ref, device)
    found = truncations(loaded, ranks, shares, factor_bits, progress)
    document = {
        "model": identity.model_dump(),
        "factor_bits": factor_bits or None,
        "bands": {name: least for name, least in BANDS if least > 0},
        "matrices": [asdict(row) for row in found],
    }
    if output is not None:
        write_atomically(output, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
    return document


def _identity(ref: ModelRef) -> PlanModel:
    from allocator.plan import PlanModel
    from profiler.model.checkpoint import check_uncompressed, weights_sha256

    check_uncompressed(ref)
    return PlanModel(id=ref.id, revision=ref.revision, weights_sha256=weights_sha256(ref))


@contextmanager
def _scratch(output: Path | None) -> Iterator[Path]:
    """An empty folder while open, beside the output where there is one: activations and logits may be large."""
    with TemporaryDirectory(
        prefix=".bitrank-", dir=None if output is None else output.resolve().parent
    ) as folder:
        yield Path(folder)
