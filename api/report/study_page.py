"""The page of a study: one HTML file with its charts, which opens offline. The drawing is in `web/studies.js`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from allocator.atomic import write_atomically
from api.report.report import SCRIPTS, render_page

if TYPE_CHECKING:
    from profiler.documents.sidecar import Companion


def render_study(study: Companion) -> str:
    """The whole page; the same study gives the same text."""
    kind = study.file_name.removesuffix(".json")
    data = {"kind": kind, "study": study.model_dump(mode="json")}
    return render_page("study.html", f"bitrank {kind}: {study.model.id}", (*SCRIPTS, "studies.js"), data)


def write_study(path: Path, study: Companion) -> None:
    """Write the page whole or not at all."""
    write_atomically(path, render_study(study).encode())
