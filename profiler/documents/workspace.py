"""An output directory while a profile is made in it: what it was asked to hold, and where the work lies until then.

What lives here: whether a directory is free, unfinished or finished, and the work folder of a request. What a
finished one means is in `profile.py`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from allocator.atomic import LOCK, write_atomically
from profiler.documents.profile import TOKEN_WEIGHTS, ProfileError
from profiler.documents.sidecar import FidelityDocument, SpectrumDocument, TablesDocument

REQUEST = "request.json"
MEASURED = (
    "measurements.parquet",
    "calibration.safetensors",
    TOKEN_WEIGHTS,
    FidelityDocument.file_name,
    SpectrumDocument.file_name,
    TablesDocument.file_name,
)
"""Files of a profile that are written before profile.json."""


def is_finished(output: Path, request: str) -> bool:
    """Whether `output` holds what is asked for; raises `ProfileError` when it holds anything else."""
    if (output / "profile.json").exists():
        if _asked(output) == request:
            return True
        raise ProfileError(f"{output} already holds another profile; choose another directory or remove it")
    if output.exists() and not (output.is_dir() and all(map(_is_unfinished, output.iterdir()))):
        raise ProfileError(f"{output} already exists and is not empty; choose another directory or remove it")
    return False


def prepare(output: Path, request: str) -> Path:
    """The work folder for this request, emptied of any other's and of files a killed run was writing."""
    work = output / ".work"
    for temporary in output.glob(".*.tmp"):
        temporary.unlink()
    if _asked(output) != request:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    write_atomically(output / REQUEST, request.encode())
    return work


def _asked(output: Path) -> str | None:
    file = output / REQUEST
    return file.read_text() if file.exists() else None


def _is_unfinished(file: Path) -> bool:
    return file.name in (".work", LOCK, REQUEST, *MEASURED) or file.suffix == ".tmp"
