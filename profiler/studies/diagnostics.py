"""The dossier: what is measured of a model while it is profiled, beside what a plan needs.

What lives here: fidelity from the probes that the sweep kept, on a few of the windows held back for them, and spectra
where they are cheap. Both are companions of the profile, and together take less than a tenth of its time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from allocator.plan import PlanModel
from profiler.documents.sidecar import FidelityDocument, SpectrumDocument
from profiler.evaluation.reference_configs import probe_file, read_probe
from profiler.model.layers import LoadedModel
from profiler.model.weight_patching import Weights
from profiler.statistics.calibration import Progress
from profiler.studies.fidelity import PROBE, fidelity_document, measure_blocks
from profiler.studies.spectrum import spectrum_document

WINDOWS = 6
"""Windows that the blocks are measured on, at most."""
SPECTRUM_LIMIT = 2e12
"""Spectra are left to `bitrank spectrum` where the cubes of the layers' smaller sides sum to more."""


def write_dossier(
    loaded: LoadedModel,
    model: PlanModel,
    tokens_NT: Tensor,
    source: str,
    work: Path,
    output: Path,
    progress: Progress,
) -> FidelityDocument | None:
    """Write fidelity.json and spectrum.json to `output`, as far as they are to be had; the former.

    tokens_NT: windows that no probe was fitted to, of the text named `source`. work: the run's folder, with the probes.
    """
    fidelity = None
    if has_probes(loaded, work):
        with TemporaryDirectory(dir=work) as folder:
            measured = measure_blocks(
                loaded, tokens_NT[:WINDOWS], kept_blocks(loaded, work), Path(folder), progress
            )
        text = f"{source}, held back"
        fidelity = fidelity_document(model, measured, source, text, tokens_NT.shape[1])
        fidelity.save(output / FidelityDocument.file_name)
    if sum(min(layer.rows, layer.columns) ** 3 for layer in loaded.layers) <= SPECTRUM_LIMIT:
        spectrum_document(loaded, model, progress).save(output / SpectrumDocument.file_name)
    return fidelity


def has_probes(loaded: LoadedModel, work: Path) -> bool:
    """Whether the sweep kept every layer at the probe setting, which is so where its grid has it."""
    return all(probe_file(work / "probes", layer, PROBE).exists() for layer in loaded.layers)


def kept_blocks(loaded: LoadedModel, work: Path) -> Iterator[Weights]:
    for index in range(len(loaded.block_names)):
        yield {
            layer: read_probe(work / "probes", layer, PROBE, loaded.device)
            for layer in loaded.layers_of(index)
        }
